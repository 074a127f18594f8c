"""The public functions: they call the stages, and account for the result."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from libragrad_fx.account.birth import (
    reference,
    require_balanced,
    require_same,
    require_same_gradient,
    require_same_sizes,
)
from libragrad_fx.account.certificate import certify
from libragrad_fx.account.ledger import ledger, ledger_and_forward, share_as_run
from libragrad_fx.capture.examples import example_call, infer_inputs
from libragrad_fx.capture.free import FIXED, Free
from libragrad_fx.capture.state import untouched
from libragrad_fx.errors import (
    CaptureError,
    ExportError,
    GateOutputWarning,
    InputError,
    UnknownOpError,
    VerificationError,
)
from libragrad_fx.module.captured import CapturedModule, InGraphs
from libragrad_fx.module.changes import Tree
from libragrad_fx.module.variants import Origin, fitting
from libragrad_fx.pieces.dynamo import CutModule, transform_in_pieces
from libragrad_fx.pieces.tape import transform_by_tape
from libragrad_fx.stages import ONE_AT_A_TIME, balance, decide, plain
from libragrad_fx.target import Arguments, as_call, largest
from libragrad_fx.types import Certificate, Ledger, Plan


def transform(
    model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    policy: str | Path = "libra",
    on_unknown: str = "raise",
    rules: Any = None,
    check: bool = True,
    dynamic: Mapping[str, Any] | None = None,
) -> CapturedModule | CutModule:
    """A ``torch.fx.GraphModule`` with the same forward to the bit, and a balanced backward.

    It shares the model's parameters. The model is not changed, whatever happens: not its parameters, mode,
    hooks or ``requires_grad``. A model that is no single graph (it branches on a tensor's value) is cut
    into several, each balanced by itself; the result is then a ``CutModule``, whose certificate says where.

    Args:
        model: any ``nn.Module``, in the mode (train or eval) to be captured.
        example_inputs: a tensor, a tuple, or a dict of keyword arguments; inferred from the model
            if None. Axis 0 of each tensor becomes free, and so does the length of tokens. For a call that
            does not fit (another shape, container, dtype or constant), the original is captured again and
            the graph kept, as long as the process holds the original.
        policy: ``"libra"`` (LibraGrad, CVPR 2025), another of ``rules/README.md``, or a YAML file.
        on_unknown: ``"raise"`` lists every op on a live gradient path that no rule covers;
            ``"keep"`` leaves autograd's gradient there and says so in the plan.
        rules: facts to add: a YAML file, or a list of mappings (see ``rules/README.md``).
        check: run the original twice before and the result twice after; require the same bits (for a
            batch of one as well), of the captured graph the model's own gradient, and a ledger that adds
            up. It costs these forwards, two more, and three backwards. Without it, ``verify`` notices
            what capture lost of the forward, and nothing what it lost of the gradient.
        dynamic: more free axes: by argument of ``forward``, axes with a name or a ``torch.export.Dim``
            (``{"x": {2: "height", 3: "width"}}``); for a container, one such entry for each member. Other
            sizes work without it, but each gets a graph of its own.

    Raises:
        CaptureError, InputError, RuleError, UnknownOpError, VerificationError: see
            ``libragrad_fx.errors``.
    """
    if isinstance(model, InGraphs):
        return _again(model, policy, on_unknown, rules)
    options = {"policy": policy, "on_unknown": on_unknown, "rules": rules, "check": check}
    named = _named(model, dynamic)
    with ONE_AT_A_TIME:  # a second transform, of this model or another, waits
        try:
            return _one_graph(model, example_inputs, named, **options)
        except ExportError as refusal:
            return _other_rungs(model, example_inputs, refusal, **options)


def _named(model: torch.nn.Module, dynamic: Any) -> Mapping[str, Any]:
    """``dynamic``, if it names arguments that ``model`` takes."""
    if dynamic is None:
        return {}
    if not isinstance(dynamic, Mapping):
        raise InputError(
            f"dynamic maps arguments of forward to axes ({{'x': {{1: 'length'}}}}); got {dynamic!r:.80}"
        )
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dynamic
    if unknown := [name for name in dynamic if name not in parameters]:
        raise InputError(
            f"dynamic: forward takes no {', '.join(map(str, unknown))}; it takes {', '.join(parameters)}"
        )
    return dynamic


def _other_rungs(
    model: torch.nn.Module, inputs: Any, refusal: ExportError, on_unknown: str, check: bool,
    balanced: bool = True, **options: Any,
) -> CutModule:  # fmt: skip
    """A model that is no single graph: several graphs by Dynamo, or else a recording of each call."""
    with untouched(model):
        args, kwargs = example_call(model, inputs)
        known = reference(model, args, kwargs) if check else None
    kwargs = dict(known.kwargs) if known is not None else kwargs
    call = (model, args, kwargs, known, refusal, on_unknown, balanced)
    try:
        return transform_in_pieces(*call, **options)
    except (CaptureError, UnknownOpError, VerificationError) as second:
        try:
            return transform_by_tape(*call, **options)
        except CaptureError as third:
            raise CaptureError(f"{second}\n  Recorded while it ran: {third}") from third


def _one_graph(
    model: torch.nn.Module, inputs: Any, dynamic: Mapping[str, Any], **options: Any
) -> CapturedModule:
    """``transform`` for a model that is one graph, with as many free sizes as the model allows."""
    free: Free | None = Free(named=dynamic)
    while True:
        made = decide(model, inputs, free=free, **options)
        try:
            module = balance(made)
            if made.reference is not None:
                require_same(model, module, made.reference)
                require_same_sizes(model, module, made.reference)
                require_same_gradient(model, plain(made), made.reference)
            break
        except VerificationError as e:
            free = made.free.fewer()
            if free is None:  # the next rung may do better
                raise ExportError(str(e)) from e
            if dynamic and free is FIXED:
                raise InputError(f"dynamic: with these sizes free, {e}") from e
    if made.reference is not None and options["on_unknown"] == "raise":
        require_balanced(module, made.reference)
    for name in made.analysis.gate_heads:
        text = next(n for n in made.plan.notes if name in n)
        warnings.warn(text, GateOutputWarning, stacklevel=3)
    return _recapturable(module, model, lambda m, call: _one_graph(m, call, dynamic, **options))


@dataclasses.dataclass(frozen=True)
class _Recapture:
    """Captures the original once more, for another call."""

    original: Callable[[], torch.nn.Module | None]
    tree: Tree
    capture: Callable[[torch.nn.Module, Any], CapturedModule]

    def __call__(self, args: Any, kwargs: Any) -> CapturedModule:
        model = self.original()
        if model is None:
            raise InputError("the original model is gone")
        self.tree.require_unchanged()
        return self.capture(model, Arguments(tuple(args), kwargs))

    def weakly(self) -> _Recapture:
        """The same, but it does not keep the original in memory."""
        model = self.original()
        return self if model is None else dataclasses.replace(self, original=weakref.ref(model))


def _recapturable(module: CapturedModule, model: torch.nn.Module, capture: Any) -> CapturedModule:
    vars(module)["origin"] = Origin(_Recapture(lambda: model, Tree(model), capture))
    return module


def _again(module: Any, policy: str | Path, on_unknown: str, rules: Any) -> Any:
    """A balanced module is returned if the policy is the same; for another, the original is needed."""
    made: Plan | None = module.plan
    if made is not None and (made.policy, rules) == (policy, None) and on_unknown in ("raise", "keep"):
        return module
    raise InputError(
        f"this module was captured already (policy {made.policy if made else None});"
        f" transform the original model to apply policy={str(policy)!r:.80}, on_unknown={on_unknown!r:.80}"
        f"{', rules' if rules is not None else ''}"
    )


def trace(model: torch.nn.Module, example_inputs: Any = None, *, rules: Any = None) -> CapturedModule:
    """The captured model with autograd's own backward, for any call: the plain side of every comparison.

    Raises:
        CaptureError: as ``transform``; and where the model is no single graph.
    """
    try:
        made = decide(model, example_inputs, "libra", "keep", rules)
    except ExportError as e:
        raise ExportError(f"{e}\n  transform() may balance it in several graphs; a trace is one.") from e
    return _recapturable(plain(made), model, lambda m, call: trace(m, call, rules=rules))


def plan(
    model: torch.nn.Module,
    example_inputs: Any = None,
    *,
    policy: str | Path = "libra",
    on_unknown: str = "keep",
    rules: Any = None,
) -> Plan:
    """What ``transform`` would do, and why. Print it, or ask ``plan.explain(node)``."""
    return decide(model, example_inputs, policy, on_unknown, rules).plan


def verify(
    model: torch.nn.Module,
    module: InGraphs,
    inputs: Any,
    target: Any = None,
    *,
    tolerance: float | None = None,
) -> Certificate:
    """Check every promise on one input: bits, the erased graph, each node's law, completeness.

    Args:
        model: the original.
        module: its transform.
        inputs: what to run both on, as for ``transform``.
        target: what to explain, as in Captum (int, tuple, tensor, list) or a callable.
        tolerance: the largest residual and completeness error that still counts as balanced, in units
            of the output; by default a thousand ulp (8 in half precision) of the ledger's largest number.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"expected the original nn.Module, got {type(model).__name__}")
    if not isinstance(tolerance, (int, float, type(None))):
        raise InputError(f"tolerance is a number or None, got {tolerance!r:.80}")
    if not isinstance(module, InGraphs):
        raise InputError(
            "verify(model, module, inputs): the second is the result of transform,"
            f" not {type(module).__name__}"
        )
    module = fitting(module, inputs)
    if any(g.plan is None for g in module.captured_graphs.values()):
        raise InputError("a plain trace promises nothing to verify; audit(module, inputs) accounts for it")
    account, forward = ledger_and_forward(module, inputs, target)
    share = share_as_run(module, forward, inputs, target)
    return certify(model, module, inputs, account, forward, share, tolerance)


def audit(model: torch.nn.Module, inputs: Any, target: Any = None, *, rules: Any = None) -> Ledger:
    """The ledger of a model, balanced or not: which nodes create or destroy gradient mass."""
    module = model if isinstance(model, InGraphs) else unbalanced(model, inputs, rules)
    return ledger(fitting(module, inputs), inputs, target)


def unbalanced(model: torch.nn.Module, inputs: Any, rules: Any = None) -> CapturedModule | CutModule:
    """The captured model with autograd's own backward; cut or recorded if it is no single graph."""
    try:
        return trace(model, inputs, rules=rules)
    except ExportError as refusal:
        options = {"balanced": False, "policy": "libra", "rules": rules}
        return _other_rungs(model, inputs, refusal, "keep", True, **options)


def visualize(
    model: torch.nn.Module,
    path: str | Path,
    inputs: Any = None,
    target: Any = None,
    *,
    view: Literal["graph", "streams", "model-explorer"] = "graph",
    depth: int = 2,
    focus: str = "",
) -> Path:
    """Draw where autograd creates and destroys gradient mass, and what balancing does about it.

    Every number is that of ``audit``, of the plain and of the balanced backward on the same input.

    Args:
        model: any model, or the result of ``transform``.
        path: its ending decides: .html (an explorer in one file), .svg, .png, .pdf (by Graphviz),
            .dot, .json (every op, for networkx).
        inputs: as for ``audit``; random numbers of a guessed shape if None.
        target: as for ``audit``; the largest entry of each sample's output if None.
        view: ``graph``; ``streams``, the mass that comes back over the residual stream and each branch
            (.svg, .png, .pdf); ``model-explorer``, .json for Google's Model Explorer, with an overlay
            file for each side.
        depth: how many parts of a module path are drawn apart, an op's own name being the last. All that
            is deeper is one node; so are equal modules in a row, except the first and the last.
        focus: path of a module to draw op by op; a static picture shows only it and its neighbours.

    Raises:
        InputError: an unknown ending, a path that cannot be written, a ``focus`` without nodes, inputs
            that cannot be inferred, no join to draw a stream of, a number that is not finite.
        LibraGradError: the extra ``graph`` is missing.
    """
    from libragrad_fx.viz.write import check_path, write

    check_path(path, view)
    if depth < 1:
        raise InputError(f"depth is at least 1, got {depth}")
    graph = gradient_graph(model, inputs, target)
    modules = {d["module"] for _, d in graph.nodes(data=True)}
    if focus and not any(m == focus or m.startswith(f"{focus}.") for m in modules):
        raise InputError(f"no op of a module {focus!r} is in the gradient graph")
    return write(graph, path, view, depth, focus)


def gradient_graph(model: torch.nn.Module, inputs: Any = None, target: Any = None) -> Any:
    """The graph that ``visualize`` draws, as a ``networkx.DiGraph``: see ``viz.graph``."""
    from libragrad_fx.viz import graph as pictures  # here, so that only drawing imports networkx

    gm, inputs = _balanced_with_inputs(model, inputs)
    if target is None:
        args, kwargs = as_call(inputs)
        with torch.no_grad():
            target = largest(gm(*args, **kwargs))
    graph = pictures.gradient_graph(gm, inputs, target)
    graph.graph["title"] = "transformed model" if gm is model else type(model).__name__
    return graph


def _balanced_with_inputs(model: torch.nn.Module, inputs: Any) -> tuple[Any, Any]:
    if isinstance(model, InGraphs):
        if inputs is None:
            raise InputError(
                "inputs=None works on an original model only; pass inputs for a transformed one"
            )
        return fitting(model, inputs), inputs
    if inputs is None:
        args, kwargs = infer_inputs(model)
        inputs = kwargs or args
    return transform(model, inputs, on_unknown="keep"), inputs
