"""Fills a template: :func:`fill`. The only place that knows the template engine."""

from __future__ import annotations

import importlib.resources

from markupsafe import Markup

from postquant.pipeline.html.svg import clipped_name, percent, short
from postquant.pipeline.summary import megabytes

_FOLDER = "postquant.pipeline.html"


def fill(template: str, **values: object) -> bytes:
    """An HTML page.

    Args:
        template: Name of a template beside this module, without ``.html.j2``.
        values: What it shows; text is escaped.

    Returns:
        The page in UTF-8, with style sheet and figures in it.
    """
    import jinja2  # takes a tenth of a second, and only pages need it

    folder = importlib.resources.files(_FOLDER).joinpath("templates")

    def source(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=short, percent=percent, bytes=megabytes, tail=clipped_name, decibels=decibels)
    page = environment.get_template(f"{template}.html.j2").render(
        style=Markup(source("style.css.j2")),  # our own file
        **values,
    )
    return page.encode()


def decibels(value: float | None) -> str:
    """An SQNR for people.

    >>> decibels(12.3456), decibels(200.0), decibels(None)
    ('12.3', 'exact', '-')
    """
    if value is None:
        return "-"
    return "exact" if value >= 200 else f"{value:.1f}"
