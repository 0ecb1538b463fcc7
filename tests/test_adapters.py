"""What all adapters promise: none is imported before it is asked for, and each says what it lacks."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

ADAPTERS = {
    "pml": ("pytorch_metric_learning", "pml"),
    "lightning": ("lightning", "lightning"),
    "sentence_transformers": ("sentence_transformers", "sentence-transformers"),
    "sklearn": ("sklearn", "sklearn"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_package_is_named_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = ADAPTERS[name]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"pddm_ext.adapters.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}, .* pip install '\.\[{extra}\]'") as raised:
        importlib.import_module(f"pddm_ext.adapters.{name}")
    assert raised.value.name == package


def test_what_a_package_lacks_itself_is_not_taken_for_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from pddm_ext.adapters import needs

    monkeypatch.delitem(sys.modules, "wave", raising=False)
    monkeypatch.setitem(sys.modules, "struct", None)
    with pytest.raises(ModuleNotFoundError, match="struct"):
        needs("wave", "sound")


def test_importing_the_package_imports_none_of_them() -> None:
    packages = [package for package, _ in ADAPTERS.values()]
    program = f"import sys, pddm_ext; print([name for name in {packages} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
