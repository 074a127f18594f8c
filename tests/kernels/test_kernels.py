"""The kernels of a GPU against their forms in PyTorch's ops. Without a GPU they run in Triton's interpreter
(``conftest.py``)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="triton is not installed")

from libragrad_fx import kernels  # noqa: E402
from libragrad_fx.kernels import PLAIN, TRIALS, launch  # noqa: E402
from libragrad_fx.kernels.attention import called  # noqa: E402
from libragrad_fx.kernels.pointwise import gelu_gate, norm_gradient  # noqa: E402
from libragrad_fx.ops.attention import attention_value  # noqa: E402
from tests.between import fast_first  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BFLOAT = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies it as integers


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def attended(
    dtype: torch.dtype, shape: tuple[int, int, int, int], keys: int, shared: int, size_v: int,
    mask: torch.Tensor | None = None, causal: bool = False, scale: float | None = None,
) -> tuple[Any, ...]:
    """Arguments of ``attention_value``: q, k and v are parts of one projection where they are alike."""
    batch, heads, queries, size = shape
    torch.manual_seed(0)
    whole = rand(batch, queries, 2, heads, size, dtype=dtype).permute(2, 0, 3, 1, 4)
    q, k = whole[0], whole[1][:, :shared, :keys]
    if keys > queries:
        k = rand(batch, shared, keys, size, dtype=dtype)
    scores = q.double() @ k.double().repeat_interleave(heads // shared, 1).mT
    scores = scores * (scale or 1 / math.sqrt(size))
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -math.inf)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask.double())
    g = rand(batch, queries, heads, size_v, dtype=dtype).transpose(1, 2)
    return g, q, k, mask, scores.logsumexp(-1).float(), causal, scale


def bools(*shape: int) -> torch.Tensor:
    return torch.rand(shape, device=DEVICE) > 0.4


SAMPLES: dict[Any, list[Any]] = {
    attention_value: [
        attended(dtype, (2, 2, 37, 16), 37, 2, 16) for dtype in (torch.float32, torch.float16, BFLOAT)
    ] + [
        attended(BFLOAT, (1, 2, 40, 64), 40, 2, 64, causal=True),
        attended(torch.float32, (1, 4, 33, 24), 33, 2, 40, causal=True, scale=0.3),  # shared keys
        attended(torch.float16, (2, 2, 20, 32), 70, 1, 32),  # more keys than queries
        attended(torch.float32, (2, 2, 70, 32), 20, 2, 32),
        attended(torch.float32, (2, 2, 33, 16), 33, 2, 16, mask=rand(33, 33)),
        attended(BFLOAT, (2, 2, 33, 16), 33, 2, 16, mask=rand(2, 1, 1, 33).to(BFLOAT)),
        attended(torch.float32, (2, 2, 33, 16), 33, 2, 16, mask=bools(2, 1, 33, 33)),
        attended(torch.float32, (1, 1, 8, 16), 8, 1, 16, mask=bools(8, 1).expand(8, 8)),  # some see none
        attended(torch.float16, (1, 1, 36, 256), 36, 1, 256),
    ],
    norm_gradient: [
        (rand(*shape, dtype=dtype), weight and rand(shape[-1], dtype=dtype), rand(*shape[:-1], 1).abs(),
         centred)
        for dtype in DTYPES for centred in (True, False) for weight in (None, True)
        for shape in ((3, 5, 96), (7, 2500))
    ] + [
        (rand(4, 6, 5).transpose(0, 1), rand(5), rand(6, 4, 1), True),
        (rand(5).expand(3, 5), rand(5), rand(3, 1), True),
        (rand(5, 8)[:, 2:6], rand(4), rand(5, 1), True),
        (rand(6, 4).t(), None, rand(4, 1), False),
    ],
    gelu_gate: [
        (rand(*shape, dtype=dtype), rand(*shape, dtype=dtype) * 3, how)
        for dtype in DTYPES for how in ("none", "tanh") for shape in ((3, 700), (5,))
    ] + [
        (rand(6, 4).t(), rand(4, 6), "none"), (rand(6, 8)[:, ::2], rand(6, 8)[:, ::2], "tanh"),
        (rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
         rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), "none"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("op", PLAIN, ids=str)
def test_a_kernel_is_its_written_form(op: Any) -> None:
    """Of float64 inputs' accuracy, up to the rounding of the kernel's dtype."""
    for args in SAMPLES[op]:
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        want = PLAIN[op](*wide)
        got = getattr(launch, op._schema.name.split("::")[1])(*args)
        like = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))  # its shape
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
        limit = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[got.dtype]
        far = (got.double() - want).norm() / want.norm()
        assert far < limit, (float(far), [a.shape if isinstance(a, torch.Tensor) else a for a in args])


@pytest.mark.parametrize("causal", [False, True])
def test_the_log_sum_exp_is_that_of_attention(causal: bool) -> None:
    """The samples mean by it what PyTorch's kernels return: their dV is autograd's."""
    args = attended(torch.float32, (2, 2, 24, 16), 24, 2, 16, causal=causal)
    g, q, k = args[:3]
    v = rand(2, 2, 24, 16).requires_grad_()
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal), v, g)
    torch.testing.assert_close(launch.attention_value(*args), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT])
@pytest.mark.parametrize("trial", fast_first(TRIALS, 2), ids=range(len(TRIALS)))
def test_the_trials_pass(trial: Any, dtype: torch.dtype) -> None:
    found, want = trial(torch.device(DEVICE), dtype)
    assert found.shape == want.shape
    assert kernels._tried(trial, torch.device(DEVICE), dtype) == ""


def crashes(device: torch.device, dtype: torch.dtype) -> Any:
    raise RuntimeError("no such instruction")


def a_wrong_one(device: torch.device, dtype: torch.dtype) -> Any:
    x = kernels.some(device, dtype)
    return x * 1.1, x


def nothing(device: torch.device, dtype: torch.dtype) -> Any:
    x = kernels.some(device, dtype)
    return x * torch.nan, x


@pytest.mark.parametrize(
    ("trial", "why"),
    fast_first([
        (crashes, "RuntimeError: no such instruction"), (a_wrong_one, "0.1 of its largest"),
        (nothing, "nan"),
    ], 1),
)  # fmt: skip
def test_a_kernel_that_fails_is_not_used(trial: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.works.cache_clear()
    monkeypatch.setattr(kernels, "TRIALS", [*TRIALS, trial])
    with pytest.warns(UserWarning, match=f"without its kernels for {DEVICE}.*{why}"):
        assert not kernels.works(torch.device(DEVICE), torch.float32)
    assert not kernels.works(torch.device(DEVICE), torch.float32)  # tried once, said once
    kernels.works.cache_clear()
    monkeypatch.undo()
    assert kernels.works(torch.device(DEVICE), torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="a CPU has none of these kernels")
def test_attention_that_cannot_be_called_by_name() -> None:
    with pytest.warns(UserWarning, match="without FLASH_ATTENTION by its name for cpu"):
        assert not called(SDPBackend.FLASH_ATTENTION, torch.device(DEVICE), torch.float32)


def test_a_trial_runs_on_real_tensors_under_a_tracer() -> None:
    kernels.works.cache_clear()
    with FakeTensorMode():
        assert kernels.works(torch.device(DEVICE), torch.float32)
