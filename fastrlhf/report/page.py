"""From data to markup: the templates beside this file, and what every value passes on its way into them.

No script, no external resource; a content security policy forbids both, should a string ever slip through.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastrlhf.runtime.console import clean, number, redact


def figure_of(value: float | None) -> str:
    """A number as a person reads it: as many decimals as say something, a true minus sign."""
    if value is None:
        return "n/a"
    size = abs(value)
    if 10 <= size < 1e4 and value == int(value):
        text = f"{int(value)}"
    elif 0.1 <= size < 1000:
        text = f"{value:.2f}" if size < 10 else f"{value:.1f}"
    else:
        text = number(value)
    return text if "e" in text else text.replace("-", "\u2212")


def _inert(value: Any) -> Any:
    """What a template shows, without controls, bidi overrides and credentials; markup of a template's own stays."""
    return value if isinstance(value, (int, float)) or hasattr(value, "__html__") else redact(clean(str(value)))


def render(template: str, **values: Any) -> str:
    """A template of the package with its values. Each value is made inert and escaped, wherever it stands."""
    return _ENVIRONMENT.get_template(template).render(values)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    finalize=_inert,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
