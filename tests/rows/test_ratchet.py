"""Every op of PyTorch's database under plain autograd: which break the law and have no row?

They must be those of ``expect/unruled.txt``, exactly: a new gap shows up as a diff, and so does a
line that a new row has made stale. Which ops there are depends on PyTorch, so the list holds for
one minor version. To write it anew::

    python -m tests.rows.test_ratchet
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from libragrad_fx.decide import rulebook
from tests.samples import Call, call_of, is_float, opinfos

EXPECT = Path(__file__).parent / "expect" / "unruled.txt"
TRIES = 4
TOLERANCE = 1e-8  # relative to Σ|y g| and Σ|a r|: a broken law is off by much more


def reachable_calls(packet: str) -> Iterator[Call]:
    """A few samples that the ATen op of an OpInfo's name takes as they are, with a derivative."""
    for info in opinfos()[packet]:
        if torch.float64 not in info.dtypes or not info.supports_autograd:
            continue
        torch.manual_seed(0)
        samples = info.sample_inputs("cpu", torch.float64, requires_grad=False)
        for sample in itertools.islice(samples, TRIES):
            try:
                yield call_of(packet, (sample.input, *sample.args), sample.kwargs)
            except (RuntimeError, AttributeError):
                continue


def balance_of(call: Call) -> float | None:
    """``|⟨y,g⟩ - Σ⟨a,r⟩ - ⟨op(0),g⟩|`` by its size for one call; None if no derivative is there."""
    leaves, spec = torch.utils._pytree.tree_flatten((call.args, call.kwargs))
    moving = [t.detach().clone().requires_grad_() for t in leaves if is_float(t)]
    if not moving or any(t.layout is not torch.strided or t.numel() == 0 for t in moving):
        return None

    def run(values: list[torch.Tensor]) -> list[torch.Tensor]:
        fresh = iter(values)
        args, kwargs = spec.unflatten([next(fresh) if is_float(t) else t for t in leaves])
        torch.manual_seed(1)
        y = torch.utils._pytree.tree_leaves(call.op(*args, **kwargs))
        return [t for t in y if is_float(t)]

    outputs = run(moving)
    upstream = [torch.randn(y.shape, dtype=y.dtype) for y in outputs]
    carrying = [(y, g) for y, g in zip(outputs, upstream, strict=True) if y.requires_grad]
    if not carrying:
        return None
    ys, gs = zip(*carrying, strict=True)
    grads = torch.autograd.grad(ys, moving, gs, allow_unused=True, materialize_grads=True)
    zeros = run([torch.zeros_like(t) for t in moving])
    constants = [z for z, y in zip(zeros, outputs, strict=True) if y.requires_grad]
    out = [(y * g).detach() for y, g in carrying]
    back = [(a * r).detach() for a, r in zip(moving, grads, strict=True)]
    own = [(c * g).detach() for c, g in zip(constants, gs, strict=True)]
    size = sum(float(t.abs().sum()) for t in (*out, *back))
    gap = sum(float(t.sum()) for t in out) - sum(float(t.sum()) for t in (*back, *own))
    return None if not math.isfinite(size) or size == 0 else abs(gap) / size


def breaks_law(packet: str) -> bool:
    """Whether autograd leaves the op unbalanced on any of its first samples with a derivative."""
    for call in reachable_calls(packet):
        try:
            gap = balance_of(call)
        except (RuntimeError, TypeError, IndexError, NotImplementedError):
            continue  # another spelling of the arguments, or no derivative for this overload
        if gap is not None and not gap <= TOLERANCE:
            return True
    return False


def unruled() -> list[str]:
    ruled = {".".join(op.split(".")[:2]) for op in rulebook.load().facts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = sorted(n for n in opinfos() if hasattr(torch.ops.aten, n))
        return [f"aten.{n}" for n in names if f"aten.{n}" not in ruled and breaks_law(n)]


def version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def test_ops_that_break_the_law_without_a_row() -> None:
    head, *expected = EXPECT.read_text().splitlines()
    written_with = head.rsplit(" ", 1)[1]
    if written_with != version():
        pytest.skip(f"expect/unruled.txt lists the ops of PyTorch {written_with}, not {version()}")
    found = unruled()
    new, stale = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
    assert (new, stale) == ([], []), "write a row, or run python -m tests.rows.test_ratchet"


def test_the_probe_tells_balanced_from_broken() -> None:
    """The control: ops whose law is known, with or without rows."""
    assert [n for n in ("add", "relu", "matmul", "gelu", "softmax", "mul") if breaks_law(n)] == [
        "matmul", "gelu", "softmax", "mul",
    ]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    EXPECT.write_text(
        "\n".join([f"# aten ops without a row, PyTorch {version()}", *unruled()]) + "\n"
    )
