"""The pieces of a tokenizer as people read them."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CLOSING = re.compile(r"[.,;:!?)\]}%…]+")
_SPECIAL = re.compile(r"\[[A-Z]+\]|<[^<>\s]+>")


def readable(pieces: Sequence[str]) -> list[str]:
    """Each piece as it stands in the text, with the space before it; padding stays "".

    ▁ (SentencePiece) and Ġ (byte-level) are spaces, ## (WordPiece) joins, </w> (CLIP) is a space behind.
    Pieces without any such mark are words.
    """
    whole = "".join(pieces)
    if "▁" in whole:
        return _trimmed([p.replace("▁", " ") for p in pieces])
    if "Ġ" in whole or "Ċ" in whole:
        return _trimmed([_from_bytes(p) for p in pieces])
    if "</w>" in whole:
        return [_from_bytes(p.replace("</w>", "Ġ")) for p in pieces]
    return _trimmed([_joined(p) for p in pieces])


def _trimmed(pieces: list[str]) -> list[str]:
    """Without the space in front of the text."""
    first = next((i for i, p in enumerate(pieces) if p), None)
    return [p.lstrip(" ") if i == first else p for i, p in enumerate(pieces)]


def _joined(piece: str) -> str:
    if piece.startswith("##"):
        return piece[2:]
    return piece if not piece or _CLOSING.fullmatch(piece) else f" {piece}"


def _byte_of() -> dict[str, int]:
    """The byte behind each character of byte-level BPE: itself if printable, else one from 256 on."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_of()


def _from_bytes(piece: str) -> str:
    if _SPECIAL.fullmatch(piece) or not all(c in _BYTES for c in piece):
        return piece
    return bytes(_BYTES[c] for c in piece).decode("utf-8", "replace")
