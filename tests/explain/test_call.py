"""The one call: any model, inputs as people have them, targets as they mean them."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import libragrad_fx as lg
from libragrad_fx.attribution import METHODS
from libragrad_fx.errors import InputError, TargetWarning
from libragrad_fx.explain import kept
from tests.attribution.once import same_vit
from tests.between import fast_first

F64 = torch.float64
Tensor = torch.Tensor


class Mix(nn.Module):
    """A residual and an activation, which is quick to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.activation = nn.Linear(6, 6), nn.functional.gelu

    def forward(self, x: Tensor) -> Tensor:
        return x + self.activation(self.up(x))


class Own(nn.Module):
    """A user's module: no timm, no ``blocks``."""

    def __init__(self, attends: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 4, 4)
        layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0) if attends else Mix()
        self.encoder = layer
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))


@functools.cache
def own() -> nn.Module:
    """For tests that do not change it."""
    return Own().double().eval()


@functools.cache
def captured(policy: str) -> Any:
    """The same, captured by hand."""
    x = torch.randn(4, 3, 32, 32, dtype=F64)
    return lg.trace(own(), x) if policy == "autograd" else lg.transform(own(), x, policy=policy)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32, dtype=F64)


# --- the model is captured on the way, and kept


def test_a_model_is_transformed_once(images: Tensor, monkeypatch: Any) -> None:
    calls = []
    monkeypatch.setattr(kept, "transform", lambda *a, **k: calls.append(a) or lg.transform(*a, **k))
    model = Own(attends=False).double().eval()
    first = lg.attribute(model, images, 1)
    again = lg.attribute(model, images[:2], 1)
    assert len(calls) == 1
    torch.testing.assert_close(first.values[:2], again.values)
    want = lg.attribute(lg.transform(model, images), images, 1)
    assert torch.equal(first.values, want.values)
    lg.attribute(model, images, 1, policy="attn_lrp")
    assert len(calls) == 2


def test_it_is_kept_no_longer_than_the_model(images: Tensor) -> None:
    model = Own(attends=False).double().eval()
    lg.attribute(model, images, 1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert not [m for m in kept._KEPT if isinstance(m, Own)]


CHANGES: dict[str, Any] = {
    "weights in place": lambda m: m.head.weight.data.mul_(2),
    "another parameter": lambda m: setattr(m.head, "weight", nn.Parameter(m.head.weight.detach() * 2)),
    "another module": lambda m: setattr(m, "head", nn.Linear(6, 5, dtype=F64)),
    "another activation": lambda m: setattr(m.encoder, "activation", torch.tanh),
    "another mode": lambda m: m.train(),
    "loaded": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
}


@pytest.mark.parametrize("change", fast_first(CHANGES, 2))
def test_a_changed_model_is_explained_as_it_is(change: str, images: Tensor) -> None:
    model = Own(attends=False).double().eval()
    lg.attribute(model, images, 1)
    CHANGES[change](model)
    found = lg.attribute(model, images, 1)
    torch.testing.assert_close(found.output, model(images)[:, 1].detach())
    want = lg.attribute(lg.transform(model, images), images, 1)
    torch.testing.assert_close(found.values, want.values, rtol=1e-9, atol=1e-12)


def test_a_converted_model_is_captured_again(images: Tensor) -> None:
    model = Own(attends=False).eval()
    lg.attribute(model, images.float(), 1)
    found = lg.attribute(model.double(), images, 1)
    assert float(found.completeness_error.max()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["libra", "autograd"])
def test_another_size_after_the_first(policy: str, images: Tensor) -> None:
    model, other = own(), torch.randn(2, 3, 48, 32, dtype=F64)
    lg.attribute(model, images, 1, policy=policy)
    found = lg.attribute(model, other, 1, policy=policy)
    assert found.grid == (48, 32)
    assert torch.equal(found.values, lg.attribute(copy.deepcopy(model), other, 1, policy=policy).values)


@pytest.mark.parametrize("policy", fast_first([None, "libra", "attn_lrp", "autograd"], 1))
def test_policies_by_name(policy: str | None, images: Tensor) -> None:
    model = own()
    found = lg.attribute(model, images, 1, policy=policy, method="fullgrad")
    made = captured(policy or "libra")
    assert torch.equal(found.values, lg.attribute(made, images, 1, method="fullgrad").values)
    assert found.policy == ("" if policy == "autograd" else policy or "libra")
    assert bool(found.digest) is (policy != "autograd")
    assert (float(found.completeness_error.max()) < 1e-12) is (policy in (None, "libra"))


def test_a_captured_module_keeps_its_policy(images: Tensor) -> None:
    module = captured("attn_lrp")
    assert lg.attribute(module, images, 1).policy == "attn_lrp"
    assert lg.attribute(module, images, 1, policy="attn_lrp").policy == "attn_lrp"
    with pytest.raises(InputError, match="captured by attn_lrp"):
        lg.attribute(module, images, 1, policy="libra")
    with pytest.raises(InputError, match="captured by autograd"):
        lg.attribute(captured("autograd"), images, 1, policy="libra")


@pytest.mark.parametrize("model", [None, 3, "vit", lambda x: x])
def test_what_is_no_model(model: Any, images: Tensor) -> None:
    with pytest.raises(InputError, match=r"explains an nn\.Module"):
        lg.attribute(model, images, 1)


# --- targets


def test_the_models_own_answer(images: Tensor) -> None:
    model = own()
    logits = model(images)
    found = lg.attribute(model, images)
    assert found.target == tuple((int(i),) for i in logits.argmax(1))
    assert torch.equal(found.output, logits.amax(1).detach())
    three = lg.attribute_each(model, images, top=3)
    best = logits.topk(3, 1).values.detach()
    assert torch.equal(torch.stack([a.output for a in three], 1), best)


def test_several_targets_are_one_by_one_the_same(images: Tensor, monkeypatch: Any) -> None:
    model = own()
    targets = [1, [0, 1, 2, 3], lambda y: y[:, 0] - y[:, 1], None]
    together = lg.attribute_each(model, images, targets)
    for target, found in zip(targets, together, strict=True):
        alone = lg.attribute(model, images, target)
        torch.testing.assert_close(found.values, alone.values, rtol=1e-12, atol=1e-14)
        assert float(found.completeness_error.max()) < 1e-12
        assert found.target == alone.target


def test_this_and_not_that(images: Tensor) -> None:
    model = own()
    found = lg.attribute(model, images, 3, against=1)
    this, that = lg.attribute_each(model, images, [3, 1])
    torch.testing.assert_close(found.values, this.values - that.values, rtol=1e-10, atol=1e-14)
    assert found.target == ((3, 1),) * 4
    with pytest.raises(InputError, match="against needs a target"):
        lg.attribute(model, images, against=1)


def test_bad_targets_say_what_there_is(images: Tensor) -> None:
    model = own()
    with pytest.raises(InputError, match="does not fit output"):
        lg.attribute(model, images, 5)
    with pytest.raises(InputError, match="no 6 largest"):
        lg.attribute_each(model, images, top=6)
    with pytest.raises(InputError, match="top is at least 1"):
        lg.attribute_each(model, images, top=0)
    with pytest.raises(InputError, match="list of targets"):
        lg.attribute_each(model, images, [])
    with pytest.raises(InputError, match="say which target"):
        lg.attribute(nn.Conv2d(3, 4, 3), images.float())


@pytest.mark.parametrize(
    ("target", "curved"),
    [
        (lambda y: y[:, 1], False),
        (lambda y: y[:, 1] - 0.5 * y[:, 2], False),
        (lambda y: y.max(1).values, False),
        (lambda y: y.softmax(1)[:, 1], True),
        (lambda y: y[:, 1] * y[:, 2], True),
        (lambda y: y[:, 1] + 3, True),
        (lambda y: torch.nn.functional.cosine_similarity(y, torch.ones(5, dtype=F64)), True),
        (lambda y: lg.unit(y)[:, 1], False),
        (1, False),
    ],
)
def test_a_target_that_no_map_adds_up_to_is_told(target: Any, curved: bool, images: Tensor) -> None:
    model = own()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = lg.attribute(model, images, target, method="fullgrad")
        lg.attribute(model, images, target, method="gradcam")
    told = [w for w in said if w.category is TargetWarning]
    assert len(told) == curved  # a method that promises no sum says nothing
    assert (float(found.completeness_error.max()) > 1e-3) is curved


# --- batches


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return same_vit()


ONE_OF_EACH = (
    "gradient", "fullgrad_plus", "raw_attention", "random", "integrated_gradients", "gradcam_plus",
)  # fmt: skip
EACH = dict.fromkeys([*ONE_OF_EACH, "path_averaged(fullgrad_plus)", *METHODS])


@pytest.mark.parametrize("method", fast_first(EACH, len(ONE_OF_EACH)))
def test_batches_are_their_samples(method: str, images: Tensor, model: nn.Module) -> None:
    whole = lg.attribute(model, images, [0, 1, 2, 1], method=method, steps=2)
    for size in (1, 3):
        parts = lg.attribute(model, images, [0, 1, 2, 1], method=method, steps=2, batch_size=size)
        torch.testing.assert_close(parts.values, whole.values, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(parts.total, whole.total, rtol=1e-10, atol=1e-13)
        assert parts.target == whole.target


@pytest.mark.parametrize("target", [1, [0, 1, 2, 1], torch.tensor([0, 1, 2, 1]), np.arange(4) % 3, None])
def test_targets_go_with_their_samples(target: Any, images: Tensor, model: nn.Module) -> None:
    whole = lg.attribute(model, images, target)
    parts = lg.attribute(model, images, target, batch_size=3, progress=True)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("size", [0, -1, 1.5, "all"])
def test_batch_sizes_that_are_none(size: Any, images: Tensor, model: nn.Module) -> None:
    with pytest.raises(InputError, match="batch_size is a number from 1 on"):
        lg.attribute(model, images, 1, batch_size=size)


# --- pictures and texts


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((32, 32)))).double().permute(2, 0, 1) / 255


def test_pictures_and_paths(tmp_path: Path) -> None:
    model = own()
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    want = lg.attribute(model, torch.stack([to_tensor(picture(i)) for i in range(2)]))
    forms: list[Any] = [
        [picture(0), picture(1)],
        [tmp_path / "0.png", tmp_path / "1.png"],
        [str(tmp_path / "0.png"), picture(1)],
    ]
    for inputs in forms:
        found = lg.attribute(model, inputs, processor=to_tensor, batch_size=1)
        torch.testing.assert_close(found.values, want.values)
    one = lg.attribute(model, picture(0), processor=to_tensor)
    torch.testing.assert_close(one.values, want.values[:1])


def test_a_timm_model_knows_its_pictures() -> None:
    import timm

    model = timm.create_model("test_vit").eval()
    found = lg.attribute(model, [picture(0), picture(1)])
    assert found.values.shape == (2, 10, 10)
    assert all(found.labels)
    last = [lg.attribute(model, [picture(0)], target).labels for target in (-1, 999)]
    assert last[0] == last[1] != ("",)


def test_pictures_that_are_none(tmp_path: Path, images: Tensor) -> None:
    model = own()
    with pytest.raises(InputError, match="does not say how it wants its pictures"):
        lg.attribute(model, picture(0))
    with pytest.raises(InputError, match="there is no image file"):
        lg.attribute(model, tmp_path / "none.png", processor=to_tensor)
    with pytest.raises(InputError, match="pictures and texts in one list"):
        lg.attribute(model, [picture(0), "a cat"], processor=to_tensor)
    with pytest.raises(InputError, match="nothing to explain"):
        lg.attribute(model, [], processor=to_tensor)
    sizes = iter((3, 4))
    with pytest.raises(InputError, match="of one shape"):
        lg.attribute(model, [picture(0), picture(1)], processor=lambda p: torch.rand(next(sizes)))
    with pytest.raises(InputError, match="text need a tokenizer"):
        lg.attribute(model, "a cat")


def tokenizer() -> Any:
    """A real tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "the", "cat", "sat", "on", "mat", "a", "dog"])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]")


@functools.cache
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=9, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
                         use_cache=False, eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def test_texts_are_explained_at_their_next_token() -> None:
    model, words = llama(), tokenizer()
    texts = ["the cat sat on the", "a dog", "the mat"]
    found = lg.attribute(model, texts, processor=words)
    assert found.values.shape == (3, 5)
    assert found.tokens is not None
    assert found.tokens[0] == ("the", "cat", "sat", "on", "the")
    assert [t for t in found.tokens[1] if t] == ["a", "dog"]
    for i, text in enumerate(texts):
        alone = lg.attribute(model, text, processor=words)
        real = torch.tensor([bool(t) for t in found.tokens[i]])
        torch.testing.assert_close(found.values[i, real], alone.values[0], rtol=1e-9, atol=1e-12)
        assert not bool(found.values[i, ~real].any())
        assert found.labels[i] == alone.labels[0] != ""
    ids = words(texts[0], return_tensors="pt")["input_ids"]
    assert found.target[0] == (4, int(model(ids).logits[0, -1].argmax()))


def test_the_users_tokenizer_is_left_alone() -> None:
    words = tokenizer()
    words.pad_token, words.eos_token = None, "[UNK]"
    lg.attribute(llama(), ["the cat", "a"], processor=words)
    assert words.pad_token is None


def test_what_the_model_saw_is_kept() -> None:
    def steps(image: Image.Image) -> Tensor:
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
        return ((to_tensor(image) - mean) / std).double()

    model = Own().double().eval()
    found = lg.attribute(model, [picture(0), picture(1)], processor=steps, batch_size=1)
    assert found.pictures is not None
    want = np.stack([np.asarray(picture(i).resize((32, 32))) for i in range(2)])
    assert np.abs(found.pictures.numpy().astype(int) - want).max() <= 1
    standardised = lg.attribute(model, picture(0), processor=lambda p: to_tensor(p) - to_tensor(p).mean())
    assert standardised.pictures is None  # black and white become the same
    assert lg.attribute(model, torch.randn(1, 3, 32, 32, dtype=F64)).pictures is None
