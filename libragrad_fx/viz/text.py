"""Plans, ledgers and certificates as text, for ``print``."""

from __future__ import annotations

import math

from libragrad_fx.types import Action, Certificate, Edit, Ledger, Plan


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A plain-text table, one line for each row, columns padded to their longest cell."""
    if not rows:
        return []
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    line = "  ".join("-" * w for w in widths)
    cells = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]]
    return [cells[0].rstrip(), line, *(c.rstrip() for c in cells[1:])]


def plan_text(plan: Plan) -> str:
    head = ("node", "module", "source", "action", "rule", "reason")
    rows = [(e.node, e.module, e.source, _verb(e), e.rule, e.reason) for e in plan.edits]
    lines = [f"plan: policy {plan.policy} ({plan.digest[:12]}), {len(plan.edits)} edits"]
    lines += table(head, rows)
    for title, findings in (("no rule", plan.unknown), ("left unbalanced", plan.unbalanced)):
        lines += [f"{title}: {f}" for f in findings]
    return "\n".join([*lines, *(f"note: {n}" for n in plan.notes)])


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


def ledger_text(account: Ledger) -> str:
    percent = lambda x: f"{100 * x / (account.output or 1.0):.3g} %"  # noqa: E731
    lines = [
        f"output {account.output:.6g} = input {account.input:.6g} + bias {account.bias:.6g}"
        f" + residuals {account.output - account.input - account.bias:.3g}"
        f" (completeness error {account.completeness_error:.3g}); {len(account.rows)} live nodes",
        "",
        "what the backward loses and creates, by op, in % of the output",
        *table(
            ("op", "nodes", "lost", "created"),
            [
                (op, str(n), *(percent(math.copysign(m, account.output)) for m in moved))
                for op, n, *moved in account.by_op()[:10]
            ],
        ),
        "",
        "nodes, the largest residual first",
        *table(
            ("node", "op", "module", "residual", "% of output", "⟨y,g⟩", "to streams", "to input",
             "to bias", "source"),
            [
                (r.node, r.op, r.module, f"{r.residual:+.3g}", percent(r.residual), f"{r.out:.4g}",
                 f"{r.streams:.4g}", f"{r.sources:.4g}", f"{r.bias:.4g}", r.source)
                for r in account.worst(20)
            ],
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def certificate_text(c: Certificate) -> str:
    def mark(good: bool) -> str:
        return "ok  " if good else "FAIL"

    tol, proved = c.tolerance, sum(c.proof.values())
    lines = [
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
    return "\n".join(lines)
