"""Results in files: one for each unit of work, and one of all.

A unit's file has the unit's key for a name. It appears at once, complete, or not at all, so that a killed
run leaves nothing half done, and several processes write into one folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

RESULTS, RUNS = "results.parquet", "runs.parquet"
COLUMNS = {
    "model": "string", "family": "string", "seed": "int64", "data": "string", "policy": "string",
    "method": "string", "metric": "string", "target": "string", "image": "string", "label": "int64",
    "explained": "int64", "measure": "string", "value": "float64", "how": "string", "error": "string",
    "run": "string",
}  # fmt: skip
"""The columns of results. target: which class was asked for, and ``explained``, its index. error: why there is
no value, of what failed. run: the key of the unit, a row of ``runs.parquet``."""
_ORDER = ("model", "data", "policy", "method", "metric", "target", "image", "measure", "run")


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some work whose results are one file. made_by: all that the numbers depend on."""

    model: str
    data: str
    chunk: int
    policy: str
    method: str
    metric: str
    target: str
    made_by: Mapping[str, Any]

    @property
    def key(self) -> str:
        """A name for the results: another one if anything that they depend on changed."""
        return hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()[:24]


class Store:
    """A folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, unit: Unit) -> Path:
        return self.folder / "parts" / unit.model / unit.data / f"{unit.key}.parquet"

    def has(self, unit: Unit) -> bool:
        return self.file(unit).is_file()

    def write(self, unit: Unit, rows: Sequence[Mapping[str, Any]], seconds: Mapping[str, float]) -> None:
        """Write the results of a unit, with what made them and how long it took."""
        said = {"unit": dataclasses.asdict(unit), "key": unit.key, "seconds": seconds}
        self._put(self.file(unit), _table(rows), said)

    def collect(self, units: Iterable[Unit], config: Mapping[str, Any]) -> Path | None:
        """All results of a config as one file, in one order; None if a unit is not done.

        Results of other configs, and of models or data that have changed, stay where they are.
        """
        arrow, parquet = need("pyarrow", "evaluate"), need("pyarrow.parquet", "evaluate")
        units = [*units]
        if not all(map(self.has, units)):
            return None
        tables = [parquet.read_table(self.file(u)) for u in units]
        whole = arrow.concat_tables([t.replace_schema_metadata() for t in tables])
        whole = whole.sort_by([(c, "ascending") for c in _ORDER])
        said = [json.loads(t.schema.metadata[b"libragrad"]) for t in tables]
        runs = [
            {"run": s["key"], **{k: v for k, v in s["unit"].items() if k != "made_by"},
             "seconds": sum(s["seconds"].values()), "attribution_seconds": s["seconds"]["attribution"],
             "made_by": json.dumps(s["unit"]["made_by"], sort_keys=True)}
            for s in said
        ]  # fmt: skip
        self._put(self.folder / RUNS, arrow.Table.from_pylist(runs), {})
        return self._put(self.folder / RESULTS, whole, {"config": config})

    def forget_failures(self, units: Iterable[Unit]) -> int:
        """Remove units in which something failed, to be tried again; how many."""
        parquet = need("pyarrow.parquet", "evaluate")
        done = [u for u in units if self.has(u)]
        failed = [
            u for u in done if any(parquet.read_table(self.file(u), columns=["error"])["error"].to_pylist())
        ]
        for unit in failed:
            self.file(unit).unlink()
        return len(failed)

    def _put(self, file: Path, table: Any, said: Mapping[str, Any]) -> Path:
        parquet = need("pyarrow.parquet", "evaluate")
        table = table.replace_schema_metadata({"libragrad": json.dumps(said, sort_keys=True)})
        beside = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, beside, compression="zstd")
            os.replace(beside, file)
        except OSError as e:
            raise InputError(f"cannot write {str(file)!r}: {e.strerror or e}") from e
        return file


def _table(rows: Sequence[Mapping[str, Any]]) -> Any:
    arrow = need("pyarrow", "evaluate")
    types = {"string": arrow.string(), "int64": arrow.int64(), "float64": arrow.float64()}
    schema = arrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    return arrow.Table.from_pylist([dict(r) for r in rows], schema=schema)
