"""Where attributions lie: tables, series, videos, voxels, windows, joined sequences, by the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from tests.attribution.once import captured
from tests.between import fast_first
from zoo.small import Recurrent, Small, samples

F64 = torch.float64
LIBRARIES = {"timesformer": "transformers", "videomae": "transformers", "swin": "timm"}
SHAPES = [
    ("table", "fullgrad_plus", (3, 6), {}),
    ("tabular", "fullgrad_plus", (3, 5), {"columns": (3, 3)}),
    ("tabular", "input_x_gradient", (3, 5), {"columns": (3, 3)}),
    ("series", "fullgrad_plus", (3, 3, 8), {}),
    ("lstm", "fullgrad_plus", (3, 7), {}),
    ("voxels", "fullgrad_plus", (2, 4, 6, 8), {}),
    ("voxels", "gradcam", (2, 4, 6, 8), {}),
    ("videomae", "fullgrad_plus", (2, 2, 4, 4), {}),
    ("timesformer", "fullgrad_plus", (2, 4, 4, 4), {}),
]


def alike(found: lg.Attribution, sample: int, alone: lg.Attribution) -> None:
    for a, b in [(found.values, alone.values), *((found.others[k], alone.others[k]) for k in alone.others)]:
        torch.testing.assert_close(a[sample], b[0], rtol=1e-9, atol=1e-12)
    assert (found.prefix is None) == (alone.prefix is None)


@pytest.mark.parametrize(("name", "method", "shape", "others"), fast_first(SHAPES, 6))
def test_the_map_is_over_the_axes_of_the_input(name: str, method: str, shape: Any, others: Any) -> None:
    pytest.importorskip(LIBRARIES.get(name, "torch"))
    made, gm = captured(name)
    found = lg.attribute(gm, made.inputs, made.target, method=method)
    assert tuple(found.values.shape) == shape
    assert {k: tuple(v.shape) for k, v in found.others.items()} == others
    for i in range(len(found.values)):
        alone = samples(made.inputs, slice(i, i + 1))
        alike(found, i, lg.attribute(gm, alone, made.target, method=method))


class Deep(nn.Module):
    """A residual stream with as many numbers to a layer, and as many layers, as a language model has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)
        wide = (nn.Sequential(nn.Linear(8, 2048), nn.Linear(2048, 8)) for _ in range(90))
        self.blocks = nn.ModuleList(wide)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).mean(1)


@pytest.mark.slow
def test_tokens_keep_their_places_however_deep() -> None:
    model, ids = Deep().double().eval(), torch.randint(11, (2, 7))
    for method in ("skip_plus", "hirescam", "gradcam_plus"):
        found = lg.attribute(model, ids, 1, method=method)
        assert found.values.shape == (2, 7)
        assert found.prefix is None


@pytest.mark.parametrize(
    "name", fast_first(["table", "series", "voxels", "shared", "tabular", "lstm", "gru"], 4)
)
def test_entries_of_the_input_by_hand(name: str) -> None:
    """Input x Gradient at the model's input, against autograd."""
    made, gm = captured(name)
    x = made.inputs if isinstance(made.inputs, torch.Tensor) else made.inputs[0]
    rest = () if isinstance(made.inputs, torch.Tensor) else made.inputs[1:]
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(gm(leaf, *rest)[:, made.target].sum(), leaf)
    channel = {"voxels": 1, "lstm": 2, "gru": 2, "shared": 2}.get(name)
    want = x * g if channel is None else (x * g).sum(channel)
    found = lg.attribute(gm, made.inputs, made.target, method="input_x_gradient", resolution="pixels")
    torch.testing.assert_close(found.values, want)


class Scan(nn.Module):
    """Tokens of a picture column by column, registers behind them, a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.cls, self.register = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 2))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).transpose(2, 3).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x, self.register.expand(len(x), -1, -1)], 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def test_tokens_are_put_where_the_graph_takes_them_from() -> None:
    model, x = Scan().double().eval(), torch.randn(2, 3, 16, 16, dtype=F64)
    gm = lg.transform(model, x)
    h: list[torch.Tensor] = []
    handle = gm.get_submodule("layers.0").register_forward_hook(lambda m, args, y: h.append(args[0]))
    logits = gm(x)
    handle.remove()
    (g,) = torch.autograd.grad(logits[:, 1].sum(), h[0])
    shares = (h[0] * g).sum(2).detach()
    found = lg.attribute(gm, x, 1, method="input_x_gradient")
    torch.testing.assert_close(found.values, shares[:, 1:17].unflatten(1, (4, 4)).mT)
    torch.testing.assert_close(found.prefix, shares[:, [0, 17, 18]])


def test_biases_in_windows_lie_where_their_windows_do() -> None:
    """Sixteen windows of sixteen tokens look like a picture, and are none."""
    pytest.importorskip("timm")
    made, gm = captured("swin")
    found = lg.attribute(gm, made.inputs, made.target, method="fullgrad")
    inside = lg.attribute(gm, made.inputs, made.target, method="input_x_gradient")
    shown = found.values - inside.values
    want = sum(_spread(t, 16) for t in _biases_by_picture(gm, made).values())
    torch.testing.assert_close(shown, want, rtol=1e-8, atol=1e-10)


def _biases_by_picture(gm: Any, made: Small) -> dict[str, torch.Tensor]:
    """Of each bias behind the first block, its map: of windows, by undoing timm's partition and shift."""
    from libragrad_fx.attribution.internals import run
    from libragrad_fx.target import product

    seen = run(gm, made.inputs, ["layers.0.blocks.0"], biases=True).back(made.target)
    found = {}
    for site, _, b, g in seen.biases:
        shares = product(b, g).sum(-1)
        if ".attn" not in site.module:
            if shares.ndim > 1:  # the head has no place
                side = round(shares[0].numel() ** 0.5)
                found[site.node] = shares.reshape(2, side, side)
            continue
        side = 16 if "layers.0" in site.module else 8
        whole = shares.reshape(2, side // 4, side // 4, 4, 4).transpose(2, 3).reshape(2, side, side)
        shift = 2 if site.module.split(".")[3] == "1" else 0
        found[site.node] = whole.roll((shift, shift), (1, 2))
    return found


def _spread(t: torch.Tensor, side: int) -> torch.Tensor:
    times = side // t.shape[-1]
    return t.repeat_interleave(times, 1).repeat_interleave(times, 2) / times**2


@pytest.mark.parametrize("kind", fast_first([nn.LSTM, nn.GRU], 1))
def test_a_series_by_a_recurrent_network(kind: Any) -> None:
    model, x = Recurrent(kind).double().eval(), torch.randn(3, 7, 4, dtype=F64)
    found = lg.attribute(lg.transform(model, x), x, 1)
    assert found.values.shape == (3, 7)
    assert float(found.completeness_error.max()) < 1e-12


# --- modules that are called several times, and layers that the stream passes by


def test_every_call_of_a_shared_tower_counts() -> None:
    made, gm = captured("shared")
    names = ["tower.0", "tower.1", "tower.0#2", "tower.1#2"]
    assert lg.blocks(gm) == names
    found = lg.attribute(gm, made.inputs, made.target)
    assert found.layers == tuple(names)
    assert float((found.completeness_error / found.expected).abs().max()) < 1e-9
    h: list[torch.Tensor] = []
    handles = [
        gm.get_submodule(f"tower.{i}").register_forward_hook(lambda m, args, y: h.append(args[0]))
        for i in range(2)
    ]
    logits = gm(*made.inputs)
    for handle in handles:
        handle.remove()
    gs = torch.autograd.grad(logits[:, made.target].sum(), h)
    sums = [(a * g).sum(2).detach() for a, g in zip(h, gs, strict=True)]
    only = lg.attribute(gm, made.inputs, made.target, method="hirescam", layers=names)
    torch.testing.assert_close(only.values, sums[0] + sums[1])
    torch.testing.assert_close(only.others["b"], sums[2] + sums[3])
    second = lg.attribute(gm, made.inputs, made.target, method="attcat", layers=names[2:])
    assert second.values.shape == (2, 4)


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inside, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((x + self.inside(x.relu())).mean(1))


def test_of_a_branch_what_leads_past_it_is_known() -> None:
    """The stream, and not what is read from it inside: by hand, the output less ⟨x, ∂f/∂x⟩ of the sum."""
    model, x = Branch().double().eval(), torch.randn(2, 5, 4, dtype=F64)
    gm = lg.transform(model, x)
    with torch.no_grad():
        stem, head = gm.get_submodule("stem"), gm.get_submodule("head")
        past = (x @ stem.weight.mT + stem.bias).mean(1) @ head.weight[1]
        inside = gm.get_submodule("inside")
        biases = inside.bias @ head.weight[1] + head.bias[1]
        want = gm(x)[:, 1] - past
    for method in ("fullgrad", "fullgrad_plus"):
        found = lg.attribute(gm, x, 1, method=method, layers=["inside"])
        torch.testing.assert_close(found.expected, want)
        torch.testing.assert_close(found.total, want)
    share = lg.attribute(gm, x, 1, method="input_x_gradient", layers=["inside"])
    torch.testing.assert_close(share.total, want - biases)
    assert bool(share.expected.isnan().all())
    plain = lg.attribute(lg.trace(model, x), x, 1, method="fullgrad", layers=["inside"])
    torch.testing.assert_close(plain.expected, want)
    first = lg.attribute(gm, x, 1, method="fullgrad", layers=["stem"])
    assert float(first.completeness_error.max()) < 1e-12


class Backbone(nn.Module):
    """Two blocks; gives what is in front of them too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layers = nn.ModuleList([Residual(), Residual()])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        early = late = self.stem(x)
        for layer in self.layers:
            late = layer(late)
        return early, late


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(x).relu()


class Pyramid(nn.Module):
    """Reads both of what its backbone gives."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat(self.backbone(x), -1).mean(1))


def test_one_of_several_results_may_lead_past_the_blocks() -> None:
    """FullGrad+ adds up to the output less what comes from the stem, by hand ⟨stem, ∂f/∂early⟩."""
    model, x = Pyramid().double().eval(), torch.randn(2, 5, 4, dtype=F64)
    gm = lg.transform(model, x)
    stem, head = model.backbone.stem, model.head
    past = ((x @ stem.weight.mT + stem.bias).mean(1) @ head.weight[1, :8]).detach()
    found = lg.attribute(gm, x, 1, layers=["backbone.layers.1"])
    torch.testing.assert_close(found.expected, (model(x)[:, 1] - past).detach())
    torch.testing.assert_close(found.total, found.expected)
    whole = lg.attribute(gm, x, 1)
    torch.testing.assert_close(whole.total, whole.expected)
