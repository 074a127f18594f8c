"""Work is done once, in any order, by any number of processes, whatever fails."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libragrad_fx.errors import InputError, LibraGradError
from libragrad_fx.evaluate import Config, Share, evaluate, measures, runner
from libragrad_fx.evaluate.runner import Bench
from libragrad_fx.evaluate.store import RESULTS, RUNS, Store, Unit
from libragrad_fx.extras import need
from tests.evaluate import small
from tests.evaluate.pictures import picture, put

ENVIRONMENT = (
    "RANK", "WORLD_SIZE", "JOB_COMPLETION_INDEX",
    *(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "STEP")),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A config sets the threads of its process."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Any]:
    """A config, and the results of one process that nothing interrupts."""
    root = tmp_path_factory.mktemp("made")
    config = Config.of(small.config(small.pictures(root / "d", 5)))
    return config, read(evaluate(config, root / "out"))


def read(file: Path | None) -> Any:
    assert file is not None
    return parquet.read_table(file)


def rows(file: Path | None) -> list[dict[str, Any]]:
    return read(file).to_pylist()


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Which parts there are; a part that is written again has another inode."""
    found = [*(folder / "parts").rglob("*.parquet")]
    return {f.name: (f.stat().st_ino, f.stat().st_mtime_ns) for f in found}


class Stop(BaseException):
    """As a SIGINT, and as hard to catch."""


def stopping(after: int) -> runner.Seen:
    left = [after]

    def seen(unit: Unit, failed: Sequence[str]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return seen


# --- what a run gives


def test_there_is_one_row_for_each_number(made: tuple[Config, Any]) -> None:
    table = made[1]
    found = table.to_pylist()
    assert table.column_names == [*found[0]]
    assert {r["error"] for r in found} == {None}
    number = [(r["policy"], r["method"], r["metric"], r["image"], r["measure"]) for r in found]
    assert len({*number}) == len(number)
    assert len({r["image"] for r in found}) == 5
    assert {r["how"] for r in found if r["metric"] == "pixels"} == {"mean pixels"}
    for r in found:
        asked = r["explained"] == r["label"] if r["metric"] == "places" else True
        assert asked
        assert r["family"] == "net"


def test_what_made_a_number_is_beside_it(made: tuple[Config, Any], tmp_path: Path) -> None:
    config, table = made
    evaluate(config, tmp_path)
    runs = {r["run"]: r for r in rows(tmp_path / RUNS)}
    assert {r["run"] for r in table.to_pylist()} == {*runs}
    for run in runs.values():
        said = json.loads(run["made_by"])
        assert said["weights"] == Bench(config).identity("net").weights
        assert said["versions"]["torch"] == torch.__version__
        assert run["threads"] == 1
        assert run["device"] == "cpu"
        assert run["seconds"] >= run["attribution_seconds"] > 0
    said = json.loads(parquet.read_schema(tmp_path / RESULTS).metadata[b"libragrad"])
    assert Config.of(said["config"]) == config


def test_batches_have_no_say(made: tuple[Config, Any], tmp_path: Path) -> None:
    """In float64, but for the maps that are drawn for each batch."""
    config = made[0].model_copy(update={"dtype": "float64"})
    one = rows(evaluate(config.model_copy(update={"batch": 1}), tmp_path / "1"))
    four = rows(evaluate(config.model_copy(update={"batch": 3}), tmp_path / "3"))
    for a, b in zip(sorted(one, key=_number), sorted(four, key=_number), strict=True):
        assert _number(a) == _number(b)
        if a["method"] != "random":
            assert a["value"] == pytest.approx(b["value"], abs=1e-9)


def _number(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["method"], row["metric"], row["image"], row["measure"])


def test_each_batch_draws_a_map_of_its_own(made: tuple[Config, Any]) -> None:
    """The same map for the first sample of each batch would make few of many images."""
    cases = [case for c in (0, 1) for case in runner._Batches(Bench(made[0]), "net", "animals", c).cases]
    method = made[0].methods[0]
    maps = [_random(case, method) for case in cases]
    assert len(maps) == 3
    assert all(not torch.equal(a[0], b[0]) for i, a in enumerate(maps) for b in maps[:i])
    assert torch.equal(_random(cases[0], method), maps[0])


def _random(case: Any, method: Any) -> torch.Tensor:
    return case.attribution(method, "autograd", case.target("label"), "logit").values


@pytest.mark.slow
def test_tokens_are_looked_for_in_each_model(tmp_path: Path) -> None:
    """Two models of the same weights: what is known of the one is not taken for the other."""
    asked = small.config(
        small.pictures(tmp_path / "d", 3), batch=3, methods=["random"],
        models={act: {**small.VIT, "args": {"act": act}} for act in ("gelu", "relu")},
        metrics={"tokens": {"ratios": [0.5]}},
    )  # fmt: skip
    config = Config.of(asked)
    both = rows(evaluate(config, tmp_path / "both"))
    assert {r["how"] for r in both} == {"removed"}
    values = [[r["value"] for r in both if r["model"] == m] for m in ("gelu", "relu")]
    assert values[0] != values[1]
    bench = Bench(config)
    assert bench.identity("gelu").weights == bench.identity("relu").weights
    assert len({r["run"] for r in both}) == 2


# --- stopping and going on


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_a_run_goes_on_where_it_was_stopped(
    made: tuple[Config, Any], tmp_path_factory: pytest.TempPathFactory, stops: list[int]
) -> None:
    config, wanted = made
    folder, before = tmp_path_factory.mktemp("out"), {}
    for after in stops:
        with pytest.raises(Stop):
            evaluate(config, folder, seen=stopping(after))
        now = files(folder)
        assert before.items() <= now.items()
        before = now
    assert not (folder / RESULTS).exists()
    assert read(evaluate(config, folder)).equals(wanted)
    assert before.items() <= files(folder).items()
    assert [*(folder / "unfinished").iterdir()] == []


def test_what_is_done_is_not_opened_again(
    made: tuple[Config, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(made[0], tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr(runner, "_Batches", None)
    assert read(evaluate(made[0], tmp_path)).equals(made[1])
    assert files(tmp_path) == before


def test_a_killed_write_leaves_no_part(tmp_path: Path, made: tuple[Config, Any]) -> None:
    unit = next(Bench(made[0]).all_units())
    store = Store(tmp_path)

    def write() -> None:
        with store._placed(store.file(unit)) as file:
            file.write(b"half")
            raise Stop

    with pytest.raises(Stop):
        write()
    assert not store.has(unit)
    assert files(tmp_path) == {}


def test_a_damaged_part_is_made_again(made: tuple[Config, Any], tmp_path: Path) -> None:
    evaluate(made[0], tmp_path)
    part = next((tmp_path / "parts").rglob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged, and is removed: run again"):
        evaluate(made[0], tmp_path)
    assert read(evaluate(made[0], tmp_path)).equals(made[1])


def test_results_of_an_earlier_state_are_taken_away(made: tuple[Config, Any], tmp_path: Path) -> None:
    """Results are those of the config that ran last, or there are none."""
    evaluate(made[0], tmp_path)
    other = made[0].model_copy(update={"methods": made[0].methods[:1], "batch": 1})
    with pytest.raises(Stop):
        evaluate(other, tmp_path, seen=stopping(0))
    assert not (tmp_path / RESULTS).exists()
    assert not (tmp_path / RUNS).exists()
    assert {r["method"] for r in rows(evaluate(other, tmp_path))} == {"random"}
    assert read(evaluate(made[0], tmp_path)).equals(made[1])


def test_labels_of_a_model_are_those_of_now(made: tuple[Config, Any], tmp_path: Path) -> None:
    evaluate(made[0], tmp_path)
    before = files(tmp_path)
    spec = made[0].models["net"].model_copy(update={"family": "ViT", "seed": 5})
    found = rows(evaluate(made[0].model_copy(update={"models": {"net": spec}}), tmp_path))
    assert {(r["family"], r["seed"]) for r in found} == {("ViT", 5)}
    assert files(tmp_path) == before


# --- several processes


@pytest.mark.parametrize("world", [2, 5])
def test_any_number_of_processes_gives_the_same(
    made: tuple[Config, Any], tmp_path: Path, world: int
) -> None:
    """The last of them, whichever it is, writes all results."""
    order = [*reversed(range(world))]
    for rank in order:
        done = evaluate(made[0], tmp_path, share=Share(rank, world))
        assert (done is not None) == (rank == order[-1])
    assert read(tmp_path / RESULTS).equals(made[1])


def test_a_share_that_was_stopped_goes_on(made: tuple[Config, Any], tmp_path: Path) -> None:
    with pytest.raises(Stop):
        evaluate(made[0], tmp_path, share=Share(0, 2), seen=stopping(2))
    assert evaluate(made[0], tmp_path, share=Share(1, 2)) is None
    before = files(tmp_path)
    assert read(evaluate(made[0], tmp_path, share=Share(0, 2))).equals(made[1])
    assert before.items() <= files(tmp_path).items()


@given(jobs=st.integers(0, 40), world=st.integers(1, 12))
def test_shares_are_all_the_work_once(jobs: int, world: int) -> None:
    parts = [[*range(jobs)][Share(r, world).rank :: world] for r in range(world)]
    assert sorted(job for part in parts for job in part) == [*range(jobs)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("environment", "given", "wanted"),
    [
        ({}, (None, None), (0, 1)),
        ({}, (None, 1), (0, 1)),
        ({}, (1, 3), (1, 3)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (None, None), (2, 4)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (1, 3), (1, 3)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"},
         (None, None), (2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"},
         (None, None), (3, 4)),
        ({"JOB_COMPLETION_INDEX": "3"}, (None, 8), (3, 8)),
    ],
)  # fmt: skip
def test_the_environment_says_which_share(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], given: Any, wanted: tuple[int, int]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Share.found(*given) == Share(*wanted)


@pytest.mark.parametrize(
    ("environment", "given", "why"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, (None, None), "this is process 3, and nothing says of how many"),
        ({}, (None, 2), "there are 2 processes, and nothing says which"),
        ({}, (2, 2), "ranks of 2 processes are 0 to 1, got 2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, (None, None), "RANK='first'"),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3"}, (None, None), "got 7"),
    ],
)
def test_a_share_that_nobody_can_tell(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], given: Any, why: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=why):
        Share.found(*given)


# --- what fails


def with_(config: Config, **changed: Any) -> Config:
    return Config.of({**copy.deepcopy(config.model_dump(mode="json")), **changed})


def test_one_bad_picture_is_a_row_and_the_rest_goes_on(made: tuple[Config, Any], tmp_path: Path) -> None:
    config = Config.of(small.config(small.pictures(tmp_path / "d", 5)))
    bad = tmp_path / "d" / "images" / "owl" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    found = rows(evaluate(config, tmp_path / "out"))
    failed = [r for r in found if r["error"]]
    assert {r["image"] for r in failed} == {"owl/2.png"}
    assert all("cannot read" in r["error"] and r["value"] is None for r in failed)
    assert len(failed) == len({(r["method"], r["metric"]) for r in found})
    assert {r["image"] for r in found if not r["error"]} == {r["image"] for r in made[1].to_pylist()} - {
        "owl/2.png"
    }
    before = files(tmp_path / "out")
    bad.write_bytes(good)  # another content has another key: no --retry is needed
    assert not [r for r in rows(evaluate(config, tmp_path / "out")) if r["error"]]
    assert len(files(tmp_path / "out").items() & before.items()) == len(before)


def test_a_failing_method_is_rows_and_the_rest_goes_on(made: tuple[Config, Any], tmp_path: Path) -> None:
    config = with_(made[0], methods=["rollout", "random"])  # it has no attention
    found = rows(evaluate(config, tmp_path))
    assert {(r["method"], bool(r["error"])) for r in found} == {("rollout", True), ("random", False)}
    assert len([r for r in found if r["error"]]) == 5 * 2


FAILURES = [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), KeyError("x"), InputError("no such")
]  # fmt: skip


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_any_failure_is_recorded_and_tried_again_if_asked(
    made: tuple[Config, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    attribute, calls = measures.attribute, []

    def fails(*args: Any, method: str, **more: Any) -> Any:
        calls.append(method)
        if method == "random" and broken:
            raise error
        return attribute(*args, method=method, **more)

    monkeypatch.setattr(measures, "attribute", fails)
    broken = [True]
    told: dict[str, Any] = {}
    found = rows(evaluate(made[0], tmp_path, seen=lambda unit, why: told.update({unit.key: why})))
    assert {r["method"] for r in found if r["error"]} == {"random"}
    assert {r["method"] for r in found if not r["error"]} == {"input_x_gradient"}
    assert {type(error).__name__ in r["error"] for r in found if r["error"]} == {True}
    assert sum(bool(why) for why in told.values()) == len(told) // 2
    before = files(tmp_path)
    calls.clear()
    evaluate(made[0], tmp_path)
    assert calls == []
    broken.clear()
    assert read(evaluate(made[0], tmp_path, retry=True)).equals(made[1])
    assert {*calls} == {"random"}
    assert len(files(tmp_path).items() & before.items()) == len(before) // 2


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(), ImportError("no module"), torch.AcceleratorError("lost", 1)],
    ids=lambda e: type(e).__name__,
)
def test_what_is_no_result_stops_the_run(
    made: tuple[Config, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*args: Any, **more: Any) -> Any:
        raise error

    monkeypatch.setattr(measures, "attribute", fails)
    with pytest.raises(type(error)):
        evaluate(made[0], tmp_path)
    assert files(tmp_path) == {}


def test_an_extra_that_is_not_installed_stops_the_run(
    made: tuple[Config, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **more: Any) -> Any:
        return need("no_such_library", "evaluate")

    monkeypatch.setattr(measures, "attribute", fails)
    with pytest.raises(LibraGradError, match="pip install"):
        evaluate(made[0], tmp_path)


def test_samples_without_a_label_or_mask_have_no_rows(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "d" / f"{i}.png", picture(i, (24, 24)))
    asked = {"completeness": {"targets": ["predicted", "label"]}, "places": {}}
    config = Config.of(small.config(tmp_path / "d", metrics=asked))
    found = rows(evaluate(config, tmp_path / "out"))
    assert {(r["method"], r["metric"], r["target"]) for r in found} == {
        ("input_x_gradient", "completeness", "predicted")
    }
    assert {r["label"] for r in found} == {None}


def test_a_label_that_the_model_does_not_have(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path / "d" / f"class{i}" / "x.png", picture(i, (24, 24)))
    asked = {"completeness": {"targets": ["label"]}}
    asked = small.config(tmp_path / "d", metrics=asked, methods=["input_x_gradient"], batch=4, chunk=4)
    config = Config.of(asked)
    found = rows(evaluate(config, tmp_path / "out"))
    said = {r["image"]: r["error"] for r in found}
    assert {n: e for n, e in said.items() if e} == {
        "class3/x.png": "class 3 of a model of 3", "class4/x.png": "class 4 of a model of 3"
    }  # fmt: skip
    assert len(said) == 5


@pytest.mark.slow
def test_pictures_of_several_sizes_are_in_batches_of_their_own(tmp_path: Path) -> None:
    sizes = [(24, 24), (32, 24), (24, 24), (32, 24)]
    for i, size in enumerate(sizes):
        put(tmp_path / "d" / "a" / f"{i}.png", picture(i, size))
    model = {"load": "tests.evaluate.test_runner:pool", "steps": "tests.evaluate.small:steps"}
    asked = small.config(tmp_path / "d", models={"m": model}, metrics={"completeness": {}}, chunk=4)
    config = Config.of(asked)
    cases = runner._Batches(Bench(config), "m", "animals", 0).cases
    assert sorted(tuple(case.inputs.shape) for case in cases) == [(2, 3, 24, 24), (2, 3, 24, 32)]
    found = rows(evaluate(config, tmp_path / "out"))
    assert {r["error"] for r in found} == {None}
    assert {r["image"] for r in found} == {f"a/{i}.png" for i in range(4)}


def pool() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(4, 3))


def test_a_number_that_is_not_defined_is_null(made: tuple[Config, Any], tmp_path: Path) -> None:
    config = with_(made[0], models={"m": {**small.MIXER, "load": "tests.evaluate.test_runner:still"}},
                   metrics={"places": {}}, methods=["input_x_gradient"])  # fmt: skip
    found = rows(evaluate(config, tmp_path))
    assert {r["value"] for r in found if r["measure"] == "mass"} == {None}
    assert {r["error"] for r in found} == {None}
    assert not any(np.isnan(r["value"]) for r in found if r["value"] is not None)
    assert Store(tmp_path).counted()[0] < len(found)


def still() -> torch.nn.Module:
    """Its answer does not depend on its input: maps are zero."""
    model = pool()
    with torch.no_grad():
        model[-1].weight.zero_()
    return model


def test_a_model_or_a_set_that_is_not_there_is_said_before_any_work(
    made: tuple[Config, Any], tmp_path: Path
) -> None:
    found = {**made[0].model_dump(mode="json")["models"], "gone": {"load": "no.such:model"}}
    with pytest.raises(InputError, match=r"cannot import no\.such:model"):
        evaluate(with_(made[0], models=found), tmp_path)
    with pytest.raises(InputError, match="there is no"):
        evaluate(with_(made[0], data={"d": {"load": f"folder:{tmp_path / 'gone'}"}}), tmp_path)
    with pytest.raises(InputError, match="no device"):
        evaluate(with_(made[0], device="cuda:99"), tmp_path)
    assert files(tmp_path) == {}


def test_a_folder_that_cannot_be_written(made: tuple[Config, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        evaluate(made[0], tmp_path / "out")


