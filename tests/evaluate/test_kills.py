"""Processes that are killed at any moment, and started again, write what one process writes undisturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
import yaml

from libragrad_fx.evaluate import Config, cluster
from libragrad_fx.evaluate.store import RESULTS
from tests.evaluate import small
from tests.evaluate.test_runner import files

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def started(file: Path, out: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """``libragrad evaluate`` in a process of its own."""
    command = [sys.executable, "-m", "libragrad_fx", "evaluate", str(file), "-o", str(out), *options]
    said = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, cwd=ROOT, env=said, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def killed(process: subprocess.Popen[str], out: Path, more: int) -> None:
    """SIGKILL, once ``more`` parts are written, and a moment later drawn by the caller's seed."""
    before = len(files(out))
    while len(files(out)) < before + more and process.poll() is None:
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any]]:
    """A config file, the results of one undisturbed process, and how often each part was written."""
    root = tmp_path_factory.mktemp("made")
    models = {"vit": small.VIT, "net": small.NET}
    config = small.config(small.pictures(root / "d", 8), models=models)
    config["metrics"] = {"tokens": {"ratios": [0.3, 0.6]}, "places": {}, "completeness": {}}
    file = root / "c.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    said = ended(started(file, root / "out"))
    table = parquet.read_table(root / "out" / RESULTS)
    assert f"{table.num_rows - table['value'].null_count} numbers" in said
    return file, table, config


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_three_times(made: Any, tmp_path: Path, seed: int) -> None:
    file, wanted, _ = made
    random.seed(seed)
    before: dict[str, Any] = {}
    for _ in range(3):
        killed(started(file, tmp_path), tmp_path, random.randint(1, 6))
        assert not (tmp_path / RESULTS).exists()
        assert before.items() <= files(tmp_path).items()
        before = files(tmp_path)
    ended(started(file, tmp_path))
    assert parquet.read_table(tmp_path / RESULTS).equals(wanted)
    assert before.items() <= files(tmp_path).items()


RANKS = [
    [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}],
    [{"SLURM_ARRAY_TASK_ID": i, "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "2"} for i in "45"],
    [{"JOB_COMPLETION_INDEX": "0"}, {"JOB_COMPLETION_INDEX": "1"}],
    [{}, {}],
]


@pytest.mark.parametrize("ranks", RANKS, ids=["torchrun", "slurm", "kubernetes", "options"])
def test_two_processes_one_of_which_dies(made: Any, tmp_path: Path, ranks: list[dict[str, str]]) -> None:
    file, wanted, _ = made
    random.seed(0)
    options = [["--rank", str(i)] if not said else [] for i, said in enumerate(ranks)]
    world = ["--world", "2"] if "RANK" not in ranks[0] else []
    runs = [
        started(file, tmp_path, *given, *world, **said)
        for given, said in zip(options, ranks, strict=True)
    ]  # fmt: skip
    killed(runs[1], tmp_path, 3)
    assert "others have work left" in ended(runs[0])
    before = files(tmp_path)
    assert "wrote" in ended(started(file, tmp_path, *options[1], *world, **ranks[1]))
    assert parquet.read_table(tmp_path / RESULTS).equals(wanted)
    assert before.items() <= files(tmp_path).items()


def test_ray_starts_a_worker_again_that_died(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.data", reason="ray[data] is not installed")
    _, wanted, config = made
    pids, out, told = tmp_path / "pids", tmp_path / "out", set[str]()
    pids.mkdir()
    monkeypatch.setenv("PIDS", str(pids))
    models = {n: {**m, "steps": f"{__name__}:noting"} for n, m in config["models"].items()}

    def kill() -> None:
        while len(files(out)) < 3:
            time.sleep(0.01)
        (pid, *_) = {int(p.name) for p in pids.iterdir()} - {os.getpid()}
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    asked = Config.of({**config, "models": models})
    done = cluster.evaluate(asked, out, workers=2, seen=lambda unit, why: told.update(why))
    killer.join(1)
    assert not killer.is_alive()
    assert len({p.name for p in pids.iterdir()} - {str(os.getpid())}) == 3, "two workers, and one again"
    assert done is not None
    found, kept = (t.drop_columns(["run"]) for t in (parquet.read_table(done), wanted))
    assert found.equals(kept)
    assert told == {*found["error"].drop_null().to_pylist()}


def noting(image: Any) -> Any:
    """``fitted``; writes down in which process it runs."""
    (Path(os.environ["PIDS"]) / str(os.getpid())).touch()
    return small.fitted(image)
