"""A griffe extension for the site: fields that a class's docstring lists become its attributes."""

from __future__ import annotations

import re
from typing import Any

import griffe

_FIELD = re.compile(r"(\w+): +\S")


class Fields(griffe.Extension):
    """A paragraph of ``name: what it is`` gets the heading that Google's style has for it."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        if cls.docstring is not None:
            parts = cls.docstring.value.split("\n\n")
            cls.docstring.value = "\n\n".join(headed(p, cls) for p in parts)


def headed(part: str, cls: griffe.Class) -> str:
    first = _FIELD.match(part)
    if first is None or first[1] not in cls.members:
        return part
    return "Attributes:\n" + "\n".join(f"    {line}" for line in part.split("\n"))
