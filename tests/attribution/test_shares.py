"""Every stage from one backward, and the parts of heads, blocks and modules, by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution.internals import Run
from libragrad_fx.errors import InputError
from tests.attribution.once import captured, transformed
from tests.between import fast_first

F64 = torch.float64


class Pyramid(nn.Module):
    """Two stages of residual blocks, at (8, 8) and (4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.head = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 2, 2), nn.Linear(6, 3)
        self.stage1, self.stage2 = (nn.ModuleList(Mix() for _ in range(2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.stage1:
            x = block(x)
        x = self.down(x)
        for block in self.stage2:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.gelu(self.mix(self.norm(x)))


METHODS = ["fullgrad_plus", "gradcam", "fullgrad", "input_x_gradient", "xgradcam_plus"]


@pytest.mark.parametrize("method", fast_first(METHODS, 2))
def test_a_stage_is_what_the_method_gives_for_its_layer(method: str, monkeypatch: Any) -> None:
    model, x = Pyramid().double().eval(), torch.randn(2, 3, 16, 16, dtype=F64)
    gm = lg.transform(model, x)
    count, back = [], Run.back
    monkeypatch.setattr(Run, "back", lambda *args, **kw: count.append(1) or back(*args, **kw))
    found = lg.attribute(gm, x, 1, method=method, layers="stages")
    assert len(count) == 1
    assert found.layers == ("stage1.0", "stage2.0")
    assert [tuple(m.shape) for m in found.stages.values()] == [(2, 8, 8), (2, 4, 4)]
    for path, shown in found.stages.items():
        alone = lg.attribute(gm, x, 1, method=method, layers=[path])
        torch.testing.assert_close(shown, alone.values)
    if method != "input_x_gradient":  # which takes one layer
        both = lg.attribute(gm, x, 1, method=method, layers=[*found.layers])
        torch.testing.assert_close(found.values, both.values)


SIX = {
    "swin": [(16, 16), (8, 8)],
    "pvt": [(16, 16), (8, 8), (4, 4), (2, 2)],
    "maxvit": [(32, 32), (16, 16), (8, 8), (4, 4)],
    "convnext": [(16, 16), (8, 8), (4, 4), (2, 2)],
    "mobilevitv2": [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)],
    "vit": [(4, 4)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIX)
def test_stages_and_pixels_of_the_families(name: str) -> None:
    made, gm = captured(name)
    found = lg.attribute(gm, made.inputs, made.target, method="fullgrad", layers="stages")
    assert [tuple(m.shape[1:]) for m in found.stages.values()] == SIX[name]
    for path in found.stages:
        alone = lg.attribute(gm, made.inputs, made.target, method="fullgrad", layers=[path])
        assert float((alone.completeness_error / alone.expected).abs().max()) < 1e-9
        torch.testing.assert_close(found.stages[path], alone.values)
    pixels = lg.attribute(gm, made.inputs, made.target, method="fullgrad", resolution="pixels")
    assert pixels.values.shape == made.inputs[:, 0].shape
    assert float((pixels.completeness_error / pixels.expected).abs().max()) < 1e-9


# --- parts


def hooked(gm: Any, paths: Sequence[str], x: torch.Tensor, target: int, given: bool) -> list[Any]:
    """Of each module its input or output, and the gradient."""
    seen: list[torch.Tensor] = []
    handles = [
        gm.get_submodule(p).register_forward_hook(lambda m, a, y: seen.append(a[0] if given else y))
        for p in paths
    ]
    logits = gm(x)
    for handle in handles:
        handle.remove()
    return [*zip(seen, torch.autograd.grad(logits[:, target].sum(), seen), strict=True)]


@pytest.mark.parametrize("fused", fast_first([True, False], 1))
def test_heads_share_what_their_attention_returns(fused: bool) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=F64)
    gm = transformed(fused)
    found = lg.attribute(gm, x, 2, by="head")
    paths = [f"blocks.{i}.attn" for i in range(3)]
    assert list(found.parts) == paths
    for path, (y, g) in zip(paths, hooked(gm, [f"{p}.proj" for p in paths], x, 2, True), strict=True):
        want = (y * g).unflatten(-1, (2, -1)).sum((1, 3)).detach()
        torch.testing.assert_close(found.parts[path], want)


def test_heads_of_windows_belong_to_their_samples() -> None:
    pytest.importorskip("timm")
    made, gm = captured("swin")
    found = lg.attribute(gm, made.inputs, 1, by="head")
    paths = [f"layers.{i}.blocks.{j}.attn" for i in range(2) for j in range(2)]
    inputs = hooked(gm, [f"{p}.proj" for p in paths], made.inputs, 1, True)
    for path, (y, g) in zip(paths, inputs, strict=True):
        want = (y * g).unflatten(-1, (2, -1)).sum((1, 3)).unflatten(0, (2, -1)).sum(1).detach()
        torch.testing.assert_close(found.parts[path], want)


def test_blocks_add_to_the_stream() -> None:
    x = torch.randn(3, 3, 32, 32, dtype=F64)
    gm = transformed()
    found = lg.attribute(gm, x, 2, by="block")
    paths = [f"blocks.{i}" for i in range(3)]
    before, behind = (hooked(gm, paths, x, 2, given) for given in (True, False))
    for path, (h, _), (y, g) in zip(paths, before, behind, strict=True):
        torch.testing.assert_close(found.parts[path], ((y - h) * g).sum((1, 2)).detach())


@pytest.mark.parametrize("method", ["fullgrad", "fullgrad_plus", "skip_plus", "input_x_gradient"])
def test_parts_of_modules_add_up_to_the_total(method: str) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=F64)
    gm = transformed()
    found = lg.attribute(gm, x, 2, method=method, by="module")
    torch.testing.assert_close(torch.stack([*found.parts.values()]).sum(0), found.total)
    assert method == "input_x_gradient" or "blocks.2.mlp.fc1" in found.parts


def test_parts_and_stages_are_kept(tmp_path: Path) -> None:
    model, x = Pyramid().double().eval(), torch.randn(4, 3, 16, 16, dtype=F64)
    found = lg.attribute(model, x, 1, layers="stages", by="module", batch_size=2)
    whole = lg.attribute(model, x, 1, layers="stages", by="module")
    for ending in (".npz", ".safetensors", ".json"):
        loaded = lg.Attribution.load(found.save(tmp_path / f"map{ending}"))
        for field in ("stages", "parts"):
            kept, want = getattr(loaded, field), getattr(whole, field)
            assert set(kept) == set(want)
            for name in want:
                torch.testing.assert_close(kept[name], want[name])


def test_what_cannot_be_asked() -> None:
    model, x = Pyramid().double().eval(), torch.randn(2, 3, 16, 16, dtype=F64)
    gm = lg.transform(model, x)
    with pytest.raises(InputError, match="needs attention"):
        lg.attribute(gm, x, 1, by="head")
    with pytest.raises(InputError, match="needs blocks"):
        lg.attribute(gm, x, 1, method="fullgrad", resolution="pixels", by="block")
    with pytest.raises(InputError, match="by is one of head, block, module"):
        lg.attribute(gm, x, 1, by="layer")
    with pytest.raises(InputError, match="or 'stages'"):
        lg.attribute(gm, x, 1, layers="blocks")
    with pytest.raises(InputError, match="one layer"):
        lg.attribute(gm, x, 1, method="integrated_gradients", layers="stages")
