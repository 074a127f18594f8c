"""Which samples of a set are used: drawn by a seed, written down, and known by what they contain."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from libragrad_fx.errors import InputError
from libragrad_fx.evaluate.data.items import Data, sha256
from libragrad_fx.extras import writing
from libragrad_fx.models import imported

Keep = Callable[[Data, int], bool]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples that were chosen, in order, and how.

    data:    name of the set
    among:   how many samples it had
    seed:    of the order
    keep:    the filter by name; "" if there was none
    indices: into the set
    ids:     of the samples
    hashes:  ``Stored.sha256`` of each; "" if it could not be read
    """

    data: str
    among: int
    seed: int
    keep: str
    indices: tuple[int, ...]
    ids: tuple[str, ...]
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def digest(self) -> str:
        """SHA-256 of the samples' ids and contents, in order: it changes with any picture."""
        return sha256([text.encode() for pair in zip(self.ids, self.hashes, strict=True) for text in pair])

    def check(self, data: Data) -> None:
        """Whether ``data`` still holds the same samples at the same indices.

        Raises:
            InputError: it does not; with the first that differ.
        """
        if self.among != data.count:
            raise InputError(f"{data.name} has {data.count} samples, and had {self.among}: select anew")
        rows = zip(self.indices, self.ids, self.hashes, strict=True)
        changed = [name for i, name, sha in rows if _changed(data, i, name, sha)]
        if changed:
            raise InputError(
                f"{len(changed)} samples of {data.name} changed ({', '.join(changed[:3])}): select anew"
            )

    def save(self, file: str | Path) -> None:
        """Write JSON.

        Raises:
            InputError: the file cannot be written.
        """
        body = {**dataclasses.asdict(self), "digest": self.digest}
        with writing(Path(file)):
            Path(file).write_text(json.dumps(body, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, file: str | Path) -> Selection:
        """What ``save`` wrote.

        Raises:
            InputError: there is no such file, or it is another or was changed.
        """
        try:
            body = json.loads(Path(file).read_text("utf-8"))
            digest = body.pop("digest")
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in body.items()}
            found = cls(**fields)
            same = found.digest == digest
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError(f"{str(file)!r} is no selection that was saved: {e}") from e
        if not same:
            raise InputError(f"{str(file)!r} was changed after it was saved: select anew")
        return found


def selected(data: Data, count: int | None, seed: int, keep: str | Keep | None = None) -> Selection:
    """The first ``count`` samples of a random order that pass a filter (all of them for None).

    The order is ``default_rng(seed).permutation``, as of ``datasets.Dataset.shuffle(seed=seed)``.
    LibraGrad's sets were drawn with seed 43 and ``keep="rgb"``.

    Args:
        keep: one of ``KEEP``, ``package.module:function``, or a function of the set and an index.

    Raises:
        InputError: fewer samples pass, two have one id, or there is no such filter.
    """
    if count is not None and count < 1:
        raise InputError(f"cannot select {count} samples")
    passes, said = _filter(keep)
    indices: list[int] = []
    for i in np.random.default_rng(seed).permutation(data.count).tolist():
        if len(indices) == count:
            break
        if passes(data, i):
            indices.append(i)
    if not indices or (count is not None and len(indices) < count):
        kept = f" that {said} keeps" if said else ""
        raise InputError(
            f"{data.name} has {len(indices)} samples{kept}, not {count or 'any'}: ask for fewer"
        )
    found = [data.peek(i) for i in indices]
    twice = [name for name, n in Counter(s.id for s in found).items() if n > 1]
    if twice:
        raise InputError(f"{data.name} has several samples with the id {twice[0]!r}: ids must differ")
    ids, hashes = tuple(s.id for s in found), tuple(s.sha256 for s in found)
    return Selection(data.name, data.count, seed, said, tuple(indices), ids, hashes)


def rgb(data: Data, index: int) -> bool:
    """Drops pictures stored in another mode than RGB. What cannot be read stays, to be reported."""
    return data.peek(index).mode in ("", "RGB")


def masked(data: Data, index: int) -> bool:
    """Drops samples without masks. What cannot be read stays, to be reported."""
    try:
        return bool(data.get(index).masks)
    except InputError:
        return True


KEEP: dict[str, Keep] = {"rgb": rgb, "masked": masked}


def _filter(keep: str | Keep | None) -> tuple[Keep, str]:
    if keep is None:
        return (lambda data, index: True), ""
    if callable(keep):
        return keep, f"{keep.__module__}:{getattr(keep, '__qualname__', type(keep).__qualname__)}"
    if keep not in KEEP and ":" not in keep:
        raise InputError(f"no filter {keep!r}: choose {', '.join(KEEP)} or package.module:function")
    return (KEEP[keep] if keep in KEEP else imported(keep)), keep


def _changed(data: Data, index: int, name: str, sha: str) -> bool:
    found = data.peek(index)
    return (found.id, found.sha256) != (name, sha)
