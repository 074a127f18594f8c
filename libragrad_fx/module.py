"""The ``GraphModule`` a user gets: a drop-in for the ``nn.Module`` that it was captured from.

It differs from PyTorch's own exported module where that one is not a module any more: signature,
``train/eval``, ``to``, pickling, and a module tree with the old names and classes whose forward
hooks fire. Submodules are *shells*: same class, same attributes, the same parameters; their ops are
inlined in the graph, and a probe node at the end of each call hands the true arguments and output
to whoever listens.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.fx.node import map_aggregate
from torch.nn.modules import module as _modules
from torch.utils import _pytree as pytree

from libragrad_fx.errors import GuardError, InputError, ModeError
from libragrad_fx.execute import bound, flattened
from libragrad_fx.graph import notes
from libragrad_fx.ops import TWINS, insert
from libragrad_fx.types import History, Plan, Site

TREE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_INSERTS = {
    insert.guard: "guard", insert.constant: "constant", insert.scale: "scale",
    insert.probe: "probe", insert.structure: "structure", insert.sizes: "sizes",
}  # fmt: skip


_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that Python code made


class Structure(torch.nn.Module):
    """Puts tensors back into a structure that fx cannot spell (a dataclass such as ModelOutput)."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *leaves: Any) -> Any:
        return pytree.tree_unflatten(list(leaves), self.spec)


def leaf(structure: Any, index: int) -> Any:
    """Leaf ``index`` of a structure, in pytree order."""
    return pytree.tree_leaves(structure)[index]


def probed(node: torch.fx.Node) -> Any:
    """What a probe, or a leaf of what one returns, is in the graph; None for any other node."""
    if node.target is leaf:
        return leaf(node.args[0].kwargs["_output"], node.args[1])  # type: ignore[union-attr,arg-type]
    return node.kwargs.get("_output") if node.op == "call_module" else None


def _refuse_backward_hook(*_: Any, **__: Any) -> Any:
    raise ModeError(
        "a submodule of a transformed model has no backward of its own: its ops are inlined in the"
        " graph. Methods that rewrite the backward by module type (guided backpropagation,"
        " deconvolution, DeepLift, LRP composites) would be silently wrong here, so they are refused;"
        " use the original model for them, or a tensor hook on the module's output."
    )


_CALLED = ("forward", "__call__", "_call_impl", "_compiled_call_impl", "_wrapped_call_impl")
"""What an instance may carry to be called otherwise than its class says (``compile()``, a patched
``forward``). Capture has traced that; the result is called through its graph."""

_OWN = ("record", "lean", "origin", "_tree", "_attributes", "_checks", "_constants")
"""What a captured module keeps about itself, beside what it has from the model."""

_REFUSED = (
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)


def shell_tree(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """A shell for every submodule, by ``id`` of the original. Parameters and buffers are shared."""
    shells = {id(m): _shell(m) for m in model.modules() if m is not model}
    for m in model.modules():
        if m is not model:
            children = {k: None if c is None else shells[id(c)] for k, c in m._modules.items()}
            shells[id(m)].__dict__["_modules"] = children
    return shells


def _shell(module: torch.nn.Module) -> torch.nn.Module:
    # past a ``__new__`` of the class, which may want arguments
    builtin: Any = next(c for c in type(module).__mro__ if not c.__flags__ & _HEAP_TYPE)
    shell = builtin.__new__(type(module))
    blank = torch.nn.Module()
    state = {k: copy.copy(v) if isinstance(v, (dict, set)) else v for k, v in vars(module).items()}
    shell.__dict__.update(state)
    shell.__dict__.update({k: v for k, v in vars(blank).items() if "hooks" in k})
    for name in _CALLED:
        shell.__dict__.pop(name, None)
    shell.__dict__["forward"] = insert.probe
    shell.__dict__.update(dict.fromkeys(_REFUSED, _refuse_backward_hook))
    return shell


@dataclasses.dataclass(frozen=True)
class Record:
    """What a captured module remembers of how it was made; plain data, so that it pickles.

    forced:  arguments of ``forward`` that capture gave as False (``use_cache``)
    sites:   what the ledger needs to know of each node that a gradient passes
    history: how the module was balanced; None of a plain trace
    """

    training: bool
    dtype_pins: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    history: History | None = None

    @property
    def starts(self) -> frozenset[str]:
        """Nodes at which the signal starts: embeddings indexed by the input."""
        return frozenset(s.node for s in self.sites if s.starts)


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Tensor)


class Tree:
    """What a graph took from a module tree for good: which modules there are, their plain attributes,
    the dtypes of their parameters. To change one later would be ignored, so it is noticed."""

    def __init__(self, root: torch.nn.Module) -> None:
        skip = set(vars(torch.nn.Module())) - {"training"}
        modules = [(path, vars(m)) for path, m in root.named_modules() if m is not root]
        # of a GraphModule's own attributes none is the model's
        own = {k: vars(root)[k] for k in getattr(root, "_attributes", ())}
        self._attributes = [
            (path, now, kept)
            for path, now in [("", vars(root)), *modules]
            if (kept := dict(_kept(own if now is vars(root) else now, skip)))
        ]
        places = [("", vars(root)), *modules]
        self._children = [
            (p, v["_modules"], dict(v["_modules"])) for p, v in places if v["_modules"]
        ]
        self._dtypes = [
            (p, v["_parameters"], {k: None if t is None else t.dtype for k, t in v["_parameters"].items()})
            for p, v in places
            if v["_parameters"]
        ]  # fmt: skip

    def require_unchanged(self) -> None:
        """Raise ``ModeError`` if the tree is not any more as it was captured."""
        for path, now, then in self._attributes:
            if not _holds(now, then):
                raise _changed(path, now, then)
        for path, now, then in self._children:
            # another one of the same kind does what the graph does
            if not _holds(now, then) and not all(
                k in now and _alike(now[k], m) for k, m in then.items()
            ):
                raise _changed(path, now, then)
        for path, parameters, then in self._dtypes:
            for name, p in parameters.items():
                if p is not None and (want := then.get(name, p.dtype)) is not p.dtype:
                    where = f"{path}.{name}".lstrip(".")
                    raise ModeError(
                        f"{where} was {want} when the graph was captured and is {p.dtype} now: the model"
                        " was converted afterwards, which its graph cannot know. Call"
                        " transform(model, inputs) again."
                    )


def _kept(attributes: Mapping[str, Any], skip: set[str]) -> Iterator[tuple[str, Any]]:
    for key, value in attributes.items():
        if key not in skip and key not in _CALLED and key not in _REFUSED:
            if isinstance(value, _PLAIN) or callable(value):
                yield key, value
            elif isinstance(value, (list, dict, tuple, set)):
                inner = value.values() if isinstance(value, dict) else value
                if all(isinstance(v, _PLAIN) and not isinstance(v, torch.Tensor) for v in inner):
                    yield key, copy.copy(value)


def _holds(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    try:
        return then.items() <= now.items()
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # a tensor or an array in its place: no truth value
        return False


def _alike(a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    """Whether two modules are of one class and one configuration, parts included."""
    if a is b:
        return True
    if a is None or b is None or type(a) is not type(b) or a._modules.keys() != b._modules.keys():
        return False
    skip = set(vars(torch.nn.Module())) - {"training"}
    same = dict(_kept(vars(b), skip)).items() == dict(_kept(vars(a), skip)).items()
    return same and all(_alike(a._modules[k], b._modules[k]) for k in a._modules)


def _changed(path: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> ModeError:
    name = next(k for k in then if k not in now or not _holds(now, {k: then[k]}))
    new = _said(now[name]) if name in now else "gone"
    return ModeError(
        f"{f'{path}.{name}'.lstrip('.')} was {_said(then[name])} when the graph was captured and is"
        f" {new} now. The graph holds what was there, so the change cannot take effect: change the"
        " original model and transform it again."
    )


def _said(value: Any) -> str:
    return type(value).__name__ if isinstance(value, torch.nn.Module) else f"{value!r:.60}"


class CapturedModule(torch.fx.GraphModule):
    """A graph with the face of the module it was captured from. Built by ``build`` only."""

    record: Record
    lean: torch.fx.Graph | None
    origin: Any
    """What captures the original for other inputs (``variants.Origin``); None where it is not at hand."""

    def __init__(
        self, root: torch.nn.Module, graph: torch.fx.Graph, record: Record,
        lean: torch.fx.Graph | None = None,
    ) -> None:  # fmt: skip
        """lean: the same forward and gradients with less work, for when nobody listens inside."""
        super().__init__(torch.nn.Module(), torch.fx.Graph())
        own = {*vars(self), *_CALLED, *_OWN}
        for key, value in vars(root).items():
            if key in TREE:
                self.__dict__[key] = copy.copy(value)
            elif key not in own:
                self.__dict__[key] = value
        self.__dict__["training"] = record.training
        self._attributes = tuple(k for k in vars(self) if k not in own)
        self.record = record
        self.origin = None
        self._tree = Tree(self)
        self.graph = graph
        self._run_lean(lean)

    def recompile(self) -> Any:
        """As ``GraphModule``; a graph that was changed by hand runs as it is."""
        self.__dict__["lean"] = None
        code = super().recompile()
        self._run(type(self).forward)
        return code

    def _run_lean(self, lean: torch.fx.Graph | None) -> None:
        """Run ``lean``, unless somebody listens to a submodule or the module is exported again."""
        if lean is None:
            return
        quick = bound(lean)
        attributes, stand_ins = flattened(quick)
        full = type(self).forward.__wrapped__  # type: ignore[attr-defined]
        short = type(torch.fx.GraphModule(stand_ins, quick)).forward
        heard = [
            h
            for m in self.modules()
            if m is not self
            for h in (m._forward_hooks, m._forward_pre_hooks)
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
        """Call ``body``; what its guards refuse is for a graph that was, or is now, captured for it."""
        names = {n.name for n in self.graph.nodes if n.op == "placeholder"}

        @functools.wraps(body)
        def forward(self: CapturedModule, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return body(self, *args, **kwargs)
            if self.training is self.record.training:  # else a guard says so
                self._tree.require_unchanged()
            try:
                if not kwargs.keys() <= names:
                    raise GuardError(
                        f"forward took no {', '.join(kwargs.keys() - names)} at capture"
                    )
                return body(self, *args, **kwargs)
            except GuardError as refusal:
                if self.origin is None:
                    raise
                other = self.origin.other(self, refusal, args, kwargs)
            return other(*args, **kwargs)

        forward.__wrapped__ = getattr(body, "__wrapped__", body)  # type: ignore[attr-defined]
        type(self).forward = forward  # type: ignore[method-assign]

    def graphs(self) -> tuple[torch.fx.Graph, ...]:
        """The graph, and the one that runs in its place where nobody listens (``lean``)."""
        return (self.graph,) if self.lean is None else (self.graph, self.lean)

    @property
    def plan(self) -> Plan | None:
        """The ``Plan`` that made this module's backward; None for a plain trace."""
        return self.record.history and self.record.history.plan

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
            self.origin = None  # it has not been converted
            _convert_literals(self, before.dtype, after)
        self._tree = Tree(self)
        return self

    def __reduce__(self) -> Any:
        return _rebuild, (_state(self),)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        result = _rebuild(copy.deepcopy(_state(self), memo))
        result.origin = None if self.origin is None else self.origin.copied()
        memo[id(self)] = result
        return result


def anchor(module: torch.nn.Module) -> torch.Tensor:
    """An empty tensor where and what the module's floating-point tensors are."""
    tensors = (*module.parameters(), *module.buffers())
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
    """``arange(device=cpu)`` and the like are part of the captured graph and follow ``.to()``, and so
    does the dtype that inputs have to have."""
    for graph in module.graphs():
        for node in graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.kwargs = {**node.kwargs, "device": now.device}
            if node.target is insert.guard and node.args[3] == str(old).removeprefix("torch."):
                node.update_arg(3, insert.dtype_name(now))
    lean = module.lean
    module.recompile()
    module._run_lean(lean)


# --- the module tree, as the graph's probes show it


def called_modules(module: CapturedModule) -> list[str]:
    """Paths of the submodules whose calls are in the graph, in order of their ends."""
    if not isinstance(module, CapturedModule):
        raise InputError(f"expected the result of transform or trace, got {type(module).__name__}")
    return [
        str(n.target) for n in module.graph.nodes if n.op == "call_module" and "_output" in n.kwargs
    ]


def blocks(module: CapturedModule) -> list[str]:
    """The repeated blocks of a network, in the order in which they run: the class most often called
    under a numbered name (``layers.3``, ``encoder_layer_3``), or beside another of its class.

    They are what FullGrad+ sums over (transformer blocks, mixer blocks, residual blocks). Empty if
    the network has none.
    """
    called = dict.fromkeys(called_modules(module))
    composed = {p: type(m) for p in called if list((m := module.get_submodule(p)).children())}
    beside = Counter((p.rpartition(".")[0], kind) for p, kind in composed.items())
    groups: dict[type, list[str]] = {}
    for path, kind in composed.items():
        if path[-1].isdigit() or beside[path.rpartition(".")[0], kind] > 1:
            groups.setdefault(kind, []).append(path)
    found = max(groups.values(), key=lambda ps: (len(ps), -ps[0].count(".")), default=[])
    return sorted(found, key=[n.target for n in module.graph.nodes].index) if len(found) > 1 else []


# --- pickling: fx would re-trace generated code, and lose the twins and all provenance on the way


@dataclasses.dataclass(frozen=True)
class _Ref:
    name: str


@dataclasses.dataclass(frozen=True)
class _Constant:
    name: str


def _state(module: CapturedModule) -> dict[str, Any]:
    root = {k: vars(module)[k] for k in (*TREE, *module._attributes)}
    return {"root": root, "graphs": [*map(_nodes, module.graphs())], "record": module.record}


def _nodes(graph: torch.fx.Graph) -> list[Any]:
    return [
        (n.op, n.name, _encode(n.target) if n.op == "call_function" else n.target,
         _refs(n.args), _refs(n.kwargs), {k: _plain(n.meta[k]) for k in _KEPT if k in n.meta})
        for n in graph.nodes
    ]  # fmt: skip


_KEPT = (notes.KEY, "nn_module_stack", "stack_trace")
"""What is pickled of a node's ``meta``: our note, and where the node comes from in the user's code."""


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _refs(args: Any) -> Any:
    def ref(a: Any) -> Any:
        if isinstance(a, torch.memory_format):  # does not pickle in torch.save's protocol
            return _Constant(str(a).removeprefix("torch."))
        return _Ref(a.name) if isinstance(a, torch.fx.Node) else a

    return map_aggregate(args, ref)


def _rebuild(state: dict[str, Any]) -> CapturedModule:
    root = torch.nn.Module()
    root.__dict__.update(state["root"])
    graph, *lean = map(_graph, state["graphs"])
    return CapturedModule(root, graph, state["record"], *lean)


def _graph(nodes: list[Any]) -> torch.fx.Graph:
    graph, by_name = torch.fx.Graph(), {}

    def real(a: Any) -> Any:
        if isinstance(a, _Constant):
            return getattr(torch, a.name)
        return by_name[a.name] if isinstance(a, _Ref) else a

    for op, name, target, args, kwargs, meta in nodes:
        target = _decode(target) if op == "call_function" else target
        args, kwargs = map_aggregate(args, real), map_aggregate(kwargs, real)
        node = graph.create_node(op, target, args, kwargs, name)
        node.meta.update(meta)
        by_name[name] = node
    return graph


def _encode(target: Any) -> tuple[str, str]:
    if isinstance(target, torch._ops.OpOverload):
        return "op", str(target)
    if target in _INSERTS:
        return "insert", _INSERTS[target]
    if TWINS.get(getattr(target, "__name__", "")) is target:
        return "twin", target.__name__
    module = "operator" if target.__module__ == "_operator" else target.__module__
    return "python", f"{module}:{target.__qualname__}"


def _decode(code: tuple[str, str]) -> Any:
    kind, name = code
    if kind == "op":
        return operator.attrgetter(name)(torch.ops)
    if kind == "insert":
        return getattr(insert, name)
    if kind == "twin":
        return TWINS[name]
    module, _, qualified = name.partition(":")
    return operator.attrgetter(qualified)(importlib.import_module(module))
