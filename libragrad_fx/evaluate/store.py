"""Results in files: one for each unit of work, and one of all.

A unit's file has the unit's key for a name. It appears at once, complete, or not at all, so that a killed
run leaves nothing half done, and several processes write into one folder. ``unfinished/`` holds what is
being written, and what killed runs left there; it may be deleted when nothing runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from libragrad_fx.errors import InputError
from libragrad_fx.extras import need

RESULTS, RUNS, EXAMPLES = "results.parquet", "runs.parquet", "examples.parquet"
COLUMNS = {
    "model": "string", "family": "string", "seed": "int64", "data": "string", "policy": "string",
    "method": "string", "metric": "string", "target": "string", "image": "string", "label": "int64",
    "explained": "int64", "measure": "string", "value": "float64", "how": "string", "error": "string",
    "run": "string",
}  # fmt: skip
"""The columns of results. target: which class was asked for, and ``explained``, its index. value: null
where it is not defined. error: why there is none, of what failed. run: the key of the unit, a row of
``runs.parquet``."""
SHOWN = "examples"
"""In place of a metric: the unit holds maps, and no numbers."""
MAPS = {
    "model": "string", "family": "string", "seed": "int64", "data": "string", "policy": "string",
    "method": "string", "target": "string", "image": "string", "label": "string", "predicted": "string",
    "explained": "string", "probability": "float64", "values": "binary", "height": "int64",
    "width": "int64", "scale": "float64", "picture": "binary", "pieces": "string", "mask": "binary",
    "error": "string", "run": "string",
}  # fmt: skip
"""The columns of examples. label, predicted, explained: names of classes, or their indices. probability: of
the class that is explained. values: float16 (height, width), little-endian, to be multiplied by ``scale``;
of a text, one row. picture: a file of what the model saw. pieces: of a text, a JSON list. mask: a file of
the mask of that class, of a text one row."""
_ROWS = 500_000  # held in memory at once while results are put together


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

    @functools.cached_property
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

    def write(self, unit: Unit, rows: Sequence[Mapping[str, Any]], ran: Mapping[str, Any]) -> None:
        """Write the results of a unit, with what made them. ran: ``seconds`` by what took them; where."""
        said = {"unit": dataclasses.asdict(unit), "key": unit.key, **ran}
        schema = _schema(said, MAPS if unit.metric == SHOWN else COLUMNS)
        table = need("pyarrow", "evaluate").Table.from_pylist([dict(r) for r in rows], schema=schema)
        with self._placed(self.file(unit)) as file:
            need("pyarrow.parquet", "evaluate").write_table(table, file, compression="zstd")

    def collect(self, units: Iterable[Unit], config: Mapping[str, Any]) -> Path | None:
        """All results of a config as one file, in the order of its units; None if a unit is not done.
        Runs and examples have files of their own beside it.

        ``family`` and ``seed`` are what the config says of a model now. Results of other configs, and of
        models or data that have changed, stay where they are.
        """
        arrow, parquet = need("pyarrow", "evaluate"), need("pyarrow.parquet", "evaluate")
        every = [*units]
        if not all(map(self.has, every)):
            return None
        units = [u for u in every if u.metric != SHOWN]
        runs, held, schema = [], [], _schema({"config": config})
        with self._placed(self.folder / RESULTS) as file, parquet.ParquetWriter(
            file, schema, compression="zstd"
        ) as writer:  # fmt: skip
            for unit in units:
                table = _labelled(self._read(unit), config["models"][unit.model], unit.model)
                runs.append(_run(json.loads(table.schema.metadata[b"libragrad"])))
                held.append(table.cast(schema))
                if sum(map(len, held)) >= _ROWS:
                    writer.write_table(arrow.concat_tables(held))
                    held.clear()
            writer.write_table(arrow.concat_tables([*held, schema.empty_table()]))
        with self._placed(self.folder / RUNS) as file:
            parquet.write_table(arrow.Table.from_pylist(runs), file, compression="zstd")
        schema = _schema({}, MAPS)
        shown = [
            _labelled(self._read(u), config["models"][u.model], u.model).cast(schema)
            for u in every
            if u.metric == SHOWN
        ]
        with self._placed(self.folder / EXAMPLES) as file:
            parquet.write_table(
                arrow.concat_tables([schema.empty_table(), *shown]), file, compression="zstd"
            )
        return self.folder / RESULTS

    def withdraw(self) -> None:
        """Remove what was collected before: it is of another config, or of another state of things."""
        for name in (RESULTS, RUNS, EXAMPLES):
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as e:
                raise InputError(f"cannot write in {str(self.folder)!r}: {e.strerror or e}") from e

    def forget_failures(self, units: Iterable[Unit]) -> int:
        """Remove units in which something failed, to be tried again; how many."""
        failed = [u for u in units if self.has(u) and self._read(u, ["error"])["error"].drop_null()]
        for unit in failed:
            self.file(unit).unlink(missing_ok=True)
        return len(failed)

    def counted(self) -> tuple[int, int]:
        """How many numbers there are in all results, and how many failures."""
        parquet = need("pyarrow.parquet", "evaluate")
        table = parquet.read_table(self.folder / RESULTS, columns=["value", "error"])
        numbers, failures = (len(table) - table[name].null_count for name in ("value", "error"))
        return numbers, failures

    def _read(self, unit: Unit, columns: list[str] | None = None) -> Any:
        """Raises ``InputError`` for a file that cannot be read, once it is removed to be made again."""
        parquet, file = need("pyarrow.parquet", "evaluate"), self.file(unit)
        try:
            return parquet.ParquetFile(file).read(columns)
        except (OSError, ValueError) as e:
            file.unlink(missing_ok=True)
            raise InputError(f"{str(file)!r} was damaged, and is removed: run again") from e

    @contextlib.contextmanager
    def _placed(self, file: Path) -> Iterator[BinaryIO]:
        """A file to write to, which takes its place when it is complete."""
        beside = self.folder / "unfinished" / uuid.uuid4().hex
        try:
            for folder in (beside.parent, file.parent):
                folder.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as opened:
                yield opened
                opened.flush()
                os.fsync(opened.fileno())
            os.replace(beside, file)
        except OSError as e:
            raise InputError(f"cannot write {str(file)!r}: {e.strerror or e}") from e
        finally:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)


def _schema(said: Mapping[str, Any], columns: Mapping[str, str] = COLUMNS) -> Any:
    arrow = need("pyarrow", "evaluate")
    fields = [(name, getattr(arrow, kind)()) for name, kind in columns.items()]
    return arrow.schema(fields, {"libragrad": json.dumps(said, sort_keys=True)})


def _labelled(table: Any, spec: Mapping[str, Any], model: str) -> Any:
    """With the family and the seed that a config says of a model."""
    arrow = need("pyarrow", "evaluate")
    for name, value in (("family", spec["family"] or model), ("seed", spec["seed"])):
        field = table.schema.field(name)
        column = arrow.array([value] * len(table), field.type)
        table = table.set_column(table.schema.get_field_index(name), field, column)
    return table


def _run(said: Mapping[str, Any]) -> dict[str, Any]:
    """A row of ``runs.parquet``. attribution_seconds: of a map, also where another metric shares it."""
    unit, seconds = said["unit"], said["seconds"]
    return {
        "run": said["key"], **{k: v for k, v in unit.items() if k != "made_by"},
        "seconds": sum(seconds.values()), "attribution_seconds": seconds["attribution"],
        "device": said["device"], "threads": said["threads"],
        "made_by": json.dumps(unit["made_by"], sort_keys=True),
    }  # fmt: skip
