"""The gradient graph says what the ledger says, from near and from far; and it can be drawn."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import libragrad_fx as lg
from libragrad_fx.cli import app
from libragrad_fx.errors import InputError
from libragrad_fx.viz.draw import modules, to_dot, tree
from libragrad_fx.viz.flow import bottlenecks, imbalance
from libragrad_fx.viz.graph import SIDES, _runs, around, collapse
from libragrad_fx.viz.write import write
from tests.between import fast_first

F64 = torch.float64
NEEDS_DOT = pytest.mark.skipif(
    shutil.which("dot") is None, reason="Graphviz (dot) is not installed"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def network() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    parts = [nn.Linear(4, 6), nn.Sequential(*(Block() for _ in range(6))), nn.Linear(6, 3)]
    return nn.Sequential(*parts).to(F64).eval(), torch.randn(2, 4, dtype=F64)


@pytest.fixture(scope="module")
def drawn() -> tuple[nn.Module, torch.Tensor, nx.DiGraph]:
    model, x = network()
    return model, x, lg.gradient_graph(model, x, 1)


def test_every_number_is_the_ledgers(drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph]) -> None:
    model, x, graph = drawn
    for side, account in (
        ("plain", lg.audit(model, x, 1)),
        ("balanced", lg.audit(lg.transform(model, x), x, 1)),
    ):
        assert graph.graph["output"][side] == account.output
        rows = {r.node: r for r in account.rows}
        assert {n for n, d in graph.nodes(data=True) if d[side] is not None} == set(rows)
        for node, row in rows.items():
            assert graph.nodes[node][side]["residual"] == row.residual
            flows = {a: d[side] for a, _, d in graph.in_edges(node, data=True)}
            masses = {f.producer: f.mass for f in row.flows}
            assert {k: v for k, v in flows.items() if v is not None} == masses
            assert sum(masses.values()) == pytest.approx(row.streams + row.sources)
            for flow in row.flows:
                assert graph.edges[flow.producer, node][f"{side}_norm"] == flow.norm


def test_only_the_plain_side_is_out_of_balance(
    drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph],
) -> None:
    assert imbalance(drawn[2], "plain") > 0.01
    assert imbalance(drawn[2], "balanced") < 1e-12


def test_a_pruned_edge_is_one_that_autograd_alone_has() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(2 * x)

    x = torch.randn(2, 3, dtype=F64)
    graph = lg.gradient_graph(Gate(), x, 0)
    pruned = [(a, b) for a, b, d in graph.edges(data=True) if d["balanced"] is None]
    assert ("sigmoid", "mul_1") in pruned
    assert all(graph.edges[e]["plain"] is not None for e in pruned)
    assert graph.nodes["mul_1"]["action"] == "stop"


def test_from_afar_sums_are_kept(drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph]) -> None:
    _, _, graph = drawn
    for far in (
        collapse(graph, 1),
        collapse(graph, 2),
        collapse(graph, 9),
        collapse(graph, 1, "1.3"),
    ):
        assert sum(d["ops"] for _, d in far.nodes(data=True)) == len(graph)
        for side in SIDES:
            assert imbalance(far, side) == pytest.approx(imbalance(graph, side), abs=1e-12)
        assert nx.is_directed_acyclic_graph(far)


def test_repeats_are_one_node_and_a_focus_is_open(
    drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph],
) -> None:
    _, _, graph = drawn
    assert "1.1 … 4 (× 4)" in collapse(graph, 2)
    far = collapse(graph, 1, "1.3")
    assert {"1.0", "1.1", "1.2", "1.4", "1.5", "silu_3", "linear", "linear_13"} <= set(far)
    assert "silu_2" not in far
    assert far.nodes["linear"]["title"] == "0 · linear"


def test_a_module_called_like_an_op_is_another_node() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Sequential(nn.Linear(4, 4), nn.GELU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).mean(1, keepdim=True)

    graph = lg.gradient_graph(Model().to(F64), torch.randn(2, 4, dtype=F64), 0)
    assert "linear" in graph
    far = collapse(graph)
    assert set(far) == {"guard", "linear (module)", "mean", "output"}
    assert far.nodes["linear (module)"]["ops"] == 2
    assert {"linear", "gelu"} <= set(collapse(graph, focus="linear"))


def test_repeats_may_alternate() -> None:
    """Windows that are shifted and not, by turns; a gap in the numbers ends a row."""
    even, odd = {"add": 1}, {"roll": 2}
    row = {f"b.{i}": (even, odd)[i % 2] for i in range(8)}
    middle = [f"b.{i}" for i in range(2, 6)]
    assert _runs(row) == dict.fromkeys(middle, "b.2 … 5 (× 4)")
    assert _runs({f"b.{i}": even for i in (0, 1, 2, 4, 5, 6)}) == {}
    assert _runs({f"b.{i}": {"add": i} for i in range(9)}) == {}


def test_bottlenecks_are_what_every_path_goes_through() -> None:
    """A residual network: its sums and what is outside of the branches, not the branches."""
    model, x = network()
    found = bottlenecks(lg.gradient_graph(model, x, 0))
    assert [n for n in found if n.startswith("add")] == [f"add_{i}" for i in range(5, 0, -1)] + [
        "add"
    ]
    assert not any(n.startswith(("silu", "layer_norm")) for n in found)
    assert found[0] == "linear_13"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_draws_the_same(again) -> None:  # type: ignore[no-untyped-def]
    model, x = network()
    gm = lg.transform(model, x)
    a, b = lg.gradient_graph(gm, x, 0), lg.gradient_graph(again(gm), x, 0)
    assert [*a.edges(data=True)] == [*b.edges(data=True)]


def test_depth_tells_names_apart(drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph]) -> None:
    """1, 1.0, then the ops of 1.0. What lies between equal modules in a row stays one node."""
    _, _, graph = drawn
    assert "1" in collapse(graph, 1)
    assert {"1.0", "1.5"} <= set(collapse(graph, 2))
    assert set(collapse(graph, 3)) == set(collapse(graph, 2))
    assert set(collapse(graph, 4)) == set(collapse(graph, 9))
    assert {"layer_norm", "silu", "1.1 … 4 (× 4)"} <= set(collapse(graph, 4))
    assert "silu_2" not in collapse(graph, 9)


def test_a_focus_is_drawn_with_what_is_next_to_it(
    drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph], tmp_path: Path
) -> None:
    _, _, graph = drawn
    near = around(graph, focus="1.3")
    inside = {n for n, d in graph.nodes(data=True) if d["module"].startswith("1.3")}
    assert inside < set(near)
    assert {near.nodes[n]["title"] for n in set(near) - inside} == {"1.2", "1.4"}
    assert write(graph, tmp_path / "g.dot", focus="1.3").read_text() == to_dot(near, "1.3").source
    assert set(around(graph)) == set(collapse(graph))


def test_an_edit_scales_the_edges_of_its_operands_alone() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.baddbmm(self.q(x), self.k(x), x.transpose(1, 2) @ x).mean((1, 2))

    graph = lg.gradient_graph(Sum().to(F64), torch.randn(2, 4, 4, dtype=F64))
    assert graph.nodes["baddbmm"]["operands"] == "batch1, batch2"
    scales = {
        graph.nodes[a]["title"]: d["scale"] for a, _, d in graph.in_edges("baddbmm", data=True)
    }
    assert scales == {"q · linear": 1.0, "k · linear": 0.5, "matmul": 0.5}
    for a, b, d in graph.in_edges("baddbmm", data=True):
        assert d["balanced_norm"] == pytest.approx(d["scale"] * d["plain_norm"]), (a, b)


def test_what_no_gradient_reaches_is_not_drawn() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.logits, self.other = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.body(x)
            return {"logits": self.logits(y), "other": self.other(y)}

    graph = lg.gradient_graph(Two().to(F64), torch.randn(2, 4, dtype=F64), 0)
    assert {d["module"] for _, d in graph.nodes(data=True)} == {"", "body", "logits"}


def test_an_embedding_is_drawn_where_it_is() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.head = nn.Embedding(9, 4), nn.Linear(4, 1)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.wte(ids)).mean((1, 2))

    graph = lg.gradient_graph(Words().to(F64), torch.randint(9, (2, 3)))
    (data,) = (d for _, d in graph.nodes(data=True) if d["module"] == "wte")
    assert data["op"] == "aten.embedding.default"
    assert "test_graph.py" in data["source"]


def test_json_and_dot_hold_every_node(
    drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph], tmp_path: Path
) -> None:
    _, _, graph = drawn
    body = json.loads(write(graph, tmp_path / "g.json").read_text())
    again = nx.node_link_graph(body, edges="edges")
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    far = collapse(graph, 9)
    assert write(graph, tmp_path / "g.dot", depth=9).read_text() == to_dot(far).source
    assert to_dot(far).source.count("->") == far.number_of_edges()


@pytest.mark.parametrize("name", ["g.html", "g.svg", "g.dot", "g.json", "me.json", "s.svg"])
def test_what_is_not_finite_is_said(name: str, tmp_path: Path) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sqrt(self.a(x) * 0).sum(1) + self.a(x).sum(1)

    view = {"m": "model-explorer", "s": "streams"}.get(name[0], "graph")
    graph = lg.gradient_graph(Root().to(F64), torch.randn(2, 4, dtype=F64))
    with pytest.raises(InputError, match="not finite"):
        write(graph, tmp_path / name, view)
    assert not [*tmp_path.iterdir()]


def test_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "g.html").mkdir()
    model, x = network()
    with pytest.raises(InputError, match=r"cannot write .* is a folder"):
        lg.visualize(model, tmp_path / "g.html", x, 0)


@NEEDS_DOT
@pytest.mark.parametrize("ending", fast_first(["svg", "png", "pdf"], 1))
def test_pictures(ending: str, tmp_path: Path) -> None:
    model, x = network()
    path = lg.visualize(model, tmp_path / f"g.{ending}", x, 0)
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network()
    gm = lg.transform(model, x)
    with pytest.raises(InputError, match=r"one of \.html, \.svg"):
        lg.visualize(gm, tmp_path / "g.bmp", x, 0)
    with pytest.raises(InputError, match="view is one of"):
        lg.visualize(gm, tmp_path / "g.svg", x, 0, view="tree")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"one of \.svg, \.png, \.pdf$"):
        lg.visualize(gm, tmp_path / "g.html", x, 0, view="streams")
    with pytest.raises(InputError, match="no op of a module 'nowhere'"):
        lg.visualize(gm, tmp_path / "g.dot", x, 0, focus="nowhere")
    with pytest.raises(InputError, match="depth is at least 1"):
        lg.visualize(gm, tmp_path / "g.dot", x, 0, depth=0)
    with pytest.raises(InputError, match="pass inputs"):
        lg.visualize(gm, tmp_path / "g.dot")
    with pytest.raises(InputError, match="what transform returned"):
        lg.gradient_graph(lg.trace(model, x), x, 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="'dot' is not installed"):
        lg.visualize(gm, tmp_path / "g.svg", x, 0)
    assert not list(tmp_path.iterdir())


def test_in_a_terminal(drawn: tuple[nn.Module, torch.Tensor, nx.DiGraph]) -> None:
    """Parents before children, in the order of the graph; a parent's row is the sum of its own."""
    lines = tree(modules(drawn[2], 2)).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["(model)", "0", "1", *"012345", "2"]
    assert lines[2].split()[1] == str(6 * 5)


def test_on_the_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke
    made = run(app, ["graph", "tests.viz.test_graph:only", "-o", str(tmp_path / "g.dot")])
    assert made.exit_code == 0, made.output
    assert (tmp_path / "g.dot").read_text().startswith("digraph")
    printed = run(app, ["graph", "tests.viz.test_graph:only"])
    assert "left when balanced" in printed.output
    streams = run(app, ["graph", "tests.viz.test_graph:only", "--view", "streams"])
    assert "to biases so far" in streams.output
    refused = run(app, ["graph", "tests.viz.test_graph:only", "-o", str(tmp_path / "g.bmp")])
    assert refused.exit_code == 2


def only() -> nn.Module:
    return network()[0].float()


def test_what_is_known_of_nodes_and_edges() -> None:
    """y = a * b of two signals, gated: roles, kinds, the half that each factor gets, and ‖g‖."""

    class Product(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a * b * torch.sigmoid(a + 1)

    a, b = torch.randn(2, 1, 4, dtype=F64).unbind()
    graph = lg.gradient_graph(Product(), (a, b), lambda y: y.sum())
    (both,) = [n for n, d in graph.nodes(data=True) if d["action"] == "scale"]
    assert graph.nodes[both]["kind"] == "product"
    assert graph.nodes["sigmoid"]["role"] == "gate"
    gate = torch.sigmoid(a + 1)
    norms = {d["balanced_norm"] for *_, d in graph.in_edges(both, data=True)}
    halves = {float((0.5 * factor * gate).norm()) for factor in (a, b)}
    assert sorted(norms) == pytest.approx(sorted(halves))
    assert {d["scale"] for *_, d in graph.in_edges(both, data=True)} == {0.5}
    assert {d["role"] for *_, d in graph.in_edges(both, data=True)} == {"value"}
