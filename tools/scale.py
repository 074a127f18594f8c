"""Measures the runner at scale, and writes docs/scale.md.

    python tools/scale.py -o out/scale

One evaluation of 1,000 scenes is run five times: undisturbed; killed by SIGKILL three times and started
again; by two processes; by two workers of Ray; and by one process a second time, when all is done. All
must have the same content. What each took is written down, and what ImageNet would cost at that pace.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as parquet
import yaml
from pages import refill, table

from libragrad_fx.evaluate.store import RESULTS, RUNS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/scale.md"
IMAGENET = 50_000  # pictures of its validation set
H100 = {"float32": (121e-3, 0.46), "bfloat16": (17.4e-3, 0.40)}
"""Measured on one H100 80 GB, torch 2.11, ViT-B/16 at 224 pixels, batches of 64: seconds of a forward and
backward, and the forward's share of it."""
TOKENS, PIXELS = 9, 10
"""Forwards that a map costs: nine shares of tokens by two orders, half the tokens on average; and five
shares of pixels by two orders."""
METHODS = {"one method": 1, "18 methods, of which two take 10 steps": 18 + 2 * 9}
CONFIG = {
    "models": {"vit": {
        "load": "zoo.trained:load", "args": {"name": "vit_base", "seed": 0}, "steps": "zoo.sets:steps",
        "family": "ViT",
    }},
    "data": {"scenes": {"load": "zoo.sets:scenes", "args": {"split": "test"}, "count": 1000, "seed": 43}},
    "policies": ["autograd", "libra"],
    "methods": ["fullgrad_plus"],
    "metrics": {"tokens": {}, "places": {}},
    "batch": 50, "chunk": 50, "threads": 1,
}  # fmt: skip


def started(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "libragrad_fx", "evaluate", str(config), "-o", str(out), *options]
    said = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=said, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(*runs: subprocess.Popen[str]) -> None:
    for run in runs:
        said, _ = run.communicate()
        if run.returncode:
            raise SystemExit(f"{' '.join(map(str, run.args))} failed:\n{said}")


def parts(out: Path) -> int:
    return sum(1 for _ in out.glob("parts/*/*/*.parquet"))


def killed(config: Path, out: Path) -> int:
    """Three processes one after another, each killed at a moment that is drawn. Returns the parts left."""
    random.seed(0)
    for _ in range(3):
        run, wanted = started(config, out), parts(out) + random.randint(5, 20)
        while parts(out) < wanted:
            time.sleep(0.01)
            if run.poll() is not None:
                raise SystemExit(f"a run ended before it was killed:\n{run.communicate()[0]}")
        time.sleep(random.uniform(0, 1))
        run.send_signal(signal.SIGKILL)
        run.communicate()
    return parts(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "out/scale")
    out: Path = parser.parse_args().output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = out / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    took, left = dict[str, float](), 0

    def timed(name: str, folder: str, *ways: tuple[str, ...]) -> None:
        start = time.monotonic()
        ended(*(started(config, out / folder, *options) for options in ways))
        took[name] = time.monotonic() - start
        print(f"{name}: {took[name]:.0f} s", flush=True)

    timed("one process", "one", ())
    timed("one process, all done before", "one", ())
    left = killed(config, out / "killed")
    timed("one process, after three kills", "killed", ())
    timed("two processes", "two", ("--rank", "0", "--world", "2"), ("--rank", "1", "--world", "2"))
    if not (out / "two" / RESULTS).is_file():  # both ended at once, and neither saw the other's last part
        ended(started(config, out / "two"))
    timed("two workers of Ray", "ray", ("--engine", "ray", "--workers", "2"))
    tables = {n: parquet.read_table(out / n / RESULTS) for n in ("one", "killed", "two", "ray")}
    if wrong := [n for n, t in tables.items() if not t.equals(tables["one"])]:
        raise SystemExit(f"not the same content: {', '.join(wrong)}")
    runs = parquet.read_table(out / "one" / RUNS)
    written(took, left, runs.num_rows, tables["one"].num_rows, sum(runs["seconds"].to_pylist()))


def written(took: dict[str, float], left: int, units: int, numbers: int, busy: float) -> None:
    count, ways = CONFIG["data"]["scenes"]["count"], len(CONFIG["methods"]) * len(CONFIG["policies"])
    rows = []
    for name, s in took.items():
        whole = "done" not in name and "kills" not in name
        rows.append([name, f"{s:.0f}", *(f"{n / s:.2f}" if whole else "–" for n in (count, count * ways))])
    pace = table(["run", "seconds", "images a second", "maps scored a second"], rows)
    each = busy / count
    refill(PAGE, {
        "scale.config": f"```yaml\n{yaml.safe_dump(CONFIG, sort_keys=False)}```",
        "scale.pace": f"{pace}\n\nThe killed runs left {left} of {units} parts. All four results hold the"
        f" same {numbers:,} rows, in the same order.",
        "scale.cost": f"Here, a scene took {1000 * each:.0f} ms of one core, with {ways} maps."
        f" {IMAGENET:,} such pictures would take {IMAGENET * each / 3600:.1f} hours of one"
        f" core.\n\n{gpus()}",
    })  # fmt: skip


def gpus() -> str:
    """Not measured: what the parts that were measured add up to."""
    rows = []
    for dtype, (both, share) in H100.items():
        for name, runs in METHODS.items():
            maps, scored = runs * both / 64, min(runs, 18) * (TOKENS + PIXELS) * both * share / 64
            hours = 2 * IMAGENET * (maps + scored) / 3600
            rows.append([dtype, name, f"{hours:.1f}", f"{hours / 8:.2f}"])
    said = table(["dtype", "of ViT-B/16, under two policies", "hours on one H100", "on eight"], rows)
    return (
        "Extrapolated, of a forward and a backward that were measured on one H100: what tokens, pixels and"
        " maps cost there. Reading and decoding pictures is left out, and so is what the runner adds. On"
        f" eight GPUs each has an eighth of the pictures: shards share nothing.\n\n{said}"
    )


if __name__ == "__main__":
    main()
