"""All code that names an op: twins with a balanced backward, inserted nodes, spellings of ops.

Comes in: the arguments of an ATen op. Goes out: its result, with a balanced backward.
May import: ``graph``. Begin with ``twin``, then ``activation``. ``ops.yaml`` names what is in ``TWINS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from libragrad_fx.ops import activation, attention, loss, norm, recurrent

_MODULES = (activation, norm, attention, recurrent, loss)

TWINS: dict[str, Callable[..., Any]] = {
    name: fn
    for module in _MODULES
    for name, fn in vars(module).items()
    if callable(fn) and hasattr(fn, "aten_op") and not name.startswith("_")
}
for _name, _fn in TWINS.items():
    _fn.__name__ = _fn.__qualname__ = _name  # two twins may share an ATen op
