"""The pages' templates: ``*.html.j2``, and ``style.css.j2``, the look that they share."""

from __future__ import annotations

from importlib import resources

import jinja2


def environment() -> jinja2.Environment:
    """Finds this package's templates; text in them is escaped, and a name that is missing raises."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
