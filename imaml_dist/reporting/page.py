"""Templates to pages: everything escaped, nothing left undefined, one style for all."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from imaml_dist.reporting import drawing


def render(template: str, **facts: Any) -> str:
    """A page.

    Args:
        template: name of a file of this room.
        facts: what it speaks of.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files("imaml_dist.reporting").joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**facts)


def draw(figure: Figure, prefix: str) -> Markup:
    """A figure within a page; `prefix` makes its ids unique."""
    return Markup(drawing.svg(figure, prefix))  # noqa: S704 - our own drawing, whose texts matplotlib escapes


def percent(value: float, digits: int = 1) -> str:
    """`93.4%`, or a dash for what is not finite."""
    return f"{value * 100:.{digits}f}%" if np.isfinite(value) else "–"


def duration(value: object) -> str:
    """`1 h 5 min`, `3 min 2 s` or `4.1 s`."""
    seconds = drawing.finite(value)
    if seconds is None:
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{seconds:.1f} s"
