"""Contexts for an export: it runs as an eager call would, and all global state is restored."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.nn.modules import module as _modules
from torch.utils import _pytree as pytree

from libragrad_fx.capture.fit import library
from libragrad_fx.errors import CustomBackwardWarning
from libragrad_fx.extras import quiet
from libragrad_fx.ops.insert import observe
from libragrad_fx.target import without_autocast

_CHECKPOINT = "torch.utils.checkpoint"


@dataclasses.dataclass(frozen=True)
class Call:
    """One module call, as a forward hook saw it: (leaves, structure), with None for each tensor. The graph
    has an ``observe`` mark for those."""

    path: str
    arguments: tuple[list[Any], pytree.TreeSpec]
    output: tuple[list[Any], pytree.TreeSpec]


@contextlib.contextmanager
def export_state() -> Iterator[None]:
    """Grad mode on, autocast off, no fused inference path: the graph of a forward under autograd."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(without_autocast())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def traced_as_run(custom: list[str]) -> Iterator[None]:
    """The state of an export, for a model that is recorded while it runs; see ``custom_functions``."""
    with export_state(), global_hooks_kept(), custom_functions(custom):
        yield


@contextlib.contextmanager
def as_if_eager() -> Iterator[None]:
    """``torch.compiler.is_exporting()`` is False: models that ask may choose other ops, with other bits.

    ``is_compiling`` is left as it is: libraries ask it to keep traced tensors out of their caches.
    Dynamo, when first imported, notes the functions it knows. It must not note the patched one.
    """
    importlib.import_module("torch._dynamo")
    with mock.patch.object(torch.compiler, "is_exporting", return_value=False):
        yield


@contextlib.contextmanager
def observed(model: torch.nn.Module, calls: list[Call]) -> Iterator[None]:
    """Mark the tensors of every submodule call, through a global hook: the model gets none."""
    paths = {id(m): name for name, m in model.named_modules() if m is not model}

    def hook(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) not in paths or torch._C._are_functorch_transforms_active():
            return  # inside a vmap, a module's tensors are not those of the graph
        call = len(calls)
        size = lambda x: isinstance(x, torch.Size)  # noqa: E731 - no generated code can spell one
        told = pytree.tree_map_only(torch.Size, tuple, ((args, kwargs), output), is_leaf=size)
        sides = [pytree.tree_flatten(t) for t in told]
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
def global_hooks_kept() -> Iterator[None]:
    """Restore global hooks: PyTorch keeps a removed hook's flag, and (2.11) a failed export's hooks."""
    found = [v for k, v in vars(_modules).items() if k.startswith("_global_")]
    tables = [(t, dict(t)) for t in found if isinstance(t, dict)]
    try:
        yield
    finally:
        for table, before in tables:
            table.clear()
            table.update(before)


@contextlib.contextmanager
def custom_functions(found: list[str]) -> Iterator[None]:
    """Note user-written ``autograd.Function``s: tracing keeps their forward but not their backward.

    ``apply`` may have been looked up earlier (``swish = Swish.apply``). But each call looks up ``forward``,
    so that lookup is watched.
    """
    here = threading.get_ident()

    def look_up(cls: Any, name: str) -> Any:
        value = type.__getattribute__(cls, name)
        return watched(cls, value) if name == "forward" and threading.get_ident() == here else value

    def watched(cls: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if library(cls) != "torch":
                found.append(f"{cls.__module__}.{cls.__qualname__}")
            with _grad_mode_unseen(), _data_seen():
                return forward(*args, **kwargs)

        return run

    meta = torch.autograd.function.FunctionMeta
    with mock.patch.object(meta, "__getattribute__", look_up), _reentrant_checkpoints():
        yield


def replaced_backwards(custom: list[str]) -> tuple[str, ...]:
    """The note of user-written ``autograd.Function``s, as a warning too; none without any."""
    if not custom:
        return ()
    text = (
        f"{', '.join(sorted(set(custom)))}: a user-written autograd.Function was traced through; "
        "its forward is kept, its own backward is replaced by that of the ops it calls"
    )
    warnings.warn(text, CustomBackwardWarning, stacklevel=4)
    return (text,)


@contextlib.contextmanager
def _reentrant_checkpoints() -> Iterator[None]:
    """Run the function of a reentrant checkpoint directly: it may have regions in another grad mode."""
    apply = inspect.getattr_static(torch.autograd.Function, "apply")

    def run(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == _CHECKPOINT and callable(args[0]):
            return args[0](*args[2:])  # (function, whether to keep the random state, *its arguments)
        return apply.__get__(None, cls)(*args, **kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(run)):
        yield


@contextlib.contextmanager
def _grad_mode_unseen() -> Iterator[None]:
    """Hide switches of grad mode from the trace, inside a Function's forward.

    Grad mode is off in there, and a trace does not show that. A ``no_grad`` inside would end, for the
    trace, with grad mode off, and everything behind the Function would be detached.
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

    Inside a Function nothing is differentiated, so the two differ only in the version counter. A trace sees
    writes to ``x``, but not to ``x.data``.
    """
    plain, here = torch.Tensor.data, threading.get_ident()

    def get(x: torch.Tensor) -> torch.Tensor:
        return x if threading.get_ident() == here else plain.__get__(x)  # type: ignore[attr-defined]

    seen = property(get, plain.__set__)  # type: ignore[attr-defined]
    with mock.patch.object(torch.Tensor, "data", seen):
        yield
