"""Recurrent layers and cells, each as one op that a tracer sees.

PyTorch makes them of steps where a tracer watches: other kernels than it calls without one, and other bits.
"""

from __future__ import annotations

from typing import Any

import torch

from libragrad_fx.kernels import register

aten = torch.ops.aten


def _layer(
    x: torch.Tensor, hx: Any, params: Any, has_biases: bool, num_layers: int, dropout: float, train: bool,
    bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    """What a layer returns, as shapes: the output and the last states."""
    states = hx if isinstance(hx, list) else [hx]
    size = states[0].shape[-1] * (1 + bidirectional)
    turned = batch_first and x.ndim == 3
    sizes = x.transpose(0, 1).shape[:2] if turned else x.shape[:-1]
    y = x.new_empty((*sizes, size))
    return (y.transpose(0, 1) if turned else y, *(s.new_empty(s.shape) for s in states))


def _cell(x: torch.Tensor, hx: Any, *_: Any) -> Any:
    """The new states, as shapes."""
    return tuple(s.new_empty(s.shape) for s in hx) if isinstance(hx, list) else hx.new_empty(hx.shape)


def _one_op(op: Any, shapes: Any) -> Any:
    name, schema = op._schema.name.replace("aten::", "whole_"), str(op._schema)
    return register(name + schema[schema.index("(") :], lambda *args: op(*args), shapes)


_LAYERS = aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input
_CELLS = aten.lstm_cell.default, aten.gru_cell.default
_SHAPES = {**dict.fromkeys(_LAYERS, _layer), **dict.fromkeys(_CELLS, _cell)}
WHOLE: dict[Any, Any] = {op: _one_op(op, shapes) for op, shapes in _SHAPES.items()}
"""By PyTorch's op, the one that a tracer sees."""
