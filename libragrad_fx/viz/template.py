"""HTML pages that stand alone: all extend ``viz/base.html``, which has their colours and their font."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from libragrad_fx.extras import need


def rendered(
    name: str, extra: str, filters: dict[str, Callable[..., Any]] | None = None, **given: Any
) -> str:
    """A template of this package, as ``viz/page.html``, with values; all of them are escaped.

    Raises:
        LibraGradError: jinja2 is not installed; it comes with ``extra``.
    """
    jinja2 = need("jinja2", extra)
    world = jinja2.Environment(
        loader=jinja2.PackageLoader("libragrad_fx", ""), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    world.filters.update(filters or {})
    return world.get_template(name).render(**given)


def script(value: Any, extra: str) -> Any:
    """JSON that cannot end a script element."""
    dumps = need("jinja2", extra).utils.htmlsafe_json_dumps
    return dumps(value, separators=(",", ":"), allow_nan=False)


def markup(text: str, extra: str) -> Any:
    """Text of this package that is HTML or JavaScript, and is not escaped."""
    return need("markupsafe", extra).Markup(text)
