"""A sample of the coverage sweep, one model a mechanism, and the machinery that runs it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from typer.testing import CliRunner

from libragrad_fx import coverage as cover
from libragrad_fx.cli import app
from libragrad_fx.coverage import runner
from libragrad_fx.coverage.check import generic
from libragrad_fx.coverage.suites import build
from libragrad_fx.coverage.unfilled import unfilled
from libragrad_fx.errors import InputError
from zoo import SAMPLE

SLOW = {  # the slowest
    "mamba", "rwkv", "deberta-v2", "test_nfnet", "shufflenet_v2_x0_5", "gpt-oss", "swin", "t5", "wav2vec2",
    "bert", "llama",
}  # fmt: skip


@pytest.mark.parametrize(
    ("suite", "name"),
    [pytest.param(*k, marks=pytest.mark.slow if k[1] in SLOW else ()) for k in SAMPLE],
    ids=lambda v: v,
)
def test_sample(suite: str, name: str) -> None:
    result = cover.check(suite, name, "sample", False, lambda: build(suite, name))
    assert result.verdict == "balanced", result
    assert result.forward_equal
    assert abs(result.input_share or 0) > 0
    assert (result.edits or 0) > 0 or suite == "torchvision"


def test_static_check_needs_no_weights() -> None:
    before = psutil.Process().memory_info().rss
    with unfilled():
        torch.nn.Linear(40_000, 40_000)  # 6.4 GB if it were written
        small = torch.nn.Linear(4, 4)
        assert psutil.Process().memory_info().rss - before < 1e9
    assert float(small.weight.detach().abs().sum()) > 0
    result = cover.check(
        "timm-all", "test_vit", "sample", True, lambda: build("timm-all", "test_vit", False)
    )
    assert result.verdict == "balanced", result
    assert result.how == "static"


def test_generic_weights_let_the_signal_through() -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    ).eval()
    torch.nn.init.zeros_(model[2].weight)
    x = torch.randn(8, 4) * 1e3
    generic(model, x)
    assert not model.training
    assert not model[1].training
    assert model[1].momentum == 0.1
    assert model[2].weight.detach().abs().min() > 0
    inner = model[1].bias + model[1].weight
    assert inner.detach().unique().numel() > 1
    assert 0.1 < float(model[:2](x).detach().std()) < 10


def _subject(name: str) -> Any:
    if name == "crashes":
        import os

        os._exit(7)
    if name == "sleeps":
        time.sleep(60)
    if name == "eats":
        kept = torch.ones(1 << 30)  # 4 GiB
        time.sleep(200)
        del kept
    if name == "raises":
        raise ValueError("no such\nmodel")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()).eval()
    return cover.Subject(name, model, (torch.randn(2, 4),), lambda y: y[:, 0])


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A suite of failures, run by fork so that the workers know it."""
    names = dict.fromkeys(("fine", "raises", "crashes", "sleeps", "eats"), "toys")
    suite = cover.Suite(lambda: names, _subject, "torch", "models that fail")
    monkeypatch.setitem(cover.SUITES, "timm", suite)  # type: ignore[arg-type]
    monkeypatch.setattr(runner, "_START", "fork")
    return names


def test_every_end_is_a_row(toys: dict[str, str], tmp_path: Path) -> None:
    file, seen = tmp_path / "toys.jsonl", []
    short = {n: toys.pop(n) for n in ("sleeps",)}
    for names, seconds in ((toys, 120.0), (short, 1.0)):
        here = psutil.Process().memory_info().rss / 2**30  # a fork starts with what is here
        limits = cover.Limits(seconds, gib=here + 1.5)
        cover.run("timm", names, static=True, file=file, jobs=2, limits=limits, seen=seen.append)
    found = {r.name: r for r in cover.read(file)}
    assert {r.name for r in seen} == set(found) == {*toys, *short}
    verdicts = {n: r.verdict for n, r in found.items()}
    assert verdicts == {
        "fine": "balanced", "raises": "failed", "crashes": "crashed", "sleeps": "timeout",
        "eats": "memory",
    }  # fmt: skip
    assert found["raises"].reason.startswith("ValueError: no such")
    assert "code 7" in found["crashes"].reason
    page = cover.render(found.values())
    assert "| timm |" in page
    assert "not done in 1 s" in page
    assert "no such model" in page


def test_results_are_read_back_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    assert list(cover.read(file)) == []
    rows = [cover.Result("timm", "a", "f", "static", v) for v in ("failed", "balanced")]
    file.write_text("".join(json.dumps(dataclasses.asdict(r)) + "\n" for r in rows))
    assert [r.verdict for r in cover.read(file)] == ["balanced"]  # the last of a name counts
    file.write_text(file.read_text() + '{"suite": "ti')  # stopped while it wrote
    assert len(list(cover.read(file))) == 1
    assert file.read_text().endswith("}\n")
    for bad in ("{", "[]", '{"name": "a"}'):
        file.write_text(bad + "\n")
        with pytest.raises(InputError, match=r"r\.jsonl:1 is no coverage result"):
            list(cover.read(file))


def test_a_suite_that_cannot_be_listed_keeps_its_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "zoo", None)  # as where there is no such folder
    monkeypatch.delitem(sys.modules, "zoo.huggingface", raising=False)
    file = tmp_path / "hf.jsonl"
    file.write_text("{}\n")
    options = ["--suite", "hf", "--no-resume", "--results", str(tmp_path)]
    result = CliRunner().invoke(app, ["coverage", *options])
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "zoo/huggingface.py" in said
    assert "in a checkout" in said
    assert file.read_text() == "{}\n"


def test_a_filter_that_fits_nothing_keeps_the_results(tmp_path: Path) -> None:
    file = tmp_path / "timm.jsonl"
    file.write_text("{}\n")
    options = ["--suite", "timm", "--filter", "no_such_*", "--no-resume", "--results", str(tmp_path)]
    result = CliRunner().invoke(app, ["coverage", *options])
    assert result.exit_code == 2
    assert "matches" in result.output
    assert file.read_text() == "{}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to do"),
        (["--suite", "timm", "--filter", "no_such_*"], "matches"),
        (["--report", "x.md"], "no results"),
    ],
)
def test_command_line_answers(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["coverage", "--results", str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())
