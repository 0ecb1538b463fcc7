"""The package's own structure: imports that run one way, as CONTRIBUTING says, and one version."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import pddm_ext

ROOT = Path(__file__).resolve().parent.parent / "pddm_ext"


def modules(root: Path) -> dict[str, Path]:
    """Every module of a package by its dotted name; a package's own is that of its ``__init__``."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """What each module of a package imports of it, in functions and under conditions, too."""
    known = modules(root)

    def named(base: str, name: str) -> str | None:
        """The module that ``from base import name`` needs; native modules and other packages are none of these."""
        return f"{base}.{name}" if f"{base}.{name}" in known else base if base in known else None

    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        needed: set[str | None] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                needed |= {
                    named(*alias.name.rpartition(".")[::2]) if "." in alias.name else named(alias.name, "")
                    for alias in node.names
                }
            elif isinstance(node, ast.ImportFrom):
                up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*up, *filter(None, [node.module])])
                # A native module or a name of the package itself: its __init__ has run before, or is running.
                needed |= {
                    named(base, alias.name)
                    for alias in node.names
                    if not (node.level and base == package) or f"{base}.{alias.name}" in known
                }
        graph[module] = {name for name in needed if name is not None and name != module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_itself_through_others() -> None:
    assert circle(imports(ROOT)) == []


def test_a_circle_through_a_function_is_found(tmp_path: Path) -> None:
    package = tmp_path / "p"
    (package / "room").mkdir(parents=True)
    for name, text in {
        "__init__": "from .a import x",
        "a": "from . import b",
        "b": "def f():\n    from .room import c",
        "room/__init__": "",
        "room/c": "def g():\n    if True:\n        from ..a import x",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert set(circle(imports(package))) == {"p.a", "p.b", "p.room.c"}


#: What each floor may stand on, from the bottom: (design, section 4).
FLOORS = [
    {"_installing", "_numbers", "quadruplets", "precision"},
    {"parameters", "unlabelled"},
    {"_checks"},
    {"health", "ops", "density", "structure", "processes"},
    {"candidates", "losses", "memory_bank"},
    {"references"},
    {"group"},
    {"unit"},
    {"scoring", "reference"},
    {"mining"},
]


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_the_core_stands_on_lower_floors_only(floor: int) -> None:
    below = {f"pddm_ext.{name}" for names in FLOORS[:floor] for name in names}
    graph = imports(ROOT)
    for name in FLOORS[floor]:
        assert graph[f"pddm_ext.{name}"] <= below, name


def test_the_core_knows_neither_adapters_nor_workbench() -> None:
    graph = imports(ROOT)
    for module, needed in graph.items():
        wing = module.split(".")[1:2]
        if wing not in (["adapters"], ["workbench"], ["__main__"]):
            assert not [name for name in needed if name.startswith(("pddm_ext.adapters", "pddm_ext.workbench"))], module
        other = {"adapters": "pddm_ext.workbench", "workbench": "pddm_ext.adapters"}
        if wing and wing[0] in other:
            assert not [name for name in needed if name.startswith(other[wing[0]])], module


def test_contributing_has_the_same_floors() -> None:
    text = (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8")
    listed = text.partition("from lower floors only:")[2].partition(". It depends")[0].split("·")
    assert [set(re.findall(r"`(\w+)`", floor)) for floor in listed] == FLOORS


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT.parent / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (\S+)$", text, re.MULTILINE) == [pddm_ext.__version__]
