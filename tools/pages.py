"""Shared by the tools that write pages: tables, and templates to fill."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(r)} |" for r in (head, ["---"] * len(head), *rows))


def fill(template: str, parts: Mapping[str, str], page: Path) -> None:
    """Write ``template``, a file of this folder, with each ``{name}`` replaced."""
    text = (Path(__file__).parent / template).read_text("utf-8")
    for name, value in parts.items():
        text = text.replace(f"{{{name}}}", value)
    page.write_text(text, "utf-8")


def refill(page: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- end -->`` in a page.

    Raises:
        KeyError: the page has no such place.
    """
    text = page.read_text("utf-8")
    for name, value in parts.items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda m, value=value: f"{m[1]}{value.strip()}\n{m[2]}", text)
        if count != 1:
            raise KeyError(f"{page.name} has {count} places <!-- {name} -->")
    page.write_text(text, "utf-8")
