"""Notes, compares and restores the Python state that a model's forward can reach.

That is: attributes of its modules, and objects inside them; data on their classes; globals and closures
that their methods read. A graph keeps none of it, and tracing may leave traced tensors there.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

_DEEP = 4  # how deep containers and plain objects are followed
_LRU = type(functools.lru_cache(lambda: None))
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, _LRU)
_TRACED = (FakeTensor, FunctionalTensor, torch.SymInt, torch.SymFloat, torch.SymBool, torch.fx.Proxy)
_TREE = ("_parameters", "_buffers", "_modules")
_SCALARS = (int, float, complex, str, bytes, type(None), torch.Tensor, tuple)


class Snapshot:
    """A copy of each container, and of each tensor that is no parameter or buffer.

    Attributes of modules are always restored. State outside of them (globals, classes, caches) is restored
    only where a trace left something, because other threads and models may use it meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._containers: dict[int, tuple[str, Any, Any, bool]] = {}
        self._tensors: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
        self._globals: list[tuple[str, Any, str, Any]] = []
        self._caches: list[tuple[Any, int]] = []
        self._skip = {id(t) for t in (*model.parameters(), *model.buffers())}
        for path, m in model.named_modules():
            self._note(path, vars(m), True, 0)
        for name, holder, key, value in _surroundings(model):
            if isinstance(value, _LRU):
                self._caches.append((value, value.cache_info().currsize))
            elif isinstance(value, _SCALARS):
                self._globals.append((name, holder, key, value))
            else:
                self._note(name, value, False, 1)

    def _note(self, name: str, thing: Any, own: bool, depth: int) -> None:
        if depth > _DEEP or isinstance(thing, (nn.Module, *_CODE)) or id(thing) in self._containers:
            return
        if isinstance(thing, torch.Tensor):
            if id(thing) not in self._skip and type(thing) is torch.Tensor and not thing.is_meta:
                self._tensors[id(thing)] = name, thing, thing.detach().clone()
        elif isinstance(thing, (dict, list, set, deque)):
            self._containers[id(thing)] = name, thing, _plain_copy(thing), own
            if len(thing) < 1000:
                for key, value in _items(thing):
                    if key not in _TREE:  # of hooks only which there are: they are code
                        inner = _DEEP if "hooks" in str(key) else depth + 1
                        self._note(f"{name}.{key}", value, own, inner)
        elif isinstance(thing, tuple):
            for i, value in enumerate(thing):
                self._note(f"{name}.{i}", value, own, depth + 1)
        elif not _of_torch(type(thing)) and type(getattr(thing, "__dict__", None)) is dict:
            self._note(name, vars(thing), own, depth + 1)

    def changes(self) -> tuple[str, ...]:
        """The names of places whose values have changed; equal values in new objects do not count."""
        found = []
        for name, now, then, _ in self._containers.values():
            if isinstance(now, dict):
                held = _plain_copy(now)
                found += [f"{name}.{k}" for k in {**then, **held} if not _same_at(held, then, k)]
            elif not same(now, then):
                found.append(name)
        found += [n for n, now, then in self._tensors.values() if not same(now, then)]
        found += [n for n, holder, key, then in self._globals if not same(_at(holder, key), then)]
        return tuple(dict.fromkeys(n.lstrip(".") for n in found))

    def restore(self) -> None:
        """Restore the model's own state; elsewhere, only what a trace changed."""
        for _, now, then, own in self._containers.values():
            if _moved(now, then) and (own or _is_traced(now)):
                kinds: tuple[Any, ...] = (OrderedDict, dict, list, deque, set)
                kind = next(t for t in kinds if isinstance(now, t))
                kind.clear(now)
                (kind.extend if kind in (list, deque) else kind.update)(now, then)
        for _, now, then in self._tensors.values():
            if not same(now, then):
                with torch.no_grad(), torch.inference_mode(now.is_inference()):
                    now.copy_(then)
        for _, holder, key, then in self._globals:
            if _is_traced(_at(holder, key)):
                setattr(holder, key, then) if isinstance(holder, type) else holder.update({key: then})
        for cache, size in self._caches:
            if cache.cache_info().currsize > size:
                cache.cache_clear()


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors bit by bit and containers item by item."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
            return False
        return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (nn.Module, *_CODE)):
        return False
    with contextlib.suppress(Exception):  # a foreign == may do anything
        if type(a).__eq__ is not object.__eq__:
            return bool(a == b)
        return same(vars(a), vars(b))
    return False


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """Restore afterwards what a forward or a trace changed in the model's reach, whatever happens."""
    before = Snapshot(model)
    try:
        yield before
    finally:
        before.restore()


def _items(thing: Any) -> Any:
    """The items of a container, without calling methods of a subclass (transformers' table of activations
    builds a module at each lookup)."""
    if isinstance(thing, OrderedDict):
        return OrderedDict.items(thing)
    return dict.items(thing) if isinstance(thing, dict) else enumerate(thing)


def _plain_copy(thing: Any) -> Any:
    return dict(_items(thing)) if isinstance(thing, dict) else thing.copy()


def _at(holder: Any, key: str) -> Any:
    return vars(holder).get(key) if isinstance(holder, type) else holder.get(key)


def _same_at(now: Mapping[Any, Any], then: Mapping[Any, Any], key: Any) -> bool:
    return key in now and key in then and same(now[key], then[key])


def _moved(now: Any, then: Any) -> bool:
    """Whether a container holds other objects than it did, or in another order."""
    if isinstance(now, set):
        return now != then
    a, b = ([*_items(x)] if isinstance(x, dict) else x for x in (now, then))
    pairs = isinstance(now, dict)
    if len(a) != len(b):
        return True
    return any(
        (x[0] is not y[0] and x[0] != y[0]) or x[1] is not y[1] if pairs else x is not y
        for x, y in zip(a, b, strict=True)
    )


def _is_traced(value: Any) -> bool:
    """Whether a value holds an object that only a trace makes."""
    if isinstance(value, (set, frozenset)):
        return any(map(_is_traced, value))
    for x in pytree.tree_leaves(value):
        inner = (
            getattr(x, "__dict__", None) if not isinstance(x, (torch.Tensor, nn.Module, *_CODE)) else None
        )
        if isinstance(x, _TRACED) or (inner and any(isinstance(v, _TRACED) for v in inner.values())):
            return True
    return False


def _surroundings(model: nn.Module) -> Iterator[tuple[str, Any, str, Any]]:
    """(name, holder, key, value) of data outside the modules that methods of their classes can reach."""
    classes = {c for m in model.modules() for c in type(m).__mro__ if not _foreign(c)}
    stack: list[Any] = [f for m in model.modules() for f in vars(m).values()]
    for cls in classes:
        for key, value in vars(cls).items():
            if not key.startswith("__"):
                stack.append(value)
                if _is_data(value):
                    yield f"{cls.__name__}.{key}", cls, key, value
    seen: set[int] = set()
    while stack:
        function = _function(stack.pop())
        if id(function) in seen or _foreign(function):
            continue
        seen.add(id(function))
        if isinstance(function, _LRU):
            yield "", None, "", function
            function = function.__wrapped__
        if not isinstance(function, types.FunctionType):
            continue
        if hasattr(function, "__wrapped__"):
            stack.append(function.__wrapped__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for key, cell in cells:
            with contextlib.suppress(ValueError):  # an empty cell
                stack.append(cell.cell_contents)
                if _is_data(cell.cell_contents) and not isinstance(cell.cell_contents, _SCALARS):
                    yield key, None, key, cell.cell_contents
        for key in function.__code__.co_names:
            value = function.__globals__.get(key)
            stack.append(value)
            if _is_data(value):
                yield key, function.__globals__, key, value


def _function(thing: Any) -> Any:
    if isinstance(thing, (types.MethodType, classmethod, staticmethod)):
        return _function(thing.__func__)
    if isinstance(thing, functools.partial):
        return _function(thing.func)
    return _function(thing.fget) if isinstance(thing, property) else thing


def _is_data(value: Any) -> bool:
    if value is None or isinstance(value, (dict, list, set, *_SCALARS)):
        return value is not None
    return not isinstance(value, (nn.Module, *_CODE)) and not _foreign(type(value))


def _of_torch(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "numpy")


def _foreign(thing: Any) -> bool:
    """Whether a class or function comes from PyTorch, Python or NumPy, which keep no state of models."""
    top = (getattr(thing, "__module__", None) or "builtins").partition(".")[0]
    return top in ("torch", "numpy", "builtins") or top in sys.stdlib_module_names


# --- a copy that shares its tensors


def copied(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares their tensors; functions set on an instance refer to the copies."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    own = copy.deepcopy(model, memo)
    for m in own.modules():
        holders: list[Any] = [vars(m), m._forward_hooks, m._forward_pre_hooks]
        for holder in holders:
            for key, thing in [*holder.items()]:
                if (new := _rebound(thing, memo)) is not thing:
                    holder[key] = new
    return own


def _rebound(thing: Any, memo: dict[int, Any]) -> Any:
    """A function that refers to copied modules in place of the originals, also in its closure:
    ``deepcopy`` does not copy functions."""
    if id(thing) in memo:
        return memo[id(thing)]
    if isinstance(thing, types.MethodType):
        return types.MethodType(_rebound(thing.__func__, memo), _rebound(thing.__self__, memo))
    if isinstance(thing, functools.partial):
        parts = [_rebound(x, memo) for x in (thing.func, *thing.args)]
        return functools.partial(*parts, **{k: _rebound(v, memo) for k, v in thing.keywords.items()})
    if not isinstance(thing, types.FunctionType) or not thing.__closure__:
        return thing
    memo[id(thing)] = thing  # it may close over itself
    with contextlib.suppress(ValueError):  # an empty cell
        cells = [c.cell_contents for c in thing.__closure__]
        inner = [_rebound(c, memo) for c in cells]
        if any(a is not b for a, b in zip(cells, inner, strict=True)):
            new = types.FunctionType(
                thing.__code__, thing.__globals__, thing.__name__, thing.__defaults__,
                tuple(map(types.CellType, inner)),
            )  # fmt: skip
            new.__kwdefaults__ = thing.__kwdefaults__
            memo[id(thing)] = functools.update_wrapper(new, thing)
    return memo[id(thing)]
