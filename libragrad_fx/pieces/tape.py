"""The last rung: run the model on real tensors, and record its ops.

Python (loops on values, hooks, NumPy, foreign containers) runs as usual; the recorded ops are one graph,
for this call. It goes through the same stages as any other graph, and its balanced form then runs on the
same inputs. A later call with the same ops reuses the balanced graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from libragrad_fx.account.birth import Reference
from libragrad_fx.account.certificate import compare
from libragrad_fx.capture.composite import COMPOSITE, every_op, in_parts
from libragrad_fx.capture.context import replaced_backwards, traced_as_run
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.rulebook import RuleBook
from libragrad_fx.errors import CaptureError, CutWarning, LibraGradError, VerificationError
from libragrad_fx.graph.origin import origin
from libragrad_fx.module.captured import RunGraph
from libragrad_fx.pieces.dynamo import HELD, MOVES, STILL, CutModule, Run, prove_born
from libragrad_fx.pieces.freeze import freeze, has_effect
from libragrad_fx.rewrite.erase import spell
from libragrad_fx.target import differentiable, moving, undisturbed


@dataclasses.dataclass(frozen=True)
class Tape:
    """One recorded forward. ``body`` takes the tensors among the inputs, then ``held``: all other tensors
    that it reads (parameters, buffers, tensors that Python made). custom: user-written functions."""

    body: GraphModule
    held: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    restore: Callable[[Sequence[torch.Tensor]], Any]
    custom: list[str]


def record(model: nn.Module, args: Any, kwargs: Any, book: RuleBook) -> Tape:
    """Run ``model`` and record its ops. The model's own state changes, as in any call.

    book: a composite op that has a fact there is recorded whole, any other as its parts.

    Raises:
        CaptureError: the model fails, or its ops cannot be recorded.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
    seen: dict[str, Any] = {}
    custom: list[str] = []

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        filled = [*leaves]
        for i, t in zip(places, tensors, strict=True):
            filled[i] = t
        given = pytree.tree_unflatten(filled, spec)
        flat, seen["spec"] = pytree.tree_flatten(model(*given[0], **given[1]))
        seen["flat"] = flat
        return [x for x in flat if isinstance(x, torch.Tensor)]

    tensors = [moving(leaves[i]).clone() for i in places]
    try:
        parts = in_parts(book)
        with traced_as_run(custom), _own_kernels(), _written_out():
            traced = make_fx(run, parts, pre_dispatch=True, _error_on_data_dependent_ops=False)(*tensors)
    except LibraGradError:
        raise
    except Exception as e:
        raise CaptureError(
            f"{type(model).__name__} could not be recorded while it ran: {type(e).__name__}: {e}"
        ) from e
    flat = seen["flat"]

    def restore(outputs: Sequence[torch.Tensor]) -> Any:
        found = iter(outputs)
        filled = [next(found) if isinstance(x, torch.Tensor) else x for x in flat]
        return pytree.tree_unflatten(filled, seen["spec"])

    outputs = [x.detach() for x in flat if isinstance(x, torch.Tensor)]
    return Tape(*_parametric(traced), outputs, restore, custom)


@contextlib.contextmanager
def _own_kernels() -> Iterator[None]:
    """Use PyTorch's own kernels. For some ops (resizing of pictures, recurrent layers), tracing would take
    Python implementations, which have other bits."""
    keys = {COMPOSITE, torch._C.DispatchKey.Autograd}
    ops = [op for op in every_op() if not keys.isdisjoint(op.py_kernels)]
    with contextlib.ExitStack() as stack:
        for op in ops:
            kept = {k: f for k, f in op.py_kernels.items() if k not in keys}
            stack.callback(op._dispatch_cache.clear)
            stack.enter_context(mock.patch.dict(op.py_kernels, kept, clear=True))
            op._dispatch_cache.clear()
        yield


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """Run control flow ops (``cond``, ``while_loop``) and ``flex_attention`` directly: only the branch that
    these values take is recorded."""
    dispatch = HigherOrderOperator.dispatch

    def run(self: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        dense = self.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if dense is None or _get_current_dispatch_mode() is not None:  # Dynamo looks ahead
            return dispatch(self, key, *args, **kwargs)
        return dense(*args, **kwargs)

    with mock.patch.object(HigherOrderOperator, "dispatch", run):
        yield


def _parametric(traced: GraphModule) -> tuple[GraphModule, list[torch.Tensor]]:
    """A graph that takes the tensors that it read as attributes as arguments; and these tensors."""
    traced.graph.eliminate_dead_code(has_effect)
    graph, held, known = traced.graph, list[torch.Tensor](), dict[int, torch.fx.Node]()
    last = [n for n in graph.nodes if n.op == "placeholder"]
    behind = last[-1] if last else None
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        value = getattr(traced, str(node.target))
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"the recorded ops hold a sub-graph ({node.target})")
        if torch._C._functorch.is_functorch_wrapped_tensor(value):  # pyright: ignore[reportAttributeAccessIssue]
            raise CaptureError("it maps over tensors (torch.vmap, torch.func) that are not its own")
        if id(value) not in known:
            with graph.inserting_after(behind) if behind is not None else contextlib.nullcontext():
                behind = known[id(value)] = graph.placeholder(f"held_{len(held)}")
            held.append(value)
        node.replace_all_uses_with(known[id(value)])
        graph.erase_node(node)
    for node in graph.nodes:  # the traced values in ``meta`` would keep tensors alive
        node.meta = origin(node)
    graph.lint()
    return GraphModule(nn.Module(), graph), held


class TapeModule(CutModule):
    """A model that is recorded at each call; the recording is balanced and run."""

    def _reset(self) -> None:
        self.pieces = {}
        self.notes = ()
        self.cuts = ("recorded as it ran: the graph is that of one call",)
        self._made: dict[Any, Any] = {}
        self._book: RuleBook | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in ("_made", "_book")}

    def _forward(self, args: Any, kwargs: Any, by: RunGraph | None = None) -> tuple[Any, Run]:
        args, kwargs, run = self._started(args, kwargs, by)
        if self._book is None:
            self._book = rulebook.load(self.options["policy"], self.options["rules"])
        with undisturbed(self):  # undo the recording's draws and writes: the graph will repeat them
            tape = record(self._model, args, kwargs, self._book)
        given = [*run.leaves.values(), *tape.held]
        with undisturbed(self):
            copies = [t.detach().clone() for t in given]
            body, whole, moves, again = freeze(tape.body, copies, len(run.leaves), self._book)
        if not compare(tape.outputs, again)[0]:
            raise CaptureError(
                f"{type(self._model).__name__} computes something that is no op of PyTorch's on its"
                " tensors: it writes into them by .data, or by memory that NumPy shares"
            )
        kinds = (
            *(self._kind(run, t) for t in run.leaves.values()),
            *(HELD if id(t) in run.own else STILL for t in tape.held),
            *(MOVES if m else STILL for m in moves),
        )
        given += whole
        held = tuple(id(t) for t, k in zip(given, kinds, strict=True) if k == HELD)
        shapes = tuple((t.shape, t.dtype, t.device) for t in given)
        key = spell(body.graph), kinds, held, shapes, self.training
        if key not in self._made:
            self.notes = tuple(dict.fromkeys([*self.notes, *replaced_backwards(tape.custom)]))
            self._made[key] = self._piece(body, tuple(given), kinds)
        name, piece, depends = self._made[key]
        free = [t for t, k in zip(given, kinds, strict=True) if piece is None or k != HELD]
        outputs = self._run_piece(run, body, free, name, piece, depends)
        run.over = True
        equal, difference, _ = compare(tape.outputs, outputs)
        if not equal:
            raise VerificationError(
                f"the graph of this call gives another output than {type(self._model).__name__} gave:"
                f" {difference:.3g} apart"
            )
        return tape.restore(outputs), run


def transform_by_tape(
    model: nn.Module, args: Any, kwargs: Any, known: Reference | None, refusal: Exception,
    on_unknown: str, balanced: bool = True, **options: Any,
) -> TapeModule:  # fmt: skip
    """Balance ``model`` call by call, and run it once.

    Raises:
        CaptureError: its ops cannot be recorded.
        UnknownOpError: an op has no rule.
    """
    module = TapeModule(model, str(refusal).splitlines()[0], options, on_unknown, balanced)
    with module.unchanged(), differentiable():
        module._forward(args, kwargs)
    if not module.pieces:
        raise CaptureError(f"{refusal}\n  No gradient path leads from its outputs to its inputs.")
    prove_born(model, module, known)
    text = f"{type(model).__name__} is no graph; it is recorded and balanced anew at each call"
    warnings.warn(f"{text} ({module.refusal})", CutWarning, stacklevel=4)
    return module
