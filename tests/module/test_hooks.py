"""The module tree: forward hooks see the original's tensors, and tools built on them work."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from captum import attr
from torch import nn
from torch.utils import _pytree as pytree

import libragrad_fx as lg
from libragrad_fx.errors import ModeError
from tests.between import fast_first

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
}
# Modules whose output structure fx cannot spell (a dataclass), so that no probe stands for them.
EXCEPTIONS = {"vit": set(), "swin": set(), "convnext": set(), "bert": {"encoder"}}


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 0, 0.3)
    return model.eval()


def build(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    if name == "bert":
        transformers = pytest.importorskip(
            "transformers", reason="needs transformers (extra: models)"
        )
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32,
        )  # fmt: skip
        ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
        # without padding, transformers passes a mask while tracing and none otherwise
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        return randomised(transformers.BertModel(config)), {
            "input_ids": ids,
            "attention_mask": mask,
        }
    architecture, kwargs = SMALL[name]
    model = timm.create_model(architecture, num_classes=5, **kwargs)
    size = kwargs.get("img_size", 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return randomised(model), {"x": x}


@functools.cache
def transformed(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], Any]:
    """Of tests that leave a model and its transform as they are."""
    model, inputs = build(name)
    return model, inputs, lg.transform(model, inputs)


@functools.cache
def traced() -> Any:
    model, inputs, _ = transformed("vit")
    return lg.trace(model, inputs)


def calls(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list[Any]]:
    """Tensor leaves of (args, kwargs, output) of every call of every submodule."""
    seen: dict[str, list[Any]] = {}

    def listen(name: str) -> Any:
        def hook(_m: nn.Module, args: Any, output: Any) -> None:
            leaves = pytree.tree_leaves((args, output))
            seen.setdefault(name, []).append([t for t in leaves if isinstance(t, torch.Tensor)])

        return hook

    named = [(n, m) for n, m in model.named_modules() if n]
    handles = [m.register_forward_hook(listen(n)) for n, m in named]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "vit" else pytest.mark.slow)
        for n in EXCEPTIONS
    ],
)
def test_every_submodule_sees_the_originals_tensors(name: str) -> None:
    model, inputs, gm = transformed(name)
    theirs, mine = calls(model, inputs), calls(gm, inputs)
    mine.pop("output_structure", None)  # ours: it builds the dataclass that the model returns
    assert set(theirs) - set(mine) == EXCEPTIONS[name]
    assert set(mine) <= set(theirs)
    for path, recorded in mine.items():
        assert len(recorded) == len(theirs[path]), path
        for a, b in zip(recorded, theirs[path], strict=True):
            assert len(a) == len(b), path
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True)), path


@pytest.mark.parametrize("name", list(EXCEPTIONS)[-1:])
def test_the_tree_has_the_old_names_and_classes(name: str) -> None:
    model, _, gm = transformed(name)
    old = {n: type(m) for n, m in model.named_modules() if n}
    new = {n: type(m) for n, m in gm.named_modules() if n}
    assert {n: new[n] for n in old} == old
    assert list(gm.state_dict()) == list(model.state_dict())
    assert all(p is q for p, q in zip(gm.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("training", fast_first([False, True], 1))
def test_the_mode_may_be_set_again_to_what_it_is(training: bool) -> None:
    """Libraries do so before they explain. A model that returns a dataclass has a module of ours."""
    model, inputs = build("bert")
    gm = lg.transform(model.train(training), inputs)
    gm.train(training)(**inputs)


def test_a_hook_may_change_the_output() -> None:
    model, inputs, gm = transformed("vit")
    model = copy.deepcopy(model)
    for path in ("blocks.0.attn", "blocks.1.norm1", "norm", "blocks.0"):
        outputs = []
        for m in (gm, model):
            handle = m.get_submodule(path).register_forward_hook(lambda _m, _a, y: y * 0.5)
            outputs.append(m(**inputs))
            handle.remove()
        assert torch.equal(*outputs), path


def test_a_pre_hook_that_changes_arguments_is_refused() -> None:
    _, inputs, gm = transformed("vit")
    handle = gm.blocks[0].mlp.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    with pytest.raises(ModeError, match="pre-hook"):
        gm(**inputs)
    handle.remove()
    gm(**inputs)


def test_a_submodule_called_alone_is_refused() -> None:
    _, inputs, gm = transformed("vit")
    with pytest.raises(ModeError, match="computes nothing when it is called alone"):
        gm.patch_embed(**inputs)


def patches(t: torch.Tensor) -> torch.Tensor:
    return t[:, 1:].reshape(t.shape[0], 4, 4, -1).permute(0, 3, 1, 2)


def test_captum_agrees_with_the_original_on_the_plain_trace() -> None:
    model, inputs, balanced = transformed("vit")
    x, plain = inputs["x"], traced()
    for method in (attr.InputXGradient, attr.Saliency):
        mine, theirs = (method(m).attribute(x.clone(), target=2) for m in (plain, model))
        assert torch.equal(mine, theirs)
        assert not torch.equal(method(balanced).attribute(x.clone(), target=2), theirs)
    for make in (attr.LayerActivation, attr.LayerGradCam):
        found = []
        for m in (plain, model, balanced):
            layer = m.get_submodule("blocks.1.norm1")
            extra = (
                {} if make is attr.LayerActivation else {"target": 2, "attr_dim_summation": False}
            )
            found.append(make(m, layer).attribute(x.clone(), **extra))
        assert torch.equal(found[0], found[1])
        assert found[2].isfinite().all()


def test_grad_cam_library_runs_unmodified() -> None:
    cams = pytest.importorskip("pytorch_grad_cam", reason="needs grad-cam (extra: dev)")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, inputs, balanced = transformed("vit")
    x, found = inputs["x"], []
    for m in (traced(), model, balanced):
        layers = [m.get_submodule("blocks.1.norm1")]
        with cams.HiResCAM(model=m, target_layers=layers, reshape_transform=patches) as cam:
            found.append(
                torch.from_numpy(cam(input_tensor=x, targets=[ClassifierOutputTarget(2)] * 2))
            )
    assert torch.equal(found[0], found[1])
    assert found[2].isfinite().all()
    assert not torch.equal(found[2], found[1])


@pytest.mark.parametrize("method", ["GuidedBackprop", "Deconvolution", "DeepLift", "LRP"])
def test_methods_by_module_type_are_refused(method: str) -> None:
    """They would rewrite the backward of modules whose ops are in the graph: silently wrong."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    gm = lg.transform(model, x)
    with pytest.raises((ModeError, AssertionError, TypeError, RuntimeError, AttributeError)):
        getattr(attr, method)(gm).attribute(x, target=1)


def test_backward_hooks_on_submodules_are_refused() -> None:
    _, _, gm = transformed("vit")
    with pytest.raises(ModeError, match="by module type"):
        gm.norm.register_full_backward_hook(lambda *_: None)
