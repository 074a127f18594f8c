"""The nouns of the pipeline: frozen data, no behaviour but printing.

The stages (``capture`` -> ``normalize`` -> ``analyze`` -> ``plan`` -> ``rewrite`` -> ``verify``) are
functions from one of these to the next.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

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
    """What is done to a backward. CUT, STOP and SCALE insert, the others put a twin in.

    CUT stops operands of an op without a gradient; what it returns requires one all the same.
    """

    KEEP = "keep"
    CUT = "cut"
    STOP = "stop"
    SCALE = "scale"
    SECANT = "secant"
    FREEZE_SCALE = "freeze_scale"
    TEMPER = "temper"
    GAMMA = "gamma"
    Z_PLUS = "z_plus"
    BOX = "box"


class Told:
    """Prints itself as lines and tables, and shows them in notebooks."""

    def __str__(self) -> str:
        from libragrad_fx.viz import text

        return text.as_text(self)

    def _repr_html_(self) -> str:
        from libragrad_fx.viz import text

        return text.as_html(self)


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a rule was written: a file and a line, or the code that added it."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Secant(NamedTuple):
    """f'(0) and f(0) of a function f of one value. Where other arguments decide f(0), it is None."""

    slope: float
    at_zero: float | None


Box = tuple[tuple[float, ...], tuple[float, ...]]
"""The lowest and the highest value of an input: one number each, or one for each channel."""


class Share(NamedTuple):
    """How a sum of products shares what it sends back among its terms (``ops.share``).

    value:   the operand that carries; weight: what it is multiplied with; offsets: what is added
    gamma:   of LRP-γ; without it and a box, z⁺
    axis:    the axis of the channels, from the end, where the box has several numbers
    """

    value: str
    weight: str
    offsets: tuple[str, ...]
    gamma: float | None = None
    box: Box | None = None
    axis: int = -1


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
    like: tuple[str, ...] = ()
    once: tuple[str, ...] = ()
    vjp: str | None = None
    at_zero: float | None = None
    slope: float | None = None
    bias: str = "at_zero"
    rank: int = 0
    degree: float | None = None
    gate_outputs: tuple[int, ...] = ()
    constant: bool = False
    moves: str | None = None
    rowwise: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    fresh: bool = False
    unread: bool = False
    fill: float | str | None = None
    affine_if: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unless: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    registered_by: str | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """Every argument through which a gradient could flow, by schema name."""
        return (*self.stream, *self.factors, *self.gate, *self.denominator)

    @property
    def names(self) -> set[str]:
        """What it may be called in a policy's row: itself, its packet, its kind."""
        return {self.op, ".".join(self.op.split(".")[:2]), self.kind.value}

    @property
    def secant(self) -> Secant | None:
        """Of a function of one value: what its twin is made of."""
        if self.slope is None:
            return None
        return Secant(float(self.slope), None if self.at_zero is None else float(self.at_zero))

    @property
    def twin(self) -> str | None:
        """The name of the balanced twin, which a row names, or which is made for the op."""
        return self.vjp if self.slope is None else self.op.split(".")[1]


@dataclasses.dataclass(frozen=True)
class PolicyRow:
    """One row of a policy file: (kind, site) -> action.

    number:   of ``{scale: 0.25}``
    box:      of ``{box: [-1, 1]}``
    of:       the op or kind that makes the operand ("" for any), a pattern
    scope:    the modules in which it holds ("" for all), which the file calls ``where``
    reads:    "input" if it holds for ops alone that read the model's input, "" for all
    optional: whether a model may have no site for it
    """

    kind: Kind
    site: str
    action: Action
    cite: str
    where: Location
    number: float | None = None
    of: str = ""
    scope: str = ""
    optional: bool = False
    box: Box | None = None
    reads: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.site}"

    @property
    def shares(self) -> bool:
        """Whether it is for sums of products with weights that are constant."""
        return self.action in (Action.GAMMA, Action.Z_PLUS, Action.BOX)

    def __str__(self) -> str:
        made = f" of {self.of}" if self.of else ""
        made += f" that reads the {self.reads}" if self.reads else ""
        return self.name + made + (f" in {self.scope!r}" if self.scope else "")


@dataclasses.dataclass(frozen=True)
class ArgSpec:
    """One tensor leaf of the inputs: its shape, in which a ``str`` dimension is free, and its dtype."""

    path: str
    shape: tuple[int | str, ...]
    dtype: str

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
    zeros:        values that are zero whatever the input
    raw:          values that are the model's input, moved, shifted or scaled at most
    gate_heads:   softmax or sigmoid heads that are all the model returns: balanced as values
    """

    roles: Mapping[str, Role]
    facts: Mapping[str, OpFacts]
    live: frozenset[str]
    relabelled: frozenset[str]
    gate_outputs: tuple[str, ...]
    gate_heads: tuple[str, ...]
    zeros: frozenset[str]
    raw: frozenset[str]
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
    secant: Secant | None
    rule: str
    reason: str
    module: str
    source: str
    temperature: float | None = None
    share: Share | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """What the ledger needs to know of a node that the gradient passes.

    live:     its operands that depend on the input and are not stopped, by schema name
    bias:     how its own constant is computed (a name of ``ops.bias``), None if it has none
    explicit: whether that constant is a term of the op itself (a bias, a beta, ``x + 1``) and not
              the value at zero of a non-linearity
    batch:    for each of its outputs which axis counts samples (or samples times windows), None if
              unknown
    starts:   whether the signal starts here (an embedding indexed by the input)
    """

    node: str
    op: str
    module: str
    source: str
    live: tuple[str, ...]
    bias: str | None
    explicit: bool
    batch: tuple[int | None, ...]
    starts: bool = False


@dataclasses.dataclass(frozen=True)
class Plan(Told):
    """Everything the pass will do, decided before any node moves. Prints as a table.

    unmatched: rows of the policy that are not optional and have no site here
    """

    policy: str
    digest: str
    edits: tuple[Edit, ...]
    unknown: tuple[Finding, ...]
    unbalanced: tuple[Finding, ...]
    notes: tuple[str, ...]
    why: Mapping[str, str] = dataclasses.field(repr=False, default_factory=dict)
    unmatched: tuple[PolicyRow, ...] = ()

    def explain(self, node: str) -> str:
        """Why ``node`` is edited, or why it is left alone (``libragrad plan --why NODE``)."""
        if node not in self.why:
            near = difflib.get_close_matches(node, self.why, 8) or [n for n in self.why if node in n][:8]
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise KeyError(f"the graph has no node {node!r}{hint}")
        return self.why[node]

    def to_json(self) -> str:
        body = {k: v for k, v in dataclasses.asdict(self).items() if k != "why"}
        return json.dumps(body, indent=2)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one pass of the optimiser did.

    changed: nodes that it added, marked or gave another target
    noes:    why a node that it might have changed was left as it is
    """

    name: str
    changed: tuple[str, ...]
    noes: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class History:
    """How a balanced module was made: what is needed to account for it, to prove it and to undo it.

    original:     the captured graph, one line a node (``rewrite.spell``)
    plain_sites:  what the ledger needs to know of the captured graph under autograd
    facts:        by node of the rewritten graph, the row of its op
    lean_facts:   the same of the graph that runs where nobody listens
    passes:       what each pass of the optimiser did to that graph, and why it left the rest
    zeros:        nodes whose value is zero, whatever the input
    gate_outputs: nodes that the model returns and that are gates
    """

    plan: Plan
    original: tuple[str, ...]
    plain_sites: tuple[Site, ...]
    facts: Mapping[str, OpFacts]
    roles: Mapping[str, Role]
    zeros: frozenset[str]
    gate_outputs: frozenset[str]
    lean_facts: Mapping[str, OpFacts] = dataclasses.field(default_factory=dict)
    passes: tuple[Outcome, ...] = ()


class Flow(NamedTuple):
    """What comes back from a node to one of its producers (or inputs of the model).

    mass: ⟨a, r(g)⟩ over all operands that it produced
    norm: ‖r(g)‖ of their gradients together
    """

    producer: str
    mass: float
    norm: float


@dataclasses.dataclass(frozen=True)
class LedgerRow:
    """The law at one node: ``out = streams + sources + bias + residual``, all ⟨·, g⟩ sums.

    out:       ⟨y, g⟩ over all outputs of the node
    streams:   Σ⟨a_i, r_i(g)⟩ over operands that other nodes computed from the model's input
    sources:   the same over operands that are the model's input itself, where the account ends
    bias:      ⟨the op's own constant, g⟩, computed on its own, never as what is left over
    residual:  out - streams - sources - bias; 0 for a balanced node
    flows:     what ``streams`` and ``sources`` are sums of

    The last row, ``output``, is the target: what it reads of the model's outputs.
    """

    node: str
    op: str
    module: str
    source: str
    out: float
    streams: float
    sources: float
    bias: float
    residual: float
    flows: tuple[Flow, ...] = ()

    def moved(self, output: float) -> tuple[float, float]:
        """(lost, created): mass of the output's sign that came in and left by no operand, or left
        and did not come in. One of them is 0."""
        residual = -self.residual if output < 0 else self.residual
        return max(residual, 0.0), max(-residual, 0.0)


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Completeness behind one block: ``output = crossing + bias + error``.

    crossing: Σ⟨a, r(g)⟩ over every edge that leads from the block's end, or from before it, to
              what comes after
    bias:     Σ⟨b, g⟩ over the constants of what comes after
    """

    after: str
    crossing: float
    bias: float
    error: float


@dataclasses.dataclass(frozen=True)
class Ledger(Told):
    """The per-node account of one backward; ``output = input + bias + Σ residual``."""

    rows: tuple[LedgerRow, ...]
    output: float
    input: float
    bias: float
    boundaries: tuple[Boundary, ...] = ()

    @property
    def completeness_error(self) -> float:
        """|⟨x, ∂f/∂x⟩ + Σ⟨b, ∂f/∂b⟩ - f|, in units of the output."""
        return abs(self.input + self.bias - self.output)

    def worst(self, n: int = 10) -> tuple[LedgerRow, ...]:
        """The ``n`` rows with the largest residuals, a residual that is no number first."""
        size = lambda r: math.inf if math.isnan(r.residual) else abs(r.residual)  # noqa: E731
        return tuple(sorted(self.rows, key=size, reverse=True)[:n])

    def by_op(self) -> tuple[tuple[str, int, float, float], ...]:
        """(op, nodes, mass lost, mass created) on the way back, the ops that move most first."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for r in self.rows:
            groups.setdefault(r.op, []).append(r.moved(self.output))
        sums = [(op, len(rs), sum(r[0] for r in rs), sum(r[1] for r in rs)) for op, rs in groups.items()]
        return tuple(sorted(sums, key=lambda s: s[2] + s[3], reverse=True))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


@dataclasses.dataclass(frozen=True)
class Proof:
    """What can be said of every node on a live path without running it.

    balanced: how many nodes are balanced, by the reason why
    open:     the nodes for which no reason was found
    """

    balanced: Mapping[str, int]
    open: tuple[Finding, ...]

    @property
    def nodes(self) -> int:
        return sum(self.balanced.values()) + len(self.open)


@dataclasses.dataclass(frozen=True)
class Certificate(Told):
    """What was checked of one transform, on one input, and what came out.

    forward_equal, max_abs_difference, max_ulp: the outputs against the model's, under grad mode with
                     inputs that require grad; ulp are steps between neighbouring floats
    erased_equal:    the edits taken out, the captured graph comes back node for node
    proof:           see ``Proof``; ``unbalanced`` names what it leaves open
    worst_residual:  of a node, in units of the output; at ``worst_node``
    output, input_share, bias_share: the account of the target, see ``Ledger``; rows of embeddings that
                     inputs choose count as input
    share_as_run:    the input's share by the graph that runs, which computes fewer zeros than the one
                     accounted for; None where the signal starts behind the inputs: it is not compared
    boundaries:      completeness behind every block
    rows:            the ledger, node by node
    cuts:            where capture had to cut the model into several graphs (empty: one graph)
    tolerance:       largest residual and completeness error that count as balanced
    """

    forward_equal: bool
    max_abs_difference: float
    max_ulp: int
    erased_equal: bool
    proof: Mapping[str, int]
    unbalanced: tuple[str, ...]
    worst_residual: float
    worst_node: str
    output: float
    input_share: float
    bias_share: float
    share_as_run: float | None
    completeness_error: float
    boundaries: tuple[Boundary, ...]
    rows: tuple[LedgerRow, ...]
    cuts: tuple[str, ...]
    tolerance: float
    edits: int
    nodes: int
    policy: str
    digest: str
    dtype: str
    device: str
    versions: Mapping[str, str]

    @property
    def boundary_error(self) -> float:
        """The largest completeness error behind a block; a nan is the largest."""
        return max((b.error for b in self.boundaries), key=lambda e: (math.isnan(e), e), default=0.0)

    @property
    def ok(self) -> bool:
        """Forward equal to the bit, edits undone node for node, every live node balanced."""
        return (
            self.forward_equal
            and self.erased_equal
            and not self.unbalanced
            and self.completeness_error <= self.tolerance
            and self.worst_residual <= self.tolerance
            and self.runs_as_accounted
            and self.boundary_error <= self.tolerance
        )

    @property
    def runs_as_accounted(self) -> bool:
        """Whether the graph that runs carries to the input what the account says, as far as checked."""
        share = self.share_as_run
        return share is None or abs(share - self.input_share) <= self.tolerance

    @property
    def input_fraction(self) -> float:
        """How much of what the account moves is carried by the input and not by constants, 0 to 1.

        A backward that stops everything balances as well: its fraction is 0.
        """
        moved = abs(self.input_share) + abs(self.bias_share)
        return abs(self.input_share) / moved if moved else 0.0

    def to_json(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "ok": self.ok}, indent=2)

    @staticmethod
    def from_json(text: str) -> Certificate:
        """A certificate as ``to_json`` wrote it.

        Raises:
            ValueError: it is not one.
        """
        body: Any = json.loads(text)
        fields = {f.name for f in dataclasses.fields(Certificate)}
        if not isinstance(body, dict) or set(body) - {"ok"} != fields:
            raise ValueError("this JSON is not a certificate of this version of libragrad_fx")
        body.pop("ok", None)
        try:
            rows = [
                LedgerRow(**{**r, "flows": tuple(Flow(*f) for f in r["flows"])}) for r in body.pop("rows")
            ]
            boundaries = [Boundary(**b) for b in body.pop("boundaries")]
            lists: Any = {k: tuple(body.pop(k)) for k in ("unbalanced", "cuts")}
        except (TypeError, KeyError) as e:
            raise ValueError(f"this JSON is not a certificate: {e}") from e
        return Certificate(**body, **lists, rows=tuple(rows), boundaries=tuple(boundaries))
