"""The ``GraphModule`` that a user gets: a drop-in for the ``nn.Module`` that it was captured from.

Unlike PyTorch's exported module it keeps the model's signature, ``train/eval``, ``to``, pickling, and a
module tree with the old names and classes whose forward hooks fire. Submodules are *shells*: same class,
same attributes, same parameters. Their ops are inlined in the graph; a probe node at the end of each call
passes the true arguments and output to hooks.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.modules import module as _modules

from libragrad_fx.errors import GuardError, InputError, ModeError
from libragrad_fx.module.changes import Tree
from libragrad_fx.module.pickling import graph_of, spelled
from libragrad_fx.module.shells import CALLED
from libragrad_fx.ops import insert
from libragrad_fx.optimise.execute import bound, flattened
from libragrad_fx.target import undisturbed
from libragrad_fx.types import Finding, History, Plan, Site

TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
LOOKUPS = ("__getitem__", "__len__", "__iter__", "__contains__", "keys", "values", "items")
"""Methods by which containers look up submodules."""
_OWN = ("record", "lean", "origin", "_tree", "_attributes", "_checks", "_constants", "_located")
"""Attributes of a captured module that do not come from the model."""


@dataclasses.dataclass(frozen=True)
class Record:
    """How a captured module was made: plain data, so that it pickles.

    dtype_pins: source lines that name a float dtype; they forbid ``.to(dtype)``
    forced:  arguments of ``forward`` that capture gave as False (``use_cache``)
    sites:   for the ledger, the nodes that a gradient passes
    history: how the module was balanced; None for a plain trace
    container: the model's class, if one looks submodules up in it (``Sequential``)
    """

    training: bool
    dtype_pins: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    history: History | None = None
    container: type[torch.nn.Module] | None = None

    @property
    def starts(self) -> frozenset[str]:
        """Nodes at which the signal starts: embeddings indexed by the input."""
        return frozenset(s.node for s in self.sites if s.starts)


RunGraph = Callable[[str, "CapturedModule", Mapping[str, torch.Tensor] | None, Any, Any], Any]
"""Runs a graph. Gets its name, its module, ``Forward.leaves`` (None for a single graph), args, kwargs."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward of a model in one graph or several.

    graphs:  the graphs that ran, by name; a single one has the name ""
    leaves:  for several graphs, the tensors that are the model's inputs, by path (``x``, ``x['mask']``)
    between: ops that depend on the input and ran between the graphs, where no rule reaches
    cuts:    source lines at which a graph ends
    """

    output: Any
    graphs: Mapping[str, CapturedModule]
    leaves: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    between: tuple[Finding, ...] = ()
    cuts: tuple[str, ...] = ()


class InGraphs(torch.nn.Module):
    """A model in one captured graph (``CapturedModule``), or in several with its Python between them."""

    origin: Any = None
    """Captures the original for other inputs (``variants.Origin``); None if the original is gone."""

    @property
    def plan(self) -> Plan | None:
        """The ``Plan`` that made this module's backward; None if that is autograd's own."""
        raise NotImplementedError

    @property
    def captured_graphs(self) -> Mapping[str, CapturedModule]:
        """All graphs captured so far, by their names in ``Forward``."""
        raise NotImplementedError

    def run_by(self, run: RunGraph, args: Any, kwargs: Any) -> Forward:
        """A forward that calls ``run`` for each graph."""
        raise NotImplementedError

    def unchanged(self) -> AbstractContextManager[Any]:
        """A context that restores what a forward changes: buffers, the random state, Python state."""
        return undisturbed(self)


class CapturedModule(torch.fx.GraphModule, InGraphs):
    """A graph to use like the module it was captured from. ``capture`` and ``rewrite`` make it."""

    record: Record
    lean: torch.fx.Graph | None
    _tree: Tree
    _attributes: tuple[str, ...]

    def __init__(
        self, root: torch.nn.Module, graph: torch.fx.Graph, record: Record,
        lean: torch.fx.Graph | None = None,
    ) -> None:  # fmt: skip
        """lean: the optimised graph, which runs if no submodule has a hook."""
        super().__init__(torch.nn.Module(), torch.fx.Graph())
        own = {*vars(self), *vars(InGraphs), *vars(CapturedModule), *CALLED, *_OWN}
        for key, value in vars(root).items():
            if key in TREE:
                self.__dict__[key] = copy.copy(value)
            elif key not in own:
                self.__dict__[key] = value
        self.__dict__["training"] = record.training
        kept = tuple(k for k in vars(self) if k not in own)
        # a submodule may have one of these names, and ``setattr`` would then want a module
        self.__dict__.update(_attributes=kept, record=record, origin=None)
        self.__dict__["_tree"] = Tree(self)
        for name in LOOKUPS:
            if hasattr(record.container, name):
                setattr(type(self), name, functools.partialmethod(CapturedModule._look_up, name))
        torch.fx.GraphModule.graph.fset(self, graph)  # type: ignore[attr-defined]
        self._run_lean(lean)

    def __bool__(self) -> bool:
        return True  # also where it has a length

    def _look_up(self, name: str, *args: Any) -> Any:
        """A method of the model's class, on the submodules of this module."""
        held = torch.nn.Module.__new__(self.record.container or torch.nn.Module)
        held.__dict__.update({k: vars(self)[k] for k in (*TREE, *self._attributes)})
        held._modules = {k: m for k, m in self._modules.items() if k != "output_structure"}
        return getattr(held, name)(*args)

    def recompile(self) -> Any:
        """As ``GraphModule``. It drops the lean graph, so a graph changed by hand is what runs, and what is
        known of the old one (``attribution.again``)."""
        self.__dict__.update(lean=None, _located={})
        code = super().recompile()
        body = type(self).forward
        names = (*self._modules, *self._parameters, *self._buffers)
        if any(hasattr(type(self), name) or name in vars(self) for name in names):
            body = _by_place(self.graph, body)
        self._run(body)
        return code

    def _run_lean(self, lean: torch.fx.Graph | None) -> None:
        """Run ``lean``, unless a submodule has a forward hook or the module is being exported."""
        if lean is None:
            return
        quick = bound(lean)
        attributes, stand_ins = flattened(quick)
        full = type(self).forward.__wrapped__  # type: ignore[attr-defined]
        short = type(torch.fx.GraphModule(stand_ins, quick)).forward
        heard = [
            h for m in self.modules() if m is not self for h in (m._forward_hooks, m._forward_pre_hooks)
        ]
        heard += [_modules._global_forward_hooks, _modules._global_forward_pre_hooks]

        @torch.compiler.assume_constant_result
        def is_heard() -> bool:
            return any(heard)

        @functools.wraps(full)
        def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_exporting() or is_heard():
                return full(self, *args, **kwargs)
            return short(attributes(self), *args, **kwargs)

        forward.__wrapped__ = full  # type: ignore[attr-defined]
        self._run(forward)
        self.__dict__["lean"] = lean

    def _run(self, body: Callable[..., Any]) -> None:
        """Let ``forward`` call ``body``; another graph (``Origin``) takes the calls that guards refuse."""
        names = {n.name for n in self.graph.nodes if n.op == "placeholder"}

        @functools.wraps(body)
        def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return body(self, *args, **kwargs)
            if self.training is self.record.training:  # otherwise the guard of an input raises
                self._tree.require_unchanged()
            try:
                if not kwargs.keys() <= names:
                    raise GuardError(f"forward took no {', '.join(kwargs.keys() - names)} at capture")
                return body(self, *args, **kwargs)
            except GuardError as refusal:
                if self.origin is None:
                    raise
                other = self.origin.other(self, refusal, args, kwargs)
            return other(*args, **kwargs)

        forward.__wrapped__ = getattr(body, "__wrapped__", body)  # type: ignore[attr-defined]
        type(self).forward = forward  # type: ignore[method-assign]

    def get_submodule(self, target: str) -> torch.nn.Module:
        """As ``nn.Module``, but a submodule comes before an attribute of ours of the same name."""
        module: Any = self
        for name in target.split(".") if target else ():
            module = module._modules.get(name)
            if module is None:
                return super().get_submodule(target)
        return module  # type: ignore[no-any-return]

    def graphs(self) -> tuple[torch.fx.Graph, ...]:
        """The graph, and the lean one if there is one."""
        return (self.graph,) if self.lean is None else (self.graph, self.lean)

    @property
    def plan(self) -> Plan | None:
        return self.record.history and self.record.history.plan

    @property
    def captured_graphs(self) -> Mapping[str, CapturedModule]:
        return {"": self}

    def run_by(self, run: RunGraph, args: Any, kwargs: Any) -> Forward:
        return Forward(run("", self, None, args, kwargs), {"": self})

    @property
    def history(self) -> History:
        """How the module was balanced.

        Raises:
            InputError: it is a plain trace.
        """
        if self.record.history is None:
            raise InputError("a plain trace was not balanced: give the result of transform")
        return self.record.history

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        before = anchor(self)
        after = fn(before)
        if after.dtype != before.dtype and self.record.dtype_pins:
            raise ModeError(
                f"the graph was captured in {before.dtype} and holds casts that may or may not follow"
                f" a change to {after.dtype}: {', '.join(self.record.dtype_pins[:5])}. Convert the"
                " model first and transform that: transform(model.to(dtype))."
            )
        unshare(self)
        super()._apply(fn, recurse)
        if after.dtype != before.dtype or after.device != before.device:
            self.__dict__["origin"] = None  # the original has not been converted
            _convert_literals(self, before.dtype, after)
        self.__dict__["_tree"] = Tree(self)
        return self

    def __reduce__(self) -> Any:
        return _rebuild, (_state(self),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        result = _rebuild(copy.deepcopy(_state(self), memo))
        result.__dict__["origin"] = None if self.origin is None else self.origin.copied()
        memo[id(self)] = result
        return result


def _by_place(graph: torch.fx.Graph, body: Callable[..., Any]) -> Callable[..., Any]:
    """``body``, a graph's code, for a module with a submodule, parameter or buffer named like an attribute
    of ours (``plan``, ``graph``): the generated code would find the attribute under that name."""
    flat = torch.fx.Graph()
    flat.output(flat.graph_copy(graph, {}))
    attributes, stand_ins = flattened(flat)
    run = type(torch.fx.GraphModule(stand_ins, flat)).forward

    def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
        return run(attributes(self), *args, **kwargs)

    forward.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
    return forward


def one_graph(module: Any, refusal: str = "") -> CapturedModule:
    """``module``, if it is captured in one graph; else an ``InputError`` (``refusal``, of its class)."""
    if not isinstance(module, CapturedModule):
        refusal = refusal or "expected the result of transform or trace, got {}"
        raise InputError(refusal.format(type(module).__name__))
    return module


def anchor(module: torch.nn.Module) -> torch.Tensor:
    """An empty tensor of the device and dtype of the module's floating-point tensors."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    return torch.empty(0, dtype=like.dtype, device=like.device)


def unshare(module: torch.nn.Module) -> None:
    """New Parameter objects over the same storage: a conversion must not reach the user's model."""
    fresh: dict[int, torch.nn.Parameter] = {}
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                if id(p) not in fresh:
                    fresh[id(p)] = torch.nn.Parameter(p.detach(), p.requires_grad)
                m._parameters[name] = fresh[id(p)]


def _convert_literals(module: CapturedModule, old: torch.dtype, now: torch.Tensor) -> None:
    """Let the graph follow ``.to()``: the devices that it names (``arange(device=cpu)``), and the dtype
    that guards require of inputs."""
    for graph in module.graphs():
        for node in graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": now.device}
            if node.target is insert.guard and node.args[3] == str(old).removeprefix("torch."):
                node.update_arg(3, insert.dtype_name(now))
    lean = module.lean
    module.recompile()
    module._run_lean(lean)


# --- pickling: fx would re-trace generated code, and lose the twins and all source lines


def _state(module: CapturedModule) -> dict[str, Any]:
    root = {k: vars(module)[k] for k in (*TREE, *module._attributes)}
    return {"root": root, "graphs": [*map(spelled, module.graphs())], "record": module.record}


def _rebuild(state: dict[str, Any]) -> CapturedModule:
    root = torch.nn.Module()
    root.__dict__.update(state["root"])
    graph, *lean = map(graph_of, state["graphs"])
    return CapturedModule(root, graph, state["record"], *lean)
