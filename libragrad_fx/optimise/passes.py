"""The optimiser's passes, in order. Their result, the lean graph, runs unless a submodule has a hook.

The balanced graph defines the backward. Much of what it would compute is zero, or the same at each call.
No pass changes the forward or the gradients, and each can be switched off:

    LIBRAGRAD_PASSES_OFF=token,features   switches these two off
    LIBRAGRAD_DEBUG=passes                prints what each pass did, and why it left other nodes alone

The input graph has no probes: those serve hooks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from torch.fx import Graph

from libragrad_fx.decide.flow import Facts
from libragrad_fx.errors import InputError
from libragrad_fx.graph.notes import note
from libragrad_fx.ops import binding
from libragrad_fx.optimise import features, fuse, narrow, reuse, scales
from libragrad_fx.optimise.work import Work
from libragrad_fx.types import Outcome


class Pass(NamedTuple):
    """One pass. does: its effect, in a line."""

    name: str
    run: Callable[[Work], None]
    does: str


PASSES = (
    Pass("dropouts", reuse.dropouts, "a dropout that drops nothing is its argument"),
    Pass("token", narrow.narrow, "if one token is read, the gradient comes back through it alone"),
    Pass("features", features.graft_live, "a fused projection back-propagates its live features alone"),
    Pass("halves", scales.halve, "a product and the halving of its gradient are one op"),
    Pass("joins", scales.merge, "cat([s·a, s·b]) is s·cat([a, b]): one gradient scale in place of n"),
    Pass("gates", fuse.mark, "a gated activation and its product are one op, which keeps two tensors"),
    Pass("constants", reuse.constants, "constant folding: values that depend on no input and no parameter"),
    Pass("slices", reuse.slices, "x[:] is x"),
    Pass("steps", reuse.steps, "the selects of an axis become one unbind"),
    Pass("memory", reuse.memory, "an op writes over its operand if that is not read again"),
    Pass("bindings", lambda work: binding.mark(work.graph), "an op is called by PyTorch's own function"),
)  # fmt: skip


def optimise(
    graph: Graph, facts: Facts, off: Collection[str] | None = None
) -> tuple[Graph, Facts, tuple[Outcome, ...]]:
    """Run the passes. Returns the lean graph, the facts about its ops, and what each pass did.

    Args:
        graph: balanced, without probes, with traced values in ``meta["val"]``; it is changed in place.
        facts: by node, the row of its op.
        off: names of passes to switch off; by default those in ``LIBRAGRAD_PASSES_OFF``.

    Raises:
        InputError: no pass has such a name.
    """
    if off is None:
        off = os.environ.get("LIBRAGRAD_PASSES_OFF", "").replace(",", " ").split()
    names = [p.name for p in PASSES]
    if unknown := [n for n in off if n not in names]:
        raise InputError(f"there is no pass {', '.join(unknown)}; there are {', '.join(names)}")
    done = []
    before = _state(graph)
    for step in PASSES:
        if step.name not in off:
            work = Work(graph, dict(facts))
            step.run(work)
            facts, after = work.facts, _state(graph)
            changed = [name for name, state in after.items() if before.get(name) != state]
            before = after
            done.append(Outcome(step.name, tuple(changed), work.noes))
    graph.lint()
    if "passes" in os.environ.get("LIBRAGRAD_DEBUG", ""):
        print(explain(done))
    return graph, facts, tuple(done)


def explain(done: Sequence[Outcome]) -> str:
    """As text: what each pass changed, and how many nodes it left alone for which reason."""
    lines = []
    for outcome in done:
        does = next(p.does for p in PASSES if p.name == outcome.name)
        lines.append(f"{outcome.name:<10} {len(outcome.changed):>5} nodes  {does}")
        for reason, times in Counter(outcome.noes.values()).most_common():
            first = next(n for n, r in outcome.noes.items() if r == reason)
            lines.append(f"{'':<10} {times:>5} left   {reason} ({first}{', …' if times > 1 else ''})")
    return "\n".join(lines)


def _state(graph: Graph) -> dict[str, object]:
    return {n.name: (n.target, note(n), tuple(n.all_input_nodes)) for n in graph.nodes}
