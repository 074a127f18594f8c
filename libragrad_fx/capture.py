"""``nn.Module`` (+ example inputs) -> ``torch.export`` program: the only file that knows export.

What export alone would lose is put into the graph first: ``no_grad`` regions (its decomposition
step drops them) become ``detach`` nodes, and every module call leaves marks on its arguments and
outputs, from which the module tree of the result is rebuilt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import logging
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch.export import Dim, ExportedProgram
from torch.nn.modules import module as _modules
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from libragrad_fx.composite import in_parts, write_out
from libragrad_fx.errors import CaptureError, CustomBackwardWarning, ExportError, InputError
from libragrad_fx.graph.schema import bind
from libragrad_fx.inplace import drop_idle, rename
from libragrad_fx.module import CapturedModule
from libragrad_fx.ops.insert import observe
from libragrad_fx.state import untouched
from libragrad_fx.target import Arguments, as_call, inexact

_PYTHON = PythonPrinter()
_CHECKPOINT = "torch.utils.checkpoint"
_INFERENCE_TRIED = (
    "the model's metadata (timm, torchvision, Hugging Face, Lightning), its first layers"
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One module call, as its forward hook saw it: structures whose tensors carry observe marks."""

    path: str
    arguments: tuple[list[Any], pytree.TreeSpec]
    output: tuple[list[Any], pytree.TreeSpec]


@dataclasses.dataclass(frozen=True)
class Capture:
    """An exported, functional program, with what export does not keep beside it.

    conditions: what export took for granted of the free sizes, as Python over the names of symbols
    """

    program: ExportedProgram
    conditions: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    forced: frozenset[str]
    calls: tuple[Call, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Free:
    """Which sizes of the inputs are free.

    batch:   the first one of every tensor
    lengths: the second one of tokens, (B, L) of whole numbers, and of what is as long as they are
    named:   more, by argument, as ``transform`` takes them
    """

    batch: bool = True
    lengths: bool = True
    named: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def fewer(self) -> Free | None:
        """What is left to try where these cannot be; None if nothing is free here."""
        if self.lengths:
            return dataclasses.replace(self, lengths=False)
        return FIXED if self.batch else None

    def axes(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The free axes of each tensor of a call, as export wants them."""
        long = token_lengths(args, kwargs) if self.lengths else set()

        def of(t: Any) -> dict[int, Any] | None:
            if not isinstance(t, torch.Tensor) or not t.ndim:
                return None
            return {
                axis: Dim.AUTO for axis in range(min(t.ndim, 2)) if not axis or t.shape[1] in long
            }

        return pytree.tree_map(of, (args, kwargs))


USUAL = Free()
FIXED = Free(batch=False, lengths=False)


def token_lengths(args: Any, kwargs: Any) -> set[int]:
    """How long the sequences of tokens are that a call is given."""
    tensors = (t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    whole = (t for t in tensors if not inexact(t) and t.dtype is not torch.bool)
    return {t.shape[1] for t in whole if t.ndim == 2}


def require_fit(model: torch.nn.Module) -> None:
    """Raise ``CaptureError`` for what no capture can do anything with."""
    _refuse_unfit(model)
    _refuse_hooks(model)


def example_call(
    model: torch.nn.Module, example_inputs: Any = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the call to be captured.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments;
            None infers them (see ``infer_inputs``).

    Raises:
        InputError: the inputs could not be inferred, or do not fit ``forward``.
    """
    if example_inputs is None:
        with torch.random.fork_rng():
            args, kwargs = infer_inputs(model)
    else:
        args, kwargs = _as_call(example_inputs)
    # a tensor that is given twice would be one argument, for good
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
    _check_call(model, args, kwargs)
    return args, kwargs


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    known: Callable[[Any], bool] = lambda op: True,
    module_calls: bool = True,
    free: Free = USUAL,
) -> Capture:
    """Export ``model`` and make it functional. The model is left as it was, whatever happens.

    Args:
        args, kwargs: the call (see ``example_call``).
        known: whether an op has a fact; a composite op that has none is written out in its parts.
        free: which sizes are free.
        module_calls: record every call of a submodule; without, the result's tree has no hooks.

    Raises:
        ExportError: export refuses it.
    """
    with untouched(model):
        kwargs, forced = without_cache(model, dict(kwargs))
        if free.batch:
            args, kwargs = _batch_of_two(args, kwargs)
        calls: list[Call] = []
        custom: list[str] = []
        observed = _observed(model, calls) if module_calls else contextlib.nullcontext()
        with _export_state(), _global_hooks_kept(), observed, _custom_functions(custom):
            try:
                with _as_if_eager():
                    program, conditions = _export(model, args, kwargs, known, free)
            except ExportError:  # eagerly it asks for tensor values; it may have a way without
                calls.clear()
                program, conditions = _export(model, args, kwargs, known, free)
    notes: tuple[str, ...] = ()
    if custom:
        text = (
            f"{', '.join(sorted(set(custom)))}: a user-written autograd.Function was traced through; "
            "its forward is kept, its own backward is replaced by that of the ops it calls"
        )
        warnings.warn(text, CustomBackwardWarning, stacklevel=3)
        notes = (text,)
    return Capture(program, conditions, args, kwargs, forced, tuple(calls), notes)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, (torch.Tensor, Mapping, tuple, list, Arguments)):
        return as_call(inputs)
    raise InputError(
        f"example inputs must be a tensor, a tuple of positional arguments or a dict of keyword"
        f" arguments; got {type(inputs).__name__}"
    )


def _check_call(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as e:
        sig = inspect.signature(model.forward)
        raise InputError(f"the inputs do not fit {type(model).__name__}.forward{sig}: {e}") from e


def without_cache(
    model: torch.nn.Module, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], frozenset[str]]:
    """Key-value caches are mutable outputs that no graph can return: switch them off."""
    if "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in kwargs:
        return {**kwargs, "use_cache": False}, frozenset({"use_cache"})
    return kwargs, frozenset()


def _batch_of_two(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Export bakes a dimension of size 1 in; a batch of one is doubled where all tensors agree."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    if any(isinstance(t, torch.Tensor) and t.is_nested for t in leaves):
        raise InputError("a nested tensor has no shape to capture: pad it to one")
    tensors = [t for t in leaves if isinstance(t, torch.Tensor) and t.ndim > 0]
    if tensors and all(t.shape[0] == 1 for t in tensors):
        leaves = [
            torch.cat([t.detach(), t.detach()]) if isinstance(t, torch.Tensor) and t.ndim else t
            for t in leaves
        ]
    return pytree.tree_unflatten(leaves, spec)


def _export(
    model: torch.nn.Module, args: Any, kwargs: Any, known: Callable[[Any], bool], free: Free
) -> tuple[ExportedProgram, tuple[str, ...]]:
    shapes = _by_name(model, *free.axes(args, kwargs)) if free.batch else None
    if shapes is not None:
        given = _by_name(model, args, kwargs)
        shapes |= {name: _freed(name, given.get(name), spec) for name, spec in free.named.items()}
    try:
        with warnings.catch_warnings(), _hushed():
            warnings.simplefilter("ignore")
            made = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            _detach_no_grad_regions(made)
            found = _conditions(made)
            program = _functional(made, known)
            return program, tuple(dict.fromkeys([*found, *_conditions(program)]))
    except Exception as e:
        # neither is of use to a user: whom to write to, what export named a tensor
        said = re.sub(r"[^.]*(file an issue|lifted_tensor)[^.]*\.?", "", _first_line(e))
        if "mutat" in said or "in-place" in said or "in place" in said:
            said = "it writes in place into a tensor that is not its own"
        raise ExportError(
            f"torch.export could not capture {type(model).__name__}: {said}\n"
            "  Usual causes: control flow on tensor values, a cache or a custom class among inputs or"
            " outputs, numpy inside forward. Capture the part that is a plain function of tensors, or"
            " rewrite the branch with torch.where."
        ) from e


def size_of(size: Any) -> int | str:
    """One entry of a traced shape: a number, or what it is in symbols."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr) if expr.is_number else _PYTHON.doprint(expr)


def _conditions(program: ExportedProgram) -> list[str]:
    """What the trace took for granted of free sizes: each branch taken on one, and their ranges."""
    values = (n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder")
    sizes: list[Any] = [d for t in values if isinstance(t, torch.Tensor) for d in t.shape]
    free = [d for d in sizes if isinstance(size_of(d), str)]
    if not free:
        return []
    env = free[0].node.shape_env
    symbols = set().union(*(d.node.expr.free_symbols for d in free))
    found = [g.expr.xreplace(env.replacements) for g in env.guards]
    for symbol in symbols & set(env.var_to_range):
        bounds = env.var_to_range[symbol]
        found += [symbol >= bounds.lower] if bounds.lower > 2 else []  # 2: see ``insert.guard``
        found += [symbol <= bounds.upper] if bounds.upper.is_Integer else []
    # what holds of other symbols only was decided when those became numbers
    known = [e for e in found if getattr(e, "free_symbols", None) and e.free_symbols <= symbols]
    return sorted({_PYTHON.doprint(e) for e in known})


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """An export that fails prints its graph; what the model itself printed is handed on if not."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        yield
    sys.stdout.write(said.getvalue())


def _functional(program: ExportedProgram, known: Callable[[Any], bool]) -> ExportedProgram:
    """The program without in-place writes, and without regions in another mode.

    Where it has none of them it is left as it is: the pass costs several times the export.
    """
    parts = in_parts(known)
    for again in (True, False):
        write_out(program.graph, parts, known)
        rename(program.graph)
        if again and any(map(_writes, program.graph.nodes)):
            drop_idle(program.graph)
            program = program.run_decompositions({})
    return program


def _writes(node: torch.fx.Node) -> bool:
    """Whether a node writes in place, or begins or ends a region in another mode or under a ``vmap``."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if getattr(node.target, "__module__", "") == "torch._functorch.predispatch":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    values = bind(node.target, node.args, node.kwargs)
    # a norm that writes its statistics does not say so in its schema
    norm = values.get("training") or values.get("use_input_stats")
    return node.target._schema.is_mutable or bool(norm)


def _by_name(model: torch.nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by parameter, as export wants its shapes."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    found = dict(bound.arguments)
    for p in bound.signature.parameters.values():
        if p.kind is p.VAR_KEYWORD:
            found |= found.pop(p.name, {})
    return found


def _freed(path: str, value: Any, spec: Any) -> Any:
    """What is free of an argument, as export wants it: of a tensor, axes by number.

    Raises:
        InputError: ``spec`` does not fit the example.
    """
    if isinstance(value, torch.Tensor) and isinstance(spec, Mapping):
        axes: dict[int, Any] = {0: Dim.AUTO} if value.ndim else {}
        for axis, name in spec.items():
            if not isinstance(axis, int) or not -value.ndim <= axis < value.ndim:
                raise InputError(
                    f"dynamic: {path} of shape {tuple(value.shape)} has no axis {axis!r:.40}"
                )
            bounds = {k: getattr(name, k, None) for k in ("min", "max")}
            axes[axis % value.ndim] = Dim.AUTO(**{k: b for k, b in bounds.items() if b is not None})
        return axes
    if isinstance(value, Mapping) and isinstance(spec, Mapping) and value.keys() == spec.keys():
        return {k: _freed(f"{path}[{k!r}]", value[k], spec[k]) for k in value}
    if (
        isinstance(value, (list, tuple))
        and isinstance(spec, (list, tuple))
        and len(value) == len(spec)
    ):
        parts = [
            _freed(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(value, spec, strict=True))
        ]
        return type(value)(parts) if type(value) in (list, tuple) else parts
    if spec is None:
        return pytree.tree_map(
            lambda t: {0: Dim.AUTO} if isinstance(t, torch.Tensor) else None, value
        )
    raise InputError(
        f"dynamic: {path} is {type(value).__name__} in the example; give the axes of a tensor by number"
        " ({1: 'length'}), and for a container one such entry for each of its members"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else '(no message)'}"


# --- what surrounds the export, and is put back afterwards


def _refuse_unfit(model: torch.nn.Module) -> None:
    """What no capture can do anything with, said before anything is run."""
    name = type(model).__name__
    if "_modules" not in vars(model) and not isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"{name}.__init__ never called super().__init__(): it is no module yet")
    for path, m in model.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            raise CaptureError(
                f"{path or name} is a ScriptModule, whose code PyTorch does not show: transform the"
                " Python module that it was made of"
            )
        if isinstance(m, CapturedModule):
            raise CaptureError(
                f"submodule {path!r} is a captured module already: transform the whole of the original"
                " model, or call the transformed part from outside"
            )
    tensors = (*model.named_parameters(), *model.named_buffers())
    if lazy := [k for k, t in tensors if torch.nn.parameter.is_lazy(t)]:
        raise CaptureError(
            f"{', '.join(lazy[:4])}: uninitialised parameters of lazy modules; run the model once first"
        )


def _library(thing: Any) -> str:
    """The top-level package that a class or a function comes from."""
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _refuse_hooks(model: torch.nn.Module) -> None:
    """Hooks that a library puts on its own modules are part of their forward, and are traced."""

    def hooked(*kinds: str) -> list[str]:
        return [
            name or "(root)"
            for name, m in model.named_modules()
            for kind in kinds
            if any(_library(h) != _library(type(m)) for h in getattr(m, kind).values())
        ]

    def named(found: list[str]) -> str:
        return f"{', '.join(found[:8])}{' …' if len(found) > 8 else ''}"

    if found := hooked("_backward_hooks", "_backward_pre_hooks"):
        raise CaptureError(
            f"these modules have backward hooks: {named(found)}. The balanced backward does not pass"
            " modules but ops, so they would not be called. Remove them and transform again."
        )
    if found := hooked("_forward_hooks", "_forward_pre_hooks"):
        raise ExportError(
            f"these modules have hooks: {named(found)}. A hook is Python that a graph cannot hold: remove"
            " them, transform, and register them on the result, where forward hooks fire as on the"
            " model. (Old-style weight_norm and spectral_norm are hooks too: use"
            " torch.nn.utils.parametrizations, or remove_weight_norm.)"
        )


@contextlib.contextmanager
def _export_state() -> Iterator[None]:
    """Grad mode on, autocast off, no fused inference path: the graph of a forward under autograd."""
    fast = torch.backends.mha.get_fastpath_enabled()
    quiet = logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(
        logging.CRITICAL
    )  # a failing export logs its graph; the error says what matters
    try:
        with contextlib.ExitStack() as stack:
            for device in (
                "cpu",
                "cuda",
            ):  # the casts of a surrounding autocast are not the model's
                stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        logging.disable(quiet)
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def traced_as_run() -> Iterator[None]:
    """The state of an export, for a model that is recorded while it runs."""
    with _export_state(), _global_hooks_kept(), _custom_functions([]):
        yield


@contextlib.contextmanager
def _as_if_eager() -> Iterator[None]:
    """Models that ask whether they are exported may choose other ops, and with them other bits.

    ``is_compiling`` is left as it is: libraries ask it to keep traced tensors out of their caches.
    Dynamo notes which functions it knows when it is first imported, and must not note the stand-in.
    """
    importlib.import_module("torch._dynamo")
    with mock.patch.object(torch.compiler, "is_exporting", return_value=False):
        yield


@contextlib.contextmanager
def _observed(model: torch.nn.Module, calls: list[Call]) -> Iterator[None]:
    """Mark the tensors of every submodule call, through a global hook: the model gets none."""
    paths = {id(m): name for name, m in model.named_modules() if m is not model}

    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) not in paths or torch._C._are_functorch_transforms_active():
            return  # inside a vmap, what a module sees is no tensor of the graph
        call = len(calls)
        sides = [pytree.tree_flatten((args, kwargs)), pytree.tree_flatten(output)]
        named = [
            (t, f"{place}{i}")
            for place, (leaves, _) in zip("ao", sides, strict=True)
            for i, t in enumerate(leaves)
            if isinstance(t, torch.Tensor)
        ]
        if named:
            observe([t for t, _ in named], [p for _, p in named], call)
        kept = [([None if isinstance(x, torch.Tensor) else x for x in s[0]], s[1]) for s in sides]
        calls.append(Call(paths[id(module)], kept[0], kept[1]))

    handle = _modules.register_module_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _global_hooks_kept() -> Iterator[None]:
    """PyTorch keeps the flag of a removed hook, and (2.11) hooks of an export that failed."""
    found = [v for k, v in vars(_modules).items() if k.startswith("_global_")]
    tables = [(t, dict(t)) for t in found if isinstance(t, dict)]
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)


@contextlib.contextmanager
def _custom_functions(found: list[str]) -> Iterator[None]:
    """Notice user-written ``autograd.Function``s: tracing keeps their forward and not their backward.

    ``Function.apply`` may have been looked up before (``swish = Swish.apply``). Each call looks up
    ``forward``, so that is watched.
    """
    here = threading.get_ident()

    def look_up(cls: Any, name: str) -> Any:
        value = type.__getattribute__(cls, name)
        return watched(cls, value) if name == "forward" and threading.get_ident() == here else value

    def watched(cls: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if _library(cls) != "torch":
                found.append(f"{cls.__module__}.{cls.__qualname__}")
            with _grad_mode_unseen(), _data_seen():
                return forward(*args, **kwargs)

        return run

    meta = torch.autograd.function.FunctionMeta
    with mock.patch.object(meta, "__getattribute__", look_up), _reentrant_checkpoints():
        yield


@contextlib.contextmanager
def _reentrant_checkpoints() -> Iterator[None]:
    """A reentrant checkpoint is the function that it calls, which may have regions in another grad mode."""
    apply = inspect.getattr_static(torch.autograd.Function, "apply")

    def run(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == _CHECKPOINT and callable(args[0]):
            return args[0](
                *args[2:]
            )  # (function, whether to keep the random state, *its arguments)
        return apply.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(run)):
        yield


@contextlib.contextmanager
def _grad_mode_unseen() -> Iterator[None]:
    """Grad mode switches without a trace of it.

    It is off inside a Function, which no trace shows. So a ``no_grad`` in there ends, for the trace,
    with grad mode off, and everything behind the Function would be detached.
    """
    switch = torch._C._set_grad_enabled

    def unseen(mode: bool) -> None:
        with torch._C.DisableTorchFunction():
            switch(mode)

    with mock.patch.object(torch._C, "_set_grad_enabled", unseen):
        yield


@contextlib.contextmanager
def _data_seen() -> Iterator[None]:
    """``x.data`` is ``x``, for this thread.

    Inside a Function nothing is differentiated, and the two are one tensor but for the count of writes.
    A trace sees what is written to ``x``.
    """
    plain, here = torch.Tensor.data, threading.get_ident()

    def get(x: torch.Tensor) -> torch.Tensor:
        return x if threading.get_ident() == here else plain.__get__(x)  # type: ignore[attr-defined]

    seen = property(get, plain.__set__)  # type: ignore[attr-defined]
    with mock.patch.object(torch.Tensor, "data", seen):
        yield


def _detach_no_grad_regions(program: ExportedProgram) -> None:
    """``no_grad`` regions come as sub-graphs and are flattened without a trace: detach around them."""
    module = program.graph_module
    for node in list(module.graph.nodes):
        if getattr(node.target, "__name__", "") != "wrap_with_set_grad_enabled" or node.args[0]:
            continue
        for user in list(node.users):
            if inexact(user.meta.get("val")):
                with module.graph.inserting_after(user):
                    cut = module.graph.call_function(torch.ops.aten.detach.default, (user,))
                cut.meta = dict(user.meta)
                user.replace_all_uses_with(cut, delete_user_cb=lambda u, cut=cut: u is not cut)
    module.recompile()


# --- example inputs, when none are given


def infer_inputs(model: torch.nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs of batch 2, from the model's own metadata or from its first layers.

    Raises:
        InputError: nothing fits; says what was tried.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    place = {"device": like.device, "dtype": like.dtype}
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return pytree.tree_map(lambda t: _placed(t, place), _as_call(example))
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    if isinstance(config, Mapping) and config.get("input_size"):
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = tuple(size or config["input_size"][-2:])
        conv = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
        channels = dict.fromkeys([config["input_size"][0], getattr(conv, "in_channels", 3)])
        return _first_that_runs(model, [torch.randn(2, c, *size, **place) for c in channels])
    if type(model).__module__.startswith("torchvision.models"):
        side = 299 if "inception" in type(model).__module__ else 224
        if ".video" in type(model).__module__:
            sizes = ((16, 112, 112), (16, 224, 224))
            return _first_that_runs(model, [torch.randn(2, 3, *s, **place) for s in sizes])
        return (torch.randn(2, 3, side, side, **place),), {}
    if hasattr(model, "dummy_inputs") and hasattr(model, "config"):
        return (), _hugging_face(model, place)
    leaves = (m for m in model.modules() if not list(m.children()) and list(m.parameters()))
    layer = next(leaves, None)
    return _first_that_runs(model, list(_candidates(layer, place)), type(layer).__name__)


def _placed(t: Any, place: dict[str, Any]) -> Any:
    """An example tensor where, and if it is floating point in the dtype in which, the model is."""
    if not isinstance(t, torch.Tensor):
        return t
    return t.to(**place) if t.is_floating_point() else t.to(place["device"])


def _hugging_face(model: Any, place: dict[str, Any]) -> dict[str, Any]:
    config = model.config
    if model.main_input_name == "pixel_values":
        side = getattr(config, "image_size", 224)
        side = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, *side, **place)}
    ids = model.dummy_inputs.get("input_ids")
    if ids is None:
        raise InputError(
            f"{type(model).__name__} has no dummy input_ids or pixel_values to start from; pass"
            " example_inputs=dict(...) as you would call it"
        )
    return {"input_ids": (ids[:2, :8] % config.get_text_config().vocab_size).to(place["device"])}


def _candidates(layer: Any, place: dict[str, Any]) -> Iterator[torch.Tensor]:
    if isinstance(layer, _ConvNd):
        dims = len(layer.kernel_size)
        for side in (224, 64, 32, 28):
            yield torch.randn(
                2, layer.in_channels, *[side if dims < 3 else side // 2] * dims, **place
            )
    elif isinstance(layer, torch.nn.Embedding):
        yield torch.randint(layer.num_embeddings, (2, 16), device=place["device"])
    width = getattr(layer, "in_features", None) or getattr(layer, "input_size", None)
    width = width or getattr(layer, "num_features", None)
    shape = getattr(layer, "normalized_shape", None)
    if width is not None and not isinstance(layer, _ConvNd):
        yield from (torch.randn(2, width, **place), torch.randn(2, 16, width, **place))
    elif shape is not None:
        yield torch.randn(2, *shape, **place)


def _first_that_runs(
    model: torch.nn.Module, candidates: Sequence[torch.Tensor], layer: str = "it"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first candidate that the model takes; the only one of one is taken at its word.

    Tried on fake tensors: nothing is computed and nothing written.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for candidate in candidates:
        if len(candidates) == 1 and layer == "it":
            return (candidate,), {}
        mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
        with mode, contextlib.suppress(Exception), torch.no_grad():
            fake: dict[str, Any] = {k: mode.from_tensor(v) for k, v in state.items()}
            torch.func.functional_call(model, fake, (mode.from_tensor(candidate),))
            return (candidate,), {}
    tried = ", ".join(f"{tuple(c.shape)} {c.dtype}" for c in candidates)
    what = f"{layer} takes {tried}" if tried else "no layer to start from"
    raise InputError(
        f"cannot guess inputs for {type(model).__name__}: tried {_INFERENCE_TRIED} ({what}). Pass an"
        " example: transform(model, (x,)), with x as you would call the model, batch first."
    )
