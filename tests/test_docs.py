"""The documentation does what it says: every Python block on a page runs, and the reference names everything public."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pddm_ext
from helpers import threads
from pddm_ext.workbench.cli import _parser

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a fence may open with besides Python, which always runs.
NOT_RUN = {"bash", "bibtex"}


def blocks(path: Path) -> list[Callable[[dict[str, Any]], None]]:
    """A page's Python blocks, compiled so that a traceback names the page and its line."""
    text = path.read_text("utf-8")

    def made(match: re.Match[str]) -> Callable[[dict[str, Any]], None]:
        line = text.count("\n", 0, match.start(1))
        code = compile("\n" * line + match[1], str(path), "exec")
        return lambda namespace: exec(code, namespace)

    return [made(match) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if blocks(path)])
def test_every_python_block_of_a_page_runs(page, monkeypatch):
    """In order, in one namespace, which begins empty."""
    monkeypatch.setattr("pddm_ext.unit._default_units", {})
    namespace: dict[str, Any] = {}
    with threads(1):  # small steps
        for run in blocks(PAGES[page]):
            run(namespace)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_a_page_is_overlooked(page):
    text = PAGES[page].read_text("utf-8")
    opened = re.findall(r"^ *(?:```+|~~~+|:::+) *([^\s`{].*)$", text, re.MULTILINE)
    assert set(opened) <= NOT_RUN | {"python"}
    assert opened.count("python") == len(blocks(PAGES[page]))


def test_the_reference_names_everything_public():
    text = "".join(path.read_text("utf-8") for page, path in PAGES.items() if page.startswith("docs/api"))
    documented = re.findall(r"^\.\. auto(?:function|class|module):: (\S+)$", text, re.MULTILINE)
    adapters = {path.stem for path in ROOT.glob("pddm_ext/adapters/[a-z]*.py")}
    public = {*pddm_ext.__all__, *(f"adapters.{name}" for name in adapters)}
    assert {f"pddm_ext.{name}" for name in public} <= set(documented)
    assert len(documented) == len(set(documented))


def test_the_command_line_s_page_says_which_of_train_s_options_compare_lacks():
    train, compare = (
        {option for action in command._actions for option in action.option_strings}
        for command in (_parser()._subparsers._group_actions[0].choices[name] for name in ("train", "compare"))
    )
    (said,) = re.findall(r"^And every option of .* but (.*)\.$", PAGES["docs/cli.md"].read_text("utf-8"), re.MULTILINE)
    assert set(re.findall("`(.*?)`", said)) == train - compare


def test_the_page_on_other_libraries_shows_every_example():
    shown = re.findall(
        r"^```\{literalinclude\} \.\./(\S+)$", PAGES["docs/integrations.md"].read_text("utf-8"), re.MULTILINE
    )
    assert shown
    assert {ROOT / path for path in shown} == set(ROOT.glob("examples/*.py"))
