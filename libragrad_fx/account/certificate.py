"""Checks every promise of a transform on one input, and writes the certificate."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.account.proof import prove
from libragrad_fx.capture.state import same, untouched
from libragrad_fx.errors import InputError
from libragrad_fx.module.captured import CapturedModule, Forward, InGraphs
from libragrad_fx.rewrite.erase import erased_difference
from libragrad_fx.target import as_call, differentiable, inexact, moving, undisturbed
from libragrad_fx.types import Certificate, Ledger, Proof
from libragrad_fx.version import __version__

_SAME_SIZE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def certify(
    model: torch.nn.Module, module: InGraphs, inputs: Any, account: Ledger, forward: Forward,
    share: float | None, tolerance: float | None = None,
) -> Certificate:  # fmt: skip
    """Check the promises of a transform on one input (see ``libragrad_fx.verify``).

    account: the ledger of ``module`` on ``inputs``, made in ``forward``
    share:   the input's share by the backward of the lean graph (``share_as_run``)
    """
    args, kwargs = as_call(inputs)
    graphs = forward.graphs.values()
    forced = {name: False for g in graphs for name in g.record.forced}
    equal, difference, ulp = forward_equal(model, module, args, {**forced, **kwargs})
    proofs = {name: prove(g) for name, g in forward.graphs.items()}
    if tolerance is None:
        tolerance = tolerance_of(graphs, args, kwargs, account)
    plans = [g.history.plan for g in graphs]
    worst = account.worst(1)
    dtype, device = _dtype_and_device(module, args, kwargs)
    return Certificate(
        forward_equal=equal,
        max_abs_difference=difference,
        max_ulp=ulp,
        erased_equal=not any(erased_difference(g, g.history.original) for g in graphs),
        proof=dict(sum((Counter(p.balanced) for p in proofs.values()), Counter()).most_common()),
        unbalanced=_unbalanced(forward, proofs),
        worst_residual=abs(worst[0].residual) if worst else 0.0,
        worst_node=worst[0].node if worst else "",
        output=account.output,
        input_share=account.input,
        bias_share=account.bias,
        share_as_run=share,
        completeness_error=account.completeness_error,
        boundaries=account.boundaries,
        rows=account.rows,
        cuts=forward.cuts,
        tolerance=tolerance,
        edits=sum(len(p.edits) for p in plans),
        nodes=sum(len(g.history.original) for g in graphs),
        policy=plans[0].policy,
        digest=plans[0].digest,
        dtype=dtype,
        device=device,
        versions={"torch": torch.__version__.partition("+")[0], "libragrad-fx": __version__},
    )


def _unbalanced(forward: Forward, proofs: Mapping[str, Proof]) -> tuple[str, ...]:
    """Names of all that plan and proof leave open, between the graphs and in each of them."""
    left = [f.node for f in forward.between]
    for name, graph in forward.graphs.items():
        plan = graph.history.plan
        runs = prove(graph, as_run=True) if graph.lean is not None else proofs[name]
        open_ = (*plan.unbalanced, *plan.unknown, *proofs[name].open, *runs.open)
        left += [f"{name}/{f.node}" if name else f.node for f in open_]
    return tuple(dict.fromkeys(left))


def _dtype_and_device(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[str, str]:
    """The dtype of the first parameter (else of the first tensor argument), and that argument's device."""
    like = next(filter(torch.is_tensor, pytree.tree_leaves((args, kwargs))), None)
    dtype = next((p.dtype for p in module.parameters()), None if like is None else like.dtype)
    return str(dtype), "cpu" if like is None else str(like.device)


def casts(graphs: Iterable[CapturedModule]) -> dict[torch.dtype, str]:
    """The float dtypes that live nodes cast to, each with the source line of its first cast."""
    found: dict[torch.dtype, str] = {}
    for graph in graphs:
        live: dict[str, str] = {s.node: s.source for s in graph.record.sites}
        for n in graph.graph.nodes:
            for a in (*n.args, *n.kwargs.values()) if n.name in live else ():
                if isinstance(a, torch.dtype) and (a.is_floating_point or a.is_complex):
                    found.setdefault(a.to_real(), live[n.name])
    return found


def tolerance_of(graphs: Collection[CapturedModule], args: Any, kwargs: Any, account: Ledger) -> float:
    """The default tolerance of ``certify``: what rounding may leave of the account's largest number."""
    largest = max((abs(r.out) for r in account.rows), default=0.0)
    largest = max(abs(account.output), abs(account.input), abs(account.bias), largest)
    return rounding_of(graphs, args, kwargs) * largest


def _dtypes(graphs: Iterable[torch.nn.Module], args: Any, kwargs: Any) -> list[torch.dtype]:
    """The float dtypes that a call starts with: its inputs', and those of each graph's first parameter."""
    leaves = [t for t in pytree.tree_leaves((args, dict(kwargs))) if inexact(t)]
    for graph in graphs:
        leaves += [p for p in graph.parameters() if inexact(p)][:1]
    return [t.dtype.to_real() for t in leaves]


def rounding_of(graphs: Collection[CapturedModule], args: Any, kwargs: Any) -> float:
    """What rounding may leave of the largest number: a thousand ulp (8 in half precision), in the coarsest
    dtype of the computation.
    """
    used = {*casts(graphs), *_dtypes(graphs, args, kwargs)}
    used |= {torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
    eps = max((torch.finfo(d).eps for d in used), default=torch.finfo(torch.float32).eps)
    if torch.float32 in used and _in_tf32(graphs):
        eps = max(eps, 2.0**-10)
    return eps * (1e3 if eps < 1e-5 else 8)  # half precision is summed in float32, and has few ulp to give


def _in_tf32(graphs: Iterable[CapturedModule]) -> bool:
    """Whether float32 is computed with TF32's ten bits on a GPU: convolutions are, by PyTorch's default."""
    asked = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return bool(asked) and any(p.is_cuda for g in graphs for p in g.parameters())


def forward_equal(
    model: torch.nn.Module, module: InGraphs, args: Any, kwargs: Any
) -> tuple[bool, float, int]:
    """(same bits?, largest difference, the same in ulp), under grad mode with inputs that require grad.

    The model's state (batch-norm statistics) and the random state are left as they were.
    """

    def leaves(m: torch.nn.Module) -> list[Any]:
        torch.manual_seed(0)
        given = pytree.tree_map(moving, (args, dict(kwargs)))
        return pytree.tree_leaves(m(*given[0], **given[1]))

    with undisturbed(model), untouched(model), differentiable():
        wanted = leaves(model)
    with module.unchanged(), differentiable():
        return compare(wanted, leaves(module))


def compare(a: Sequence[Any], b: Sequence[Any]) -> tuple[bool, float, int]:
    """As ``forward_equal``, for two lists of leaves."""
    if len(a) != len(b):
        return False, math.nan, 0
    pairs = list(zip(map(_as_real, a), map(_as_real, b), strict=True))
    if all(_same_bits(a, b) for a, b in pairs):
        return True, 0.0, 0
    comparable = [(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.shape == b.shape]
    return (
        False,
        max((_distance(a, b) for a, b in comparable), default=math.nan),
        max((_ulp(a, b) for a, b in comparable), default=0),
    )


def _as_real(x: Any) -> Any:
    return torch.view_as_real(x.resolve_conj()) if torch.is_tensor(x) and x.is_complex() else x


def _same_bits(a: Any, b: Any) -> bool:
    """Whether the bits are equal: -0.0 differs from 0.0, and a nan equals any nan."""
    if not isinstance(a, torch.Tensor):
        return a is b or _same(a, b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(_bits(a), _bits(b))


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b) or same(a, b)  # ``same`` looks into objects, such as caches of tensors
    except RuntimeError as e:
        raise InputError(
            f"the output holds a {type(a).__name__}, whose tensors cannot be reached: register it with"
            " torch.utils._pytree (register_dataclass)"
        ) from e


def _bits(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().masked_fill(x.isnan(), 0).contiguous()
    return x.view(_SAME_SIZE[x.element_size()])


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    return float((a.detach().double() - b.detach().double()).abs().nan_to_num().max())


def _ulp(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance in ulp: bits as integers, mapped so that their order is that of the floats."""
    if a.numel() == 0 or a.dtype != b.dtype or not a.is_floating_point():
        return 0
    lowest = torch.iinfo(_SAME_SIZE[a.element_size()]).min
    i, j = (torch.where(x < 0, lowest - x, x) for x in (_bits(a), _bits(b)))
    return int((i.double() - j.double()).abs().max())
