"""The site that `make docs` builds into build/docs: the pages of this folder and the package's docstrings."""

import re
from argparse import Action, ArgumentParser

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from pddm_ext import __version__
from pddm_ext.workbench.cli import _parser

project = "pddm_ext"
author = copyright = "The pddm_ext developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
maximum_signature_line_length = 90
# Lists, in which "x, y: …" can speak of two at once; types are in the signatures.
napoleon_use_param = napoleon_use_rtype = False
napoleon_custom_sections = ["Inputs", "Shape", ("Attributes", "params_style")]

# Nothing is fetched, other projects' inventories included: what is theirs stays plain text.
_OTHERS = "os|torch|numpy|collections|pathlib|PIL|pytorch_metric_learning|lightning|sentence_transformers|sklearn"
nitpick_ignore_regex = [
    ("py:.*", rf"({_OTHERS})\..*"),
    # Private classes are in signatures of what the package itself makes; and of a dataclass whose default a factory
    # makes Sphinx takes the commas within types for those between arguments.
    ("py:class", r"Module|Tensor|pddm_ext\..*\._\w+|tuple\[str"),
    ("py:exc", "NotFittedError"),
]

html_theme = "furo"
html_title = f"pddm_ext {version}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]


class Options(SphinxDirective):
    """``{options} COMMAND [OTHER]``: what a command of pddm-ext accepts, but for what OTHER says in the same words."""

    required_arguments, optional_arguments = 1, 1

    def run(self) -> list[nodes.Node]:
        command, *others = (_commands()[name] for name in self.arguments)
        known = {(*action.option_strings, action.help) for other in others for action in other._actions}
        actions = [action for action in command._actions if (*action.option_strings, action.help) not in known]
        lines = [f":::{{program}} {command.prog}\n:::\n", command.description or "", *map(_described, actions)]
        return self.parse_text_to_nodes("\n\n".join(lines))


def _commands() -> dict[str, ArgumentParser]:
    (commands,) = (action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    return commands


def _described(action: Action) -> str:
    takes = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    names = [f"{name} {takes}".strip() for name in action.option_strings] or [action.dest]
    choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
    help = re.sub(r"(--[a-z-]+)", r"`\1`", action.help or "")
    text = f"{help}." + f" One of {choices}." * bool(choices)
    return f":::{{option}} {', '.join(names)}\n{text}\n:::"


def setup(app: Sphinx) -> None:
    app.add_directive("options", Options)
