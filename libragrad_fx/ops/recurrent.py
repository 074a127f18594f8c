"""LSTM, GRU and Elman layers: PyTorch's fused kernel forward, the balanced functional form backward.

The cell is written out twice over the same code: once to record its sigmoid gates and the secant
slopes of its tanh, once to replay them as constants. Replayed, the layer is linear in its input,
its initial state and its biases together; the backward is that linear map's transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from libragrad_fx.errors import ModeError
from libragrad_fx.ops.activation import secant_slope
from libragrad_fx.ops.twin import Grads, twin

aten = torch.ops.aten
Tensors = Sequence[torch.Tensor]


class Held:
    """The non-linearities of a cell: recorded on the first pass, held constant on the second."""

    def __init__(self, squash: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._squash = squash
        self._factors: list[torch.Tensor] = []
        self._next: int | None = None

    def replay(self) -> Held:
        self._next = 0
        return self

    def gate(self, z: torch.Tensor) -> torch.Tensor:
        return self._factor(lambda: torch.sigmoid(z))

    def squash(self, z: torch.Tensor) -> torch.Tensor:
        return self._factor(lambda: secant_slope(z, self._squash(z), 0.0, 1.0)) * z

    def _factor(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._next is None:
            self._factors.append(compute().detach())
            return self._factors[-1]
        self._next += 1
        return self._factors[self._next - 1]


Cell = Callable[[Held, torch.Tensor, Tensors, Tensors], Tensors]


def _lstm(held: Held, x: torch.Tensor, state: Tensors, p: Tensors) -> Tensors:
    h, c = state
    project = p[-1] if len(p) in (3, 5) else None  # proj_size > 0
    b_ih, b_hh = p[2:4] if len(p) >= 4 else (None, None)
    i, f, n, o = (linear(x, p[0], b_ih) + linear(h, p[1], b_hh)).chunk(4, -1)
    c = held.gate(f) * c + held.gate(i) * held.squash(n)
    h = held.gate(o) * held.squash(c)
    return (h if project is None else linear(h, project)), c


def _gru(held: Held, x: torch.Tensor, state: Tensors, p: Tensors) -> Tensors:
    (h,) = state
    b_ih, b_hh = p[2:] if len(p) == 4 else (None, None)
    rx, zx, nx = linear(x, p[0], b_ih).chunk(3, -1)
    rh, zh, nh = linear(h, p[1], b_hh).chunk(3, -1)
    z = held.gate(zx + zh)
    n = held.squash(nx + held.gate(rx + rh) * nh)
    return ((1 - z) * n + z * h,)


def _elman(held: Held, x: torch.Tensor, state: Tensors, p: Tensors) -> Tensors:
    b_ih, b_hh = p[2:] if len(p) == 4 else (None, None)
    return (held.squash(linear(x, p[0], b_ih) + linear(state[0], p[1], b_hh)),)


def _layer(
    cell: Cell, held: Held, x: torch.Tensor, state: Tensors, p: Tensors, reverse: bool
) -> tuple[torch.Tensor, Tensors]:
    """(T, B, I) -> (T, B, H) and the last state: one direction of one layer."""
    outputs = []
    for step in reversed(x.unbind(0)) if reverse else x.unbind(0):
        state = cell(held, step, state, p)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _form(
    cell: Cell, held: Held, x: torch.Tensor, hx: Tensors, params: Tensors, num_layers: int,
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
            y, state = _layer(cell, held, x, [h[at] for h in hx], weights, reverse)
            directions.append(y)
            finals.append(state)
        x = torch.cat(directions, -1)
    states = [torch.stack(s) for s in zip(*finals, strict=True)]
    if not batched:
        return (x.squeeze(1), *(s.squeeze(1) for s in states))
    return (x.transpose(0, 1) if batch_first else x, *states)


def _linearised(
    op: torch._ops.OpOverload, *, input: torch.Tensor, hx: Any, params: Tensors, num_layers: int,
    bidirectional: bool, batch_first: bool, **_: Any,
) -> tuple[Callable[..., Any], Tensors]:  # fmt: skip
    """The layer with its gates held, as a linear function of (input, *states, *params)."""
    cell, squash = _CELLS[op]
    states = list(hx) if op is aten.lstm.input else [hx]
    held, shape = Held(squash), (num_layers, bidirectional, batch_first)
    with torch.no_grad():
        _form(cell, held, input, states, params, *shape)

    def form(x: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        n = len(states)
        return _form(cell, held.replay(), x, rest[:n], rest[n:], *shape)

    return form, states


def bias(op: torch._ops.OpOverload, live: Sequence[str], args: dict[str, Any]) -> Any:
    """What the layer adds by itself: its held form with its live input and states at zero."""
    x = args["input"]
    form, states = _linearised(op, **args)
    states = [
        torch.zeros_like(s) if {"hx", f"hx[{i}]"} & set(live) else s for i, s in enumerate(states)
    ]
    return form(torch.zeros_like(x) if "input" in live else x, *states, *args["params"])


def _recurrent(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def vjp(needs: frozenset[str], g: Any, **args: Any) -> Grads:
        form, states = _linearised(op, **args)
        n = len(states)
        pull = torch.func.vjp(form, args["input"], *states, *args["params"])[1]
        dx, *rest = pull(tuple(g))
        return {
            "input": dx,
            "hx": rest[:n] if op is aten.lstm.input else rest[0],
            "params": rest[n:],
        }

    def forward(*args: Any) -> Any:
        num_layers, dropout, train = args[4:7]
        if train and dropout > 0 and num_layers > 1:
            raise ModeError(
                f"{op}: dropout between recurrent layers draws a mask that a balanced backward cannot"
                " see; transform the model in eval mode, or with dropout=0."
            )
        return op(*args)

    return twin(op, vjp, saves=("input", "hx", "params"), forward=forward)


_CELLS: dict[Any, tuple[Cell, Callable[[torch.Tensor], torch.Tensor]]] = {
    aten.lstm.input: (_lstm, torch.tanh),
    aten.gru.input: (_gru, torch.tanh),
    aten.rnn_tanh.input: (_elman, torch.tanh),
    aten.rnn_relu.input: (_elman, torch.relu),
}
lstm, gru, rnn_tanh, rnn_relu = (_recurrent(op) for op in _CELLS)
