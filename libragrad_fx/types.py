"""The nouns of the pipeline: frozen data, no behaviour but printing.

The stages (``capture`` -> ``normalize`` -> ``analyze`` -> ``plan`` -> ``rewrite`` -> ``verify``) are
functions from one of these to the next.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from typing import Any

import torch


class Role(enum.IntEnum):
    """What a float value is to the gradient; ordered so that a join is ``max``.

    STATIC  does not depend on the model's input (weights, masks, rotary tables)
    CUT     depends on the input, but no gradient leads back to it (integers, ``detach``, ``round``)
    GATE    depends on the input and only modulates (attention weights, sigmoid gates, 1/sigma)
    VALUE   carries the signal
    """

    STATIC = 0
    CUT = 1
    GATE = 2
    VALUE = 3


class Kind(enum.StrEnum):
    """The algebraic class of an op: a fact, true whatever the attribution method."""

    LINEAR = "linear"
    HOMOGENEOUS = "homogeneous"
    SATURATING = "saturating"
    GATE_SOURCE = "gate_source"
    GATED = "gated"
    NORMALISER = "normaliser"
    PRODUCT = "product"
    ATTENTION = "attention"
    RECURRENT = "recurrent"
    EMBEDDING = "embedding"
    CUT = "cut"


class Action(enum.StrEnum):
    """What a policy may do to a backward. The first three insert, the others put a twin in."""

    KEEP = "keep"
    STOP = "stop"
    SCALE = "scale"
    SECANT = "secant"
    FREEZE_SCALE = "freeze_scale"


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a rule was written: a file and a line, or the code that added it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class OpFacts:
    """One row of ``rules/ops.yaml``: what is true of an op (grammar in ``rules/README.md``)."""

    op: str
    kind: Kind
    why: str
    where: Location
    stream: tuple[str, ...] = ()
    factors: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    denominator: tuple[str, ...] = ()
    vjp: str | None = None
    at_zero: float | None = None
    bias: str = "at_zero"
    rank: int = 0
    degree: float | None = None
    gate_outputs: tuple[int, ...] = ()
    affine_if: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def operands(self) -> tuple[str, ...]:
        """Every argument through which a gradient could flow, by schema name."""
        return (*self.stream, *self.factors, *self.gate, *self.denominator)


@dataclasses.dataclass(frozen=True)
class PolicyRow:
    """One row of a policy file: (kind, site) -> action."""

    kind: Kind
    site: str
    action: Action
    cite: str
    where: Location

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.site}"


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One tensor leaf of the inputs: dtype class and shape; a ``str`` dimension is free."""

    path: str
    shape: tuple[int | str, ...]
    floating: bool

    def __str__(self) -> str:
        return f"{self.path}: ({', '.join(map(str, self.shape))})"


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """One call of a submodule: structures of graph nodes, complete right after node ``after``."""

    path: str
    after: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


@dataclasses.dataclass(frozen=True)
class Trace:
    """A captured model: ``module`` runs the graph in normal form and shares the model's parameters.

    calls: the module calls of the original, in order of their ends
    notes: what capture had to decide, in words a user can act on
    """

    module: torch.fx.GraphModule
    inputs: tuple[ArgSpec, ...]
    calls: tuple[ModuleCall, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph


@dataclasses.dataclass(frozen=True)
class Finding:
    """A place on a live path that the rules do not cover, and what to do about it."""

    node: str
    op: str
    module: str
    source: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return (
            f"{self.node}: {self.op} in {self.module or '(root)'} at {self.source or '(no source)'}\n"
            f"    {self.problem}\n    -> {self.remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Roles of all values, and which nodes the balanced gradient passes through.

    facts:       node -> the row that holds for it (absent: no tensor operand, or no row)
    live:        nodes that a gradient from the outputs to the input passes through, once gates hold
    relabelled:  gate sources that turned out to carry the signal (role VALUE by demand)
    gate_outputs: outputs of the model that are gates beside one that carries: left alone
    gate_heads:   softmax or sigmoid heads that are all the model returns: balanced as values
    """

    roles: Mapping[str, Role]
    facts: Mapping[str, OpFacts]
    live: frozenset[str]
    relabelled: frozenset[str]
    gate_outputs: tuple[str, ...]
    gate_heads: tuple[str, ...]
    unruled: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Edit:
    """One change of the backward. ``operands`` are schema names, empty for the node's output."""

    node: str
    op: str
    action: Action
    operands: tuple[str, ...]
    factor: float | None
    twin: str | None
    rule: str
    reason: str
    module: str
    source: str


@dataclasses.dataclass(frozen=True)
class Site:
    """What the ledger needs to know of a node that the gradient passes.

    live:     its operands that depend on the input and are not stopped, by schema name
    bias:     how its own constant is computed (a name of ``ops.bias``), None if it has none
    explicit: whether that constant is a term of the op itself (a bias, a beta, ``x + 1``) and not
              the value at zero of a non-linearity
    batch:    which axis of its output counts samples (or samples times windows), None if unknown
    """

    node: str
    op: str
    module: str
    source: str
    live: tuple[str, ...]
    bias: str | None
    explicit: bool
    batch: int | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything the pass will do, decided before any node moves. Prints as a table."""

    policy: str
    digest: str
    edits: tuple[Edit, ...]
    unknown: tuple[Finding, ...]
    unbalanced: tuple[Finding, ...]
    notes: tuple[str, ...]
    why: Mapping[str, str] = dataclasses.field(repr=False, default_factory=dict)

    def explain(self, node: str) -> str:
        """Why ``node`` is edited, or why it is left alone (``libragrad plan --why NODE``)."""
        if node not in self.why:
            near = [n for n in self.why if node in n][:8]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise KeyError(f"the graph has no node {node!r}{hint}")
        return self.why[node]

    def to_json(self) -> str:
        body = {k: v for k, v in dataclasses.asdict(self).items() if k != "why"}
        return json.dumps(body, indent=2)

    def __str__(self) -> str:
        head = ("node", "module", "source", "action", "rule", "reason")
        rows = [(e.node, e.module, e.source, _verb(e), e.rule, e.reason) for e in self.edits]
        lines = [f"plan: policy {self.policy} ({self.digest[:12]}), {len(self.edits)} edits"]
        lines += table(head, rows)
        for title, findings in (("no rule", self.unknown), ("left unbalanced", self.unbalanced)):
            lines += [f"{title}: {f}" for f in findings]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def _verb(edit: Edit) -> str:
    what = ", ".join(edit.operands) or "output"
    if edit.action is Action.STOP:
        return f"stop {what}"
    if edit.action is Action.SCALE:
        return f"scale {what} by {edit.factor:g}"
    return f"{edit.action} ({edit.twin})"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Plain-text table, one line a row, columns padded to their longest cell."""
    if not rows:
        return []
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    line = "  ".join("-" * w for w in widths)
    cells = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [head, *rows]]
    return [cells[0].rstrip(), line, *(c.rstrip() for c in cells[1:])]


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """The law at one node: ``out = streams + bias + residual``, all ⟨·, g⟩ sums.

    out:       ⟨y, g⟩ over all outputs of the node
    streams:   Σ⟨a_i, r_i(g)⟩ over operands that depend on the model's input
    bias:      ⟨the op's own constant, g⟩, computed on its own, never as what is left over
    residual:  out - streams - bias; 0 for a balanced node
    """

    node: str
    op: str
    module: str
    source: str
    out: float
    streams: float
    bias: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Ledger:
    """The per-node account of one backward; ``output = input + bias + Σ residual``."""

    rows: tuple[LedgerRow, ...]
    output: float
    input: float
    bias: float

    @property
    def completeness_error(self) -> float:
        """|⟨x, ∂f/∂x⟩ + Σ⟨b, ∂f/∂b⟩ - f|, in units of the output."""
        return abs(self.input + self.bias - self.output)

    def worst(self, n: int = 10) -> tuple[LedgerRow, ...]:
        return tuple(sorted(self.rows, key=lambda r: -abs(r.residual))[:n])

    def __str__(self) -> str:
        head = ("node", "op", "module", "⟨y,g⟩", "to streams", "bias", "residual", "source")
        rows = [
            (r.node, r.op, r.module, f"{r.out:.4g}", f"{r.streams:.4g}", f"{r.bias:.4g}",
             f"{r.residual:+.3g}", r.source)
            for r in self.worst(20)
        ]  # fmt: skip
        total = (
            f"output {self.output:.6g} = input {self.input:.6g} + bias {self.bias:.6g}"
            f" (completeness error {self.completeness_error:.3g}); {len(self.rows)} live nodes,"
            f" worst residuals first:"
        )
        return "\n".join([total, *table(head, rows)])


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was checked of one transform, on one input, and what came out."""

    forward_equal: bool
    max_abs_difference: float
    erased_equal: bool
    unbalanced: tuple[str, ...]
    worst_residual: float
    worst_node: str
    output: float
    input_share: float
    bias_share: float
    completeness_error: float
    tolerance: float
    edits: int
    nodes: int
    policy: str
    digest: str
    dtype: str
    device: str
    versions: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Forward equal to the bit, edits undone node for node, every live node balanced."""
        return (
            self.forward_equal
            and self.erased_equal
            and not self.unbalanced
            and self.completeness_error <= self.tolerance
            and self.worst_residual <= self.tolerance
        )

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "ok": self.ok}, indent=2)

    @staticmethod
    def from_json(text: str) -> Certificate:
        body: dict[str, Any] = json.loads(text)
        body.pop("ok", None)
        return Certificate(**{**body, "unbalanced": tuple(body["unbalanced"])})

    def __str__(self) -> str:
        def mark(good: bool) -> str:
            return "ok  " if good else "FAIL"

        tol = self.tolerance
        lines = [
            f"certificate: {'balanced' if self.ok else 'NOT BALANCED'}"
            f" (policy {self.policy}, rules {self.digest[:12]}, {self.dtype} on {self.device})",
            f"  {mark(self.forward_equal)} forward equal to the bit"
            f" (largest difference {self.max_abs_difference:.3g})",
            f"  {mark(self.erased_equal)} {self.edits} edits over {self.nodes} nodes;"
            " erased, the original graph comes back node for node",
            f"  {mark(not self.unbalanced)} every node on a live path is balanced by a rule"
            + (f"; not: {', '.join(self.unbalanced)}" if self.unbalanced else ""),
            f"  {mark(self.worst_residual <= tol)} largest residual of a node"
            f" {self.worst_residual:.3g} ({self.worst_node or 'none'}), tolerance {tol:.3g}",
            f"  {mark(self.completeness_error <= tol)} completeness error"
            f" {self.completeness_error:.3g} of output {self.output:.6g}"
            f" = input {self.input_share:.6g} + bias {self.bias_share:.6g}",
        ]
        return "\n".join(lines)
