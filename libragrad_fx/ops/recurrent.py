"""LSTM, GRU and Elman layers and cells: PyTorch's kernel forward, the balanced functional form backward.

The functional form of a cell runs twice: once to record its sigmoid gates and the secant slopes of its
tanh, once with these replayed as constants. Replayed, the layer is linear in its input, its initial
state and its biases together; the backward is the transpose of that linear map.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from libragrad_fx.errors import ModeError
from libragrad_fx.graph.schema import bind
from libragrad_fx.kernels.recurrent import WHOLE
from libragrad_fx.ops.activation import secant_slope
from libragrad_fx.ops.function import traced, watched
from libragrad_fx.ops.twin import Grads, twin

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]
Groups = dict[str, Tensors]
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """One kind of recurrent layer.

    cell:   one step
    squash: its non-linearity on the value: tanh or relu
    parts:  how many parts the weights stack: the gates and the value
    value:  the index of the value among them
    by_grad_mode: whether PyTorch picks its kernel by grad mode (oneDNN has one for inference, with other
        bits)
    """

    cell: Callable[[Held, torch.Tensor, Tensors, Tensors], Tensors]
    squash: Callable[[torch.Tensor], torch.Tensor]
    parts: int
    value: int
    by_grad_mode: bool = False


class Held:
    """The non-linearities of a layer: recorded on the first pass, held constant on the second."""

    def __init__(self, kind: Recurrence) -> None:
        self._kind = kind
        self._factors: list[torch.Tensor] = []
        self._next: int | None = None

    def replay(self) -> Held:
        self._next = 0
        return self

    def rows(self, p: Tensors) -> Tensors:
        """A cell's parameters; in the replay, only their rows for the value."""
        if self._next is None:
            return p
        stacked = 4 if len(p) >= 4 else 2  # after these comes an LSTM's projection, if it has one
        return [*(w.chunk(self._kind.parts)[self._kind.value] for w in p[:stacked]), *p[stacked:]]

    def parts(self, z: torch.Tensor) -> Sequence[Any]:
        """``z``, computed with those rows, as its parts; in the replay, None for the gates."""
        if self._next is None:
            return z.chunk(self._kind.parts, -1)
        return [z if i == self._kind.value else None for i in range(self._kind.parts)]

    def gate(self, z: Callable[[], torch.Tensor]) -> torch.Tensor:
        return self._factor(lambda: torch.sigmoid(z()))

    def squash(self, z: torch.Tensor) -> torch.Tensor:
        return self._factor(lambda: secant_slope(z, self._kind.squash(z), 0.0, 1.0)) * z

    def _factor(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._next is None:
            self._factors.append(compute().detach())
            return self._factors[-1]
        self._next += 1
        return self._factors[self._next - 1]


def _lstm(held: Held, x: torch.Tensor, state: Tensors, p: Tensors) -> Tensors:
    h, c = state
    i, f, n, o = held.parts(x + linear(h, p[1], _bias(p, 3)))
    c = held.gate(lambda: f) * c + held.gate(lambda: i) * held.squash(n)
    h = held.gate(lambda: o) * held.squash(c)
    return (linear(h, p[-1]) if len(p) in (3, 5) else h), c  # proj_size > 0


def _gru(held: Held, x: torch.Tensor, state: Tensors, p: Tensors) -> Tensors:
    (h,) = state
    rx, zx, nx = held.parts(x)
    rh, zh, nh = held.parts(linear(h, p[1], _bias(p, 3)))
    z = held.gate(lambda: zx + zh)
    n = held.squash(nx + held.gate(lambda: rx + rh) * nh)
    return ((1 - z) * n + z * h,)


def _elman(held: Held, x: torch.Tensor, state: Tensors, p: Tensors) -> Tensors:
    return (held.squash(x + linear(state[0], p[1], _bias(p, 3))),)


def _bias(p: Tensors, place: int) -> torch.Tensor | None:
    return p[place] if len(p) >= 4 else None


def _layer(
    kind: Recurrence, held: Held, x: torch.Tensor, state: Tensors, p: Tensors, reverse: bool
) -> tuple[torch.Tensor, Tensors]:
    """(T, B, I) -> (T, B, H) and the last state: one direction of one layer."""
    outputs, p = [], held.rows(p)
    # one product for all steps
    steps = linear(x.contiguous(), p[0], _bias(p, 2)).unbind(0)
    for step in reversed(steps) if reverse else steps:
        state = kind.cell(held, step, state, p)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _form(
    kind: Recurrence, held: Held, x: torch.Tensor, hx: Tensors, params: Tensors, num_layers: int,
    bidirectional: bool, batch_first: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The functional form: output and final states, as the fused op returns them."""
    batched = x.ndim == 3
    if not batched:
        x, hx = x.unsqueeze(1), [h.unsqueeze(1) for h in hx]
    elif batch_first:
        x = x.transpose(0, 1)
    per_cell = len(params) // (num_layers * (1 + bidirectional))
    finals: list[Tensors] = []
    for _ in range(num_layers):
        directions = []
        for reverse in (False, True)[: 1 + bidirectional]:
            at = len(finals)
            weights = params[at * per_cell : (at + 1) * per_cell]
            y, state = _layer(kind, held, x, [h[at] for h in hx], weights, reverse)
            directions.append(y)
            finals.append(state)
        x = torch.cat(directions, -1)
    states = [torch.stack(s) for s in zip(*finals, strict=True)]
    if not batched:
        return (x.squeeze(1), *(s.squeeze(1) for s in states))
    return (x.transpose(0, 1) if batch_first else x, *states)


def _step(
    kind: Recurrence, held: Held, x: torch.Tensor, state: Tensors, p: Tensors
) -> tuple[torch.Tensor, ...]:
    """The functional form of a single cell."""
    p = held.rows(p)
    return tuple(kind.cell(held, linear(x, p[0], _bias(p, 2)), state, p))


def _functional(op: torch._ops.OpOverload, args: dict[str, Any]) -> tuple[Callable[..., Any], Groups]:
    """A layer or cell in its functional form, of a ``Held`` and tensors; and these tensors, grouped by
    argument."""
    kind, states = _KINDS[op], args["hx"]
    groups: Groups = {"input": [args["input"]]}
    groups["hx"] = list(states) if _is_list(states) else [states]
    count = len(groups["hx"])
    if "params" in args:
        groups["params"] = args["params"]
        shape = args["num_layers"], args["bidirectional"], args["batch_first"]
        return lambda held, x, *ts: _form(kind, held, x, ts[:count], ts[count:], *shape), groups
    groups |= {n: [args[n]] for n in _WEIGHTS if args[n] is not None}
    return lambda held, x, *ts: _step(kind, held, x, ts[:count], ts[count:]), groups


def _linearised(op: torch._ops.OpOverload, args: dict[str, Any]) -> tuple[Callable[..., Any], Groups]:
    """The same with its gates held, as a linear function of the tensors."""
    run, groups = _functional(op, args)
    held, own = Held(_KINDS[op]), [t for ts in groups.values() for t in ts]
    with torch.no_grad():
        run(held, *own)
    return lambda *moving: run(held.replay(), *moving), groups


def in_steps(op: torch._ops.OpOverload, *args: Any) -> Any:
    """``op`` in elementary ops, for a format that lacks it."""
    run, groups = _functional(op, bind(op, args, {}))
    made = run(Held(_KINDS[op]), *(t for ts in groups.values() for t in ts))
    return made if len(made) > 1 else made[0]


def _is_list(x: Any) -> bool:
    return isinstance(x, (list, tuple))


def bias(op: torch._ops.OpOverload, live: Sequence[str], args: dict[str, Any]) -> Any:
    """The constant of a call: its held form with live input and states at zero."""
    form, groups = _linearised(op, args)
    named = [(n, f"{n}[{i}]", t) for n, ts in groups.items() for i, t in enumerate(ts)]
    own = [torch.zeros_like(t) if {n, member} & set(live) else t for n, member, t in named]
    made = form(*own)
    return made if len(made) > 1 else made[0]


def _recurrent(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def vjp(needs: frozenset[str], g: Any, **args: Any) -> Grads:
        form, groups = _linearised(op, args)

        def moved(*moving: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = iter(moving)
            own = (next(given) if n in needs else t for n, ts in groups.items() for t in ts)
            return form(*own)

        g = g if _is_list(g) else (g,)
        grads = iter(_pulled(moved, [t for n in groups if n in needs for t in groups[n]], g))
        found: dict[str, Any] = {n: [next(grads) for _ in groups[n]] for n in groups if n in needs}
        return {n: ts if _is_list(args[n]) else ts[0] for n, ts in found.items()}

    def forward(*args: Any) -> Any:
        if "params" in names:
            num_layers, dropout, train = args[4:7]
            if train and dropout > 0 and num_layers > 1:
                raise ModeError(
                    f"{op}: dropout between recurrent layers draws a mask that a balanced backward cannot"
                    " see; transform the model in eval mode, or with dropout=0."
                )
        run = WHOLE[op] if traced() else op
        if not _KINDS[op].by_grad_mode:
            return run(*args)
        with torch.enable_grad():  # off inside an autograd.Function
            return pytree.tree_map(torch.detach, run(*args))

    names = [a.name for a in op._schema.arguments if "Tensor" in str(a.type)]
    return twin(op, vjp, saves=names, forward=forward)


def _pulled(
    form: Callable[..., tuple[torch.Tensor, ...]], moving: Tensors, g: Tensors
) -> Sequence[torch.Tensor]:
    """Gradients of a linear function: by plain autograd, which costs less, or else by ``torch.func``."""
    if torch.is_grad_enabled() or (watched() and not traced()):
        return torch.func.vjp(form, *moving)[1](tuple(g))  # type: ignore[no-any-return]
    moving = [t.detach().requires_grad_() for t in moving]
    with torch.enable_grad():
        outputs = form(*moving)
    moved = [i for i, y in enumerate(outputs) if y.requires_grad]
    outputs, g = ([ts[i] for i in moved] for ts in (outputs, g))  # type: ignore[assignment]
    return torch.autograd.grad(outputs, moving, g, materialize_grads=True)


_KINDS = {
    aten.lstm.input: Recurrence(_lstm, torch.tanh, 4, 2, by_grad_mode=True),
    aten.gru.input: Recurrence(_gru, torch.tanh, 3, 2),
    aten.rnn_tanh.input: Recurrence(_elman, torch.tanh, 1, 0),
    aten.rnn_relu.input: Recurrence(_elman, torch.relu, 1, 0),
    aten.lstm_cell.default: Recurrence(_lstm, torch.tanh, 4, 2),
    aten.gru_cell.default: Recurrence(_gru, torch.tanh, 3, 2),
}
lstm, gru, rnn_tanh, rnn_relu, lstm_cell, gru_cell = map(_recurrent, _KINDS)
