"""A page: a template of ours filled in, with the style that all pages share inside it; nothing is loaded from elsewhere."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from imaml_dist.reporting import drawing


def render(template: str, **facts: Any) -> bytes:
    """The page as UTF-8.

    Args:
        template: a file of this room.
        facts: what it shows; escaped, but for drawings.
    """
    room = files("imaml_dist.reporting")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    style = Markup(room.joinpath("page.css.j2").read_text(encoding="utf-8"))  # noqa: S704 - our own file
    page = environment.from_string(room.joinpath(template).read_text(encoding="utf-8")).render(style=style, **facts)
    return page.encode("utf-8", "replace")


def drawn(figure: Figure, prefix: str) -> Markup:
    """A figure for a page; `prefix` is its own there."""
    return Markup(drawing.svg(figure, prefix))  # noqa: S704 - our own drawing, whose texts matplotlib escapes


def percent(value: float, digits: int = 1) -> str:
    """`93.4%`, or a dash."""
    return f"{value * 100:.{digits}f}%" if np.isfinite(value) else "–"


def duration(value: object) -> str:
    """Seconds as a person says them, or a dash."""
    seconds = drawing.finite(value)
    if seconds is None:
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"
