"""Questions to a gradient graph: against closed forms, and on models of other shapes than a ViT's."""

from __future__ import annotations

import itertools
import re
import socket
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.errors import InputError
from libragrad_fx.viz.flow import BRANCH, RESIDUAL, streams, strongest_paths
from libragrad_fx.viz.graph import SIDES
from libragrad_fx.viz.model_explorer import overlay, to_model_explorer
from libragrad_fx.viz.strip import _BRANCHES, _gathered, streams_table
from tests.between import fast_first
from tests.viz.test_explorer import CHROMIUM, needs_browser, playwright
from tests.viz.test_graph import network

F64 = torch.float64


class Parallel(nn.Module):
    """Mixing and MLP side by side, their sum in one expression; then a sum without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        x = x + self.mix(y.transpose(1, 2)).transpose(1, 2) + self.mlp(y)
        return (x + torch.tanh(x) * 0.5).mean(1)


def graph_of(model: nn.Module, x: torch.Tensor, target: int = 0) -> nx.DiGraph:
    return lg.gradient_graph(model.to(F64).eval(), x.to(F64), target)


@pytest.fixture(scope="module")
def residual() -> nx.DiGraph:
    model, x = network()
    return lg.gradient_graph(model, x, 1)


def test_the_shares_of_all_paths_sum_up_to_one() -> None:
    """Of x + 3 x, weights 1 and 3: a quarter goes one way, three quarters the other."""

    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.relu() + 3 * x.relu()

    graph = graph_of(Two(), torch.rand(1, 4) + 0.1)
    found = strongest_paths(graph)
    assert [share for share, _ in found] == pytest.approx([0.75, 0.25])
    assert [path[1:3] for _, path in found] == [["add", "mul"], ["add", "relu"]]


def test_paths_are_paths_strongest_first(residual: nx.DiGraph) -> None:
    found = strongest_paths(residual, 8)
    assert [share for share, _ in found] == sorted((s for s, _ in found), reverse=True)
    for share, path in found:
        assert path[0] == "output"
        assert residual.nodes[path[-1]]["op"].startswith("input")
        expected = 1.0
        for node, producer in itertools.pairwise(path):
            edges = residual.in_edges(node, data=True)
            total = sum(abs(d["balanced"]) for _, _, d in edges if d["balanced"] is not None)
            expected *= abs(residual.edges[producer, node]["balanced"]) / total
        assert share == pytest.approx(expected)
    every = strongest_paths(residual, 100)
    assert len(every) == 2**6
    assert sum(share for share, _ in every) == pytest.approx(1.0)


def test_every_join_has_the_whole_output(residual: nx.DiGraph) -> None:
    joins = streams(residual)
    assert [j.module for j in joins] == [f"1.{i}" for i in range(6)]
    for join in joins:
        assert set(join.masses["balanced"]) == {RESIDUAL, BRANCH}
        total = sum(join.masses["balanced"].values()) + join.gone["balanced"]
        assert total == pytest.approx(1.0, abs=1e-12)
    plain = [sum(j.masses["plain"].values()) + j.gone["plain"] for j in joins]
    assert max(abs(p - 1) for p in plain) > 1e-3


def test_branches_are_called_by_their_modules() -> None:
    graph = graph_of(Parallel(), torch.randn(2, 4, 6))
    first, second = streams(graph)
    assert set(first.masses["balanced"]) == {RESIDUAL, BRANCH, "mlp"}
    assert set(second.masses["balanced"]) == {RESIDUAL, BRANCH}
    for join in (first, second):
        total = sum(join.masses["balanced"].values()) + join.gone["balanced"]
        assert total == pytest.approx(1.0, abs=1e-12)
    table = streams_table([first, second])
    assert f"{100 * second.masses['balanced'][RESIDUAL]:.3g}" in table


@pytest.mark.parametrize("ending", fast_first(["svg", "png", "pdf"], 1))
def test_the_strip(ending: str, tmp_path: Path) -> None:
    model, x = network()
    path = lg.visualize(model, tmp_path / f"s.{ending}", x, 1, view="streams")
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


def test_a_chain_has_no_streams(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="no branches come together"):
        lg.visualize(nn.Linear(4, 3), tmp_path / "s.svg", x, 0, view="streams")


def test_model_explorers_format(residual: nx.DiGraph) -> None:
    (graph,) = to_model_explorer(residual)["graphs"]
    nodes = {n["id"]: n for n in graph["nodes"]}
    assert set(nodes) == set(residual)
    assert nodes["silu_2"]["namespace"] == "1/2"
    for node in residual:
        edges = {e["sourceNodeId"] for e in nodes[node]["incomingEdges"]}
        assert edges == set(residual.predecessors(node))
    for side in SIDES:
        (data,) = overlay(residual, side).values()
        for node, result in data["results"].items():
            row, unit = residual.nodes[node][side], abs(residual.graph["output"][side])
            expected = 100 * (row["created"] - row["lost"]) / unit
            assert result["value"] == pytest.approx(expected, rel=1e-5, abs=1e-300)


@needs_browser
@pytest.mark.slow
def test_the_real_model_explorer_opens_it(tmp_path: Path) -> None:
    pytest.importorskip("model_explorer", reason="needs: pip install ai-edge-model-explorer")
    model, x = network()
    path = lg.visualize(model, tmp_path / "g.json", x, 1, view="model-explorer")
    overlays = [str(path.with_suffix(f".{name}.json")) for name in ("autograd", "balanced")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-u", "-m", "model_explorer", str(path),
        f"--node_data_paths={','.join(overlays)}",
        "--no_open_in_browser", "--skip_health_check", "--host=127.0.0.1", f"--port={port}",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    try:
        assert server.stdout
        address = next(
            m[0] for line in server.stdout if (m := re.search(r"http://\S+data=\S+", line))
        )
        with playwright.sync_playwright() as p:
            flags = ["--no-sandbox", "--enable-unsafe-swiftshader"]
            browser = p.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_page(viewport={"width": 1400, "height": 900})
            page.goto(address)
            page.wait_for_selector("text=balanced: created (+) or lost (-)", timeout=60_000)
            text = page.inner_text("body")
            browser.close()
    finally:
        server.kill()
        server.wait()
    assert f"\n{len(lg.gradient_graph(model, x, 1))} nodes\n" in text
    assert "autograd: created (+) or lost (-)" in text


def test_more_branches_than_colours_are_gathered() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            for i in range(10):
                self.add_module(f"branch{i}", nn.Sequential(nn.Linear(4, 4), nn.GELU()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.up(x)
            parts = [m(h) for name, m in self.named_children() if name != "up"]
            return torch.cat(parts, 1).mean(1, keepdim=True)

    joins = streams(graph_of(Many(), torch.randn(2, 4)))
    (before,), (after,) = joins, _gathered(joins)
    assert len(before.masses["balanced"]) == 10
    assert len(after.masses["balanced"]) == len(_BRANCHES)
    for side in SIDES:
        assert sum(after.masses[side].values()) == pytest.approx(sum(before.masses[side].values()))
