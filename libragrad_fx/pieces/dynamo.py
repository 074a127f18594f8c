"""Models that are no single graph: Dynamo cuts them into several, and each is balanced by itself.

If ``torch.export`` refuses a model (a branch on a tensor's value, a call into numpy), Dynamo runs it as
graphs with Python between them. Every graph goes through the same stages as a whole model. The law holds
from end to end, because it holds in every graph and the Python between them passes tensors on unchanged.
But roles end at a cut: a gate that one graph computes and another uses counts as a value there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from libragrad_fx.account.birth import Reference, require_balanced, require_same, require_same_gradient
from libragrad_fx.capture.normal import paths_of
from libragrad_fx.capture.state import copied, untouched
from libragrad_fx.decide import rulebook
from libragrad_fx.decide.plan import require_matched
from libragrad_fx.errors import (
    CaptureError,
    CutWarning,
    NoPathError,
    RuleError,
    UnknownOpError,
    VerificationError,
)
from libragrad_fx.extras import quiet
from libragrad_fx.graph.origin import short_place
from libragrad_fx.module.captured import TREE, CapturedModule, Forward, InGraphs, RunGraph, unshare
from libragrad_fx.stages import balance, decide, plain
from libragrad_fx.target import differentiable, inexact, undisturbed
from libragrad_fx.types import Finding, Plan, Role

_STATIC = "_libragrad_static"  # set on tensors that a graph returns and that no input reaches
_LIMIT = {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}
INPUT, MOVES, STILL, HELD = "input", "moves", "still", "held"


class _Piece(nn.Module):
    """One of Dynamo's graphs as a model of its own. Computed tensors are its arguments, whether they depend
    on the input (``MOVES``) or not (``STILL``); the model's own tensors, and non-tensors, are ``HELD``."""

    def __init__(self, body: torch.fx.GraphModule, args: tuple[Any, ...], kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.body, self.kinds = body, kinds
        for i, (a, kind) in enumerate(zip(args, kinds, strict=True)):
            if isinstance(a, nn.Parameter):  # as a parameter: PyTorch picks kernels by requires_grad
                self.register_parameter(f"held_{i}", a)
            elif isinstance(a, torch.Tensor) and kind == HELD:
                self.register_buffer(f"held_{i}", a)
            elif kind == HELD:
                setattr(self, f"held_{i}", a)

    def forward(self, *given: torch.Tensor) -> Any:
        one = iter(given)
        names = [f"held_{i}" if k == HELD else "" for i, k in enumerate(self.kinds)]
        return self.body(*(getattr(self, name) if name else next(one) for name in names))


@dataclasses.dataclass
class Run:
    """One forward of a cut module.

    leaves:  the tensors among the arguments, by path (``Forward.leaves``)
    own:     by ``id``, the model's parameters and buffers
    by:      runs the pieces in place of their own forward
    moves:   by autograd node, whether it leads to the input
    pieces:  the graphs that ran, by name
    foreign: autograd's names of ops that ran between graphs and depend on the input
    over:    whether the forward has ended
    """

    leaves: dict[str, torch.Tensor]
    own: dict[int, torch.Tensor]
    by: RunGraph | None
    moves: dict[Any, bool] = dataclasses.field(default_factory=dict)
    pieces: dict[str, CapturedModule] = dataclasses.field(default_factory=dict)
    foreign: set[str] = dataclasses.field(default_factory=set)
    over: bool = False

    def refuse_early(self, g: torch.Tensor) -> None:
        """A hook on the outputs of graphs: a gradient taken inside the forward would be balanced."""
        if not self.over:
            raise CaptureError(
                "the model differentiates itself in its forward: a balanced backward would change what"
                " it computes"
            )

    def depends(self, x: torch.Tensor) -> bool:
        """Whether a tensor between two graphs depends on the model's input."""
        if getattr(x, _STATIC, False) or isinstance(x, nn.Parameter):
            return False
        if not inexact(x) or any(x is i for i in self.leaves.values()):
            return True
        return x.grad_fn is not None and self._leads(x.grad_fn)

    def _leads(self, node: Any) -> bool:
        """Whether an autograd node leads to the input; eager ops on the way are noted in ``foreign``."""
        if node not in self.moves:
            if (variable := getattr(node, "variable", None)) is not None:
                return any(variable is i for i in self.leaves.values())
            found = [self._leads(n) for n, _ in node.next_functions if n is not None]
            self.moves[node] = any(found)
            if any(found):
                self.foreign.add(node.name().removesuffix("Backward0").lower())
        return self.moves[node]


class CutModule(InGraphs):
    """A model in several balanced graphs: same forward, same parameters, balanced backward.

    It runs the model's own Python, so control flow on tensor values works; each forward may run
    other graphs than the last. Made by ``transform`` where one graph cannot be had.
    """

    _model: nn.Module
    _compiled: Callable[..., Any]

    def __init__(
        self, model: nn.Module, refusal: str, options: Mapping[str, Any], on_unknown: str,
        balanced: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.balanced = balanced  # False: autograd's own backward, for ``audit``
        try:
            own = copied(model)
        except Exception as e:
            raise CaptureError(
                f"{type(model).__name__} is no single graph, and cannot be copied to be run in several"
                f" (copy.deepcopy: {type(e).__name__}: {e})"
            ) from e
        # share the copy's module tree, so that names and state are the model's
        self.__dict__.update(_model=own, **{k: vars(own)[k] for k in TREE})
        self.training = model.training
        self.refusal, self.options, self.on_unknown = refusal, dict(options), on_unknown
        self._reset()

    def _reset(self) -> None:
        self.pieces: dict[str, CapturedModule] = {}
        self.cuts: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()  # of the captures
        self._local = threading.local()
        compiled = torch.compile(self._model, backend=self._backend, dynamic=False)
        self.__dict__["_compiled"] = compiled  # not a submodule

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("pieces", "cuts", "notes", "_local", "_compiled")
        return {k: v for k, v in vars(self).items() if k not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def train(self, mode: bool = True) -> CutModule:
        self._model.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        unshare(self)
        super()._apply(fn, recurse)
        self._reset()
        return self

    @property
    def plan(self) -> Plan | None:
        """The edits of all graphs that have run so far; node names start with the graph's name."""
        if not self.balanced:
            return None
        plans = [(name, p.history.plan) for name, p in self.pieces.items()]

        def joined(field: str) -> Any:
            rows = ((name, x) for name, p in plans for x in getattr(p, field))
            return tuple(dataclasses.replace(x, node=f"{name}/{x.node}") for name, x in rows)

        notes = (self.refusal, *(f"cut at {c}" for c in self.cuts), *self.notes)
        why = {f"{name}/{k}": v for name, p in plans for k, v in p.why.items()}
        book = rulebook.load(self.options["policy"], self.options["rules"])
        return Plan(
            book.policy, book.digest, joined("edits"), joined("unknown"), joined("unbalanced"), notes, why
        )  # fmt: skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._model(*args, **kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        wanted = any(t.requires_grad for t in (*tensors, *self.parameters()))
        output = self._forward(args, kwargs)[0]
        return output if wanted else pytree.tree_map_only(torch.Tensor, torch.detach, output)

    @property
    def captured_graphs(self) -> Mapping[str, CapturedModule]:
        return self.pieces

    def run_by(self, run: RunGraph, args: Any, kwargs: Any) -> Forward:
        output, ran = self._forward(args, kwargs, run)
        between = tuple(
            Finding(name, name, "", "", "runs between two graphs", "make it traceable for Dynamo")
            for name in sorted(ran.foreign)
        )
        return Forward(output, ran.pieces, ran.leaves, between, self.cuts)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        with undisturbed(self), untouched(self._model):
            yield

    def _forward(self, args: Any, kwargs: Any, by: RunGraph | None = None) -> tuple[Any, Run]:
        args, kwargs, run = self._started(args, kwargs, by)
        self._local.run = run
        try:
            with torch._dynamo.config.patch(_LIMIT):  # type: ignore[attr-defined]
                output = self._compiled(*args, **kwargs)
        finally:
            del self._local.run
            run.over = True
        for y in pytree.tree_leaves(output):
            if isinstance(y, torch.Tensor):
                run.depends(y)
        if run.foreign and self.on_unknown == "raise":
            raise UnknownOpError(
                f"between its graphs the model runs ops on tensors that depend on the input:"
                f" {', '.join(sorted(run.foreign))}. Autograd's gradient would pass them as it is."
                " Move them into a function that Dynamo can trace, or accept them with"
                f" on_unknown='keep'. {'; '.join(self.cuts)}"
            )
        return output, run

    def _started(self, args: Any, kwargs: Any, by: RunGraph | None) -> tuple[Any, Any, Run]:
        """The call with inputs that all require grad, and a new ``Run``."""
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        lone = lambda x: inexact(x) and (by is not None or not x.requires_grad)  # noqa: E731
        leaves = [x.detach().requires_grad_() if lone(x) else x for x in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        own = {id(t): t for t in (*self._model.parameters(), *self._model.buffers())}
        paths = paths_of(self._model, args, kwargs)
        tensors = {p: x for p, x in zip(paths, leaves, strict=True) if isinstance(x, torch.Tensor)}
        return args, kwargs, Run(tensors, own, by)

    def _backend(self, body: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        reason = getattr(body, "compile_subgraph_reason", None)
        if reason is not None and reason.graph_break and reason.user_stack:
            at = reason.user_stack[-1]
            place = short_place(f"{at.filename}:{at.lineno}")
            self.cuts = tuple(dict.fromkeys([*self.cuts, f"{place} ({reason.reason.splitlines()[0]})"]))
        made: dict[Any, tuple[str, CapturedModule | None, list[bool]]] = {}

        def call(*args: Any) -> Any:
            run: Run = self._local.run
            kinds = tuple(self._kind(run, a) for a in args)
            held = [a for a, k in zip(args, kinds, strict=True) if k == HELD]
            key = kinds, tuple(id(a) if isinstance(a, torch.Tensor) else a for a in held)
            if key not in made:
                made[key] = self._piece(body, args, kinds)
            name, piece, depends = made[key]
            given = [a for a, k in zip(args, kinds, strict=True) if piece is None or k != HELD]
            return self._run_piece(run, body, given, name, piece, depends)

        return call

    def _kind(self, run: Run, x: Any) -> str:
        if not isinstance(x, torch.Tensor) or id(x) in run.own:
            return HELD
        if any(x is i for i in run.leaves.values()):
            return INPUT
        return MOVES if run.depends(x) else STILL

    def _piece(
        self, body: torch.fx.GraphModule, args: tuple[Any, ...], kinds: tuple[str, ...]
    ) -> tuple[str, CapturedModule | None, list[bool]]:
        """(name, balanced graph, which outputs depend on the input); ("", None, []) if none does."""
        if not {INPUT, MOVES} & {*kinds}:
            return "", None, []
        # error messages name the class, so they speak of a part of the user's model
        part = type(f"a part of {type(self._model).__name__}", (_Piece,), {})
        piece = part(body, args, kinds)
        given = [(a.detach(), k) for a, k in zip(args, kinds, strict=True) if k != HELD]
        static, computed = (
            {f"given[{i}]" for i, (_, kind) in enumerate(given) if kind == which}
            for which in (STILL, MOVES)
        )
        try:
            decision = decide(
                piece, tuple(a for a, _ in given), on_unknown=self.on_unknown, module_calls=False,
                piece=True, static=static, computed=computed, **self.options,
            )  # fmt: skip
        except NoPathError:
            return "", None, []
        self.notes = tuple(dict.fromkeys([*self.notes, *decision.trace.notes]))
        final = next(n for n in decision.trace.graph.nodes if n.op == "output")
        known = decision.analysis.roles
        outputs = pytree.tree_leaves(final.args[0])
        roles = [known.get(getattr(n, "name", ""), Role.STATIC) for n in outputs]
        name = f"graph{len(self.pieces)}"
        self.pieces[name] = balance(decision) if self.balanced else plain(decision)
        return name, self.pieces[name], [r > Role.CUT for r in roles]

    def _run_piece(
        self, run: Run, body: Any, given: list[Any], name: str, piece: CapturedModule | None,
        depends: list[bool],
    ) -> Any:  # fmt: skip
        if piece is None:
            outputs = body(*given)
        else:
            run.pieces[name] = piece
            outputs = run.by(name, piece, run.leaves, given, {}) if run.by else piece(*given)
        leaves = pytree.tree_leaves(outputs)
        for y in leaves:
            if isinstance(y, torch.Tensor) and y.requires_grad and piece is not None:
                y.register_hook(run.refuse_early)
        for y, moves in zip(leaves, depends or [False] * len(leaves), strict=True):
            if isinstance(y, torch.Tensor) and y.grad_fn is not None:
                run.moves[y.grad_fn] = moves
            elif isinstance(y, torch.Tensor) and not moves and not any(y is a for a in given):
                setattr(y, _STATIC, True)
        return outputs


def transform_in_pieces(
    model: nn.Module, args: Any, kwargs: Any, known: Reference | None, refusal: Exception,
    on_unknown: str, balanced: bool = True, **options: Any,
) -> CutModule:  # fmt: skip
    """Balance ``model`` graph by graph, and run it once to check that every graph can be balanced.

    known: what the original returned, if the result is to be compared with it (see ``birth``)

    Raises:
        CaptureError: Dynamo cannot run it either; holds both errors.
        UnknownOpError: as ``transform``; or ops run between the graphs, where no rule reaches.
        VerificationError: the result differs from the original.
    """
    module = CutModule(model, str(refusal).splitlines()[0], options, on_unknown, balanced)
    try:
        with module.unchanged(), differentiable(), quiet():  # Dynamo logs each place; ``cuts`` has them
            module._forward(args, kwargs)
        prove_born(model, module, known)
    except (CaptureError, RuleError, UnknownOpError, VerificationError):
        raise
    except Exception as e:
        raise CaptureError(f"{refusal}\n  Run by Dynamo it failed as well: {type(e).__name__}: {e}") from e
    if not module.pieces:
        raise CaptureError(f"{refusal}\n  Dynamo found no graph in it that the input passes.")
    if module.cuts:
        text = f"{type(model).__name__} is no single graph; it is balanced in several, cut at"
        warnings.warn(f"{text} {'; '.join(module.cuts)}", CutWarning, stacklevel=4)
    return module


def prove_born(model: nn.Module, module: CutModule, known: Reference | None) -> None:
    """The check at birth (``birth``) of a module in several graphs."""
    if module.balanced:
        require_matched(p.history.plan for p in module.pieces.values())
    if known is None:
        return
    with module.unchanged():
        require_same(model, module, known)
    plain = module
    with warnings.catch_warnings(action="ignore"):
        if module.balanced:
            plain = type(module)(model, module.refusal, module.options, "keep", balanced=False)
            with plain.unchanged(), differentiable():
                plain._forward(known.args, known.kwargs)
        require_same_gradient(model, plain, known)
    if module.balanced and module.on_unknown == "raise":
        require_balanced(module, known)
