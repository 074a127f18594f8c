"""What plans, ledgers and certificates say: lines and tables, as text for ``print`` and as HTML for
notebooks."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from libragrad_fx.types import Action, Certificate, Edit, Ledger, Plan

_BOX = "font:13px/1.5 system-ui,sans-serif;overflow-x:auto"
_LINE = "margin:0;white-space:pre-wrap"
_CELL = "padding:1px 12px 1px 0;text-align:left;white-space:nowrap"


class Table(NamedTuple):
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


Part = str | Table
"""A line, or a table."""


@functools.singledispatch
def parts(shown: Any) -> list[Part]:
    """What is said of it, in order; of classes that do not stand here, what they say themselves."""
    return shown.said()


def as_text(shown: Any) -> str:
    lines = []
    for part in parts(shown):
        lines += [part] if isinstance(part, str) else table(part.head, [*part.rows])
    return "\n".join(lines)


def as_html(shown: Any) -> str:
    """One ``<div>`` without scripts or links."""
    said = (
        f'<p style="{_LINE}">{html.escape(part) or "&nbsp;"}</p>' if isinstance(part, str) else _grid(part)
        for part in parts(shown)
    )
    return f'<div style="{_BOX}">{"".join(said)}</div>'


def _grid(part: Table) -> str:
    lines = [("th", part.head), *(("td", row) for row in part.rows)]
    cells = ("".join(f'<{t} style="{_CELL}">{html.escape(c)}</{t}>' for c in row) for t, row in lines)
    return f"<table>{''.join(f'<tr>{c}</tr>' for c in cells)}</table>" if part.rows else ""


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A plain-text table, one line for each row, columns padded to their longest cell."""
    if not rows:
        return []
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    line = "  ".join("-" * w for w in widths)
    cells = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]]
    return [cells[0].rstrip(), line, *(c.rstrip() for c in cells[1:])]


@parts.register
def _plan(plan: Plan) -> list[Part]:
    head = ("node", "module", "source", "action", "rule", "reason")
    rows = [(e.node, e.module, e.source, _verb(e), e.rule, e.reason) for e in plan.edits]
    said = f"plan: policy {plan.policy} ({plan.digest[:12]}), {len(plan.edits)} edits"
    lines: list[Part] = [said, Table(head, rows)]
    for title, findings in (("no rule", plan.unknown), ("left unbalanced", plan.unbalanced)):
        lines += [f"{title}: {f}" for f in findings]
    return [*lines, *(f"note: {n}" for n in plan.notes)]


def _verb(edit: Edit) -> str:
    what = ", ".join(edit.operands) or "output"
    if edit.action in (Action.STOP, Action.CUT):
        return f"{edit.action} {what}"
    if edit.action is Action.SCALE:
        return f"scale {what} by {edit.factor:g}"
    if edit.temperature is not None:
        return f"temper at {edit.temperature:g}"
    if edit.share is not None:
        number = edit.share.gamma if edit.share.box is None else edit.share.box
        return f"{edit.action} {what}" + ("" if number is None else f" by {number}")
    return f"{edit.action} ({edit.twin})"


@parts.register
def _ledger(account: Ledger) -> list[Part]:
    percent = lambda x: f"{100 * x / (account.output or 1.0):.3g} %"  # noqa: E731
    return [
        f"output {account.output:.6g} = input {account.input:.6g} + bias {account.bias:.6g}"
        f" + residuals {account.output - account.input - account.bias:.3g}"
        f" (completeness error {account.completeness_error:.3g}); {len(account.rows)} live nodes",
        "",
        "what the backward loses and creates, by op, in % of the output",
        Table(
            ("op", "nodes", "lost", "created"),
            [
                (op, str(n), *(percent(math.copysign(m, account.output)) for m in moved))
                for op, n, *moved in account.by_op()[:10]
            ],
        ),
        "",
        "nodes, the largest residual first",
        Table(
            ("node", "op", "module", "residual", "% of output", "⟨y,g⟩", "to streams", "to input",
             "to bias", "source"),
            [
                (r.node, r.op, r.module, f"{r.residual:+.3g}", percent(r.residual), f"{r.out:.4g}",
                 f"{r.streams:.4g}", f"{r.sources:.4g}", f"{r.bias:.4g}", r.source)
                for r in account.worst(20)
            ],
        ),
    ]  # fmt: skip


@parts.register
def _certificate(c: Certificate) -> list[Part]:
    def mark(good: bool) -> str:
        return "ok  " if good else "FAIL"

    tol, proved = c.tolerance, sum(c.proof.values())
    return [
        f"certificate: {'balanced' if c.ok else 'NOT BALANCED'}"
        f" (policy {c.policy}, rules {c.digest[:12]}, {c.dtype} on {c.device})",
        f"  {mark(c.forward_equal)} forward equal to the bit"
        + ("" if c.forward_equal else
           f": largest difference {c.max_abs_difference:.3g}, {c.max_ulp} ulp"),
        f"  {mark(c.erased_equal)} {c.edits} edits over {c.nodes} nodes;"
        " erased, the original graph comes back node for node",
        f"  {mark(not c.unbalanced)} {proved} of {proved + len(c.unbalanced)} nodes on a live"
        " path are balanced by their kind"
        + (f"; not: {', '.join(c.unbalanced)}" if c.unbalanced else ""),
        *(f"         {count:5d}  {reason}" for reason, count in c.proof.items()),
        f"  {mark(c.worst_residual <= tol)} largest residual of a node"
        f" {c.worst_residual:.3g} ({c.worst_node or 'none'}), tolerance {tol:.3g}",
        f"  {mark(c.completeness_error <= tol)} completeness error"
        f" {c.completeness_error:.3g} of output {c.output:.6g}"
        f" = input {c.input_share:.6g} + bias {c.bias_share:.6g}",
        f"  {mark(c.runs_as_accounted)} the graph that runs gives the input"
        f" {c.share_as_run:.6g}" if c.share_as_run is not None else
        "       the graph that runs is not compared: embeddings choose where the signal starts",
        f"  {mark(c.boundary_error <= tol)} behind each of {len(c.boundaries)} blocks, the largest"
        f" completeness error is {c.boundary_error:.3g}",
        *(f"       cut: {c}; a gate that crosses it is taken for a value" for c in c.cuts),
        f"       the input carries {c.input_fraction:.1%} of what the account moves",
    ]  # fmt: skip
