"""Notices changes of a module after its graph was captured."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from libragrad_fx.errors import ModeError
from libragrad_fx.module.shells import CALLED, REFUSED

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Tensor)


class Tree:
    """A copy of what a graph took from a module tree for good: the submodules, their plain attributes, the
    dtypes of their parameters. The graph would ignore a later change, so ``require_unchanged`` raises."""

    def __init__(self, root: torch.nn.Module) -> None:
        skip = set(vars(torch.nn.Module())) - {"training"}
        modules = [(path, vars(m)) for path, m in root.named_modules() if m is not root]
        # of a captured module's attributes, only these come from the model
        own = {k: vars(root)[k] for k in vars(root).get("_attributes", ())}
        self._attributes = [
            (path, now, kept)
            for path, now in [("", vars(root)), *modules]
            if (kept := dict(_kept(own if now is vars(root) else now, skip)))
        ]
        places = [("", vars(root)), *modules]
        self._children = [(p, v["_modules"], dict(v["_modules"])) for p, v in places if v["_modules"]]
        self._dtypes = [
            (p, v["_parameters"], {k: None if t is None else t.dtype for k, t in v["_parameters"].items()})
            for p, v in places
            if v["_parameters"]
        ]  # fmt: skip
        held = [(now, then) for _, now, then in (*self._attributes, *self._children) if then]
        self._look = [(now, operator.itemgetter(*then)) for now, then in held]
        self._seen = [look(then) for (_, look), (_, then) in zip(self._look, held, strict=True)]
        self._wanted = [want for *_, then in self._dtypes for want in then.values()]

    def _is_as_it_was(self) -> bool:
        """A fast check, made at every call; False also for differences that may not matter."""
        try:
            if [look(now) for now, look in self._look] != self._seen:
                return False
        except (LookupError, RuntimeError, ValueError, TypeError):  # deleted, or replaced by a tensor
            return False
        found = [None if p is None else p.dtype for _, now, _ in self._dtypes for p in now.values()]
        return found == self._wanted

    def require_unchanged(self) -> None:
        """Raise ``ModeError`` if the tree has changed since capture."""
        if self._is_as_it_was():
            return
        for path, now, then in self._attributes:
            if not _holds(now, then):
                raise _changed(path, now, then)
        for path, now, then in self._children:
            # a module of the same class and configuration may replace another
            if not _holds(now, then) and not all(k in now and _alike(now[k], m) for k, m in then.items()):
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
        if key not in skip and key not in CALLED and key not in REFUSED:
            if isinstance(value, _PLAIN) or callable(value):
                yield key, value
            elif isinstance(value, (list, dict, tuple, set)):
                inner = value.values() if isinstance(value, dict) else value
                if all(isinstance(v, _PLAIN) and not isinstance(v, torch.Tensor) for v in inner):
                    yield key, copy.copy(value)


def _holds(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    try:
        return then.items() <= now.items()
    except (RuntimeError, ValueError, TypeError):  # a tensor or an array has no truth value
        return False


def _alike(a: torch.nn.Module | None, b: torch.nn.Module | None) -> bool:
    """Whether two modules have the same class and configuration, submodules included."""
    if a is b:
        return True
    if a is None or b is None or type(a) is not type(b) or a._modules.keys() != b._modules.keys():
        return False
    skip = set(vars(torch.nn.Module())) - {"training"}
    same = dict(_kept(vars(b), skip)).items() == dict(_kept(vars(a), skip)).items()
    return same and all(_alike(a._modules[k], b._modules[k]) for k in a._modules)


def _changed(path: str, now: Mapping[str, Any], then: Mapping[str, Any]) -> ModeError:
    name = next(k for k in then if k not in now or not _holds(now, {k: then[k]}))
    new = _short(now[name]) if name in now else "gone"
    return ModeError(
        f"{f'{path}.{name}'.lstrip('.')} was {_short(then[name])} when the graph was captured and is"
        f" {new} now. The graph holds what was there, so the change cannot take effect: change the"
        " original model and transform it again."
    )


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, torch.nn.Module) else f"{value!r:.60}"
