"""``program``: an explanation as one flat graph, traced once and run without autograd."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from libragrad_fx.account.certificate import compare
from libragrad_fx.attribution import Attribution
from libragrad_fx.attribution.methods import Layers, Resolution
from libragrad_fx.attribution.shares import By
from libragrad_fx.errors import InputError, VerificationError
from libragrad_fx.explain.inputs import Batch, batches
from libragrad_fx.explain.kept import Policy, captured
from libragrad_fx.explain.targets import named, require_answers, resolved
from libragrad_fx.module.captured import CapturedModule, anchor
from libragrad_fx.module.variants import fitting
from libragrad_fx.programs import leave
from libragrad_fx.programs.flat import Flat, shown, traced
from libragrad_fx.programs.modes import Mode, Runs, require_close, require_device
from libragrad_fx.programs.stack import Axes, alike, batch_axes, chosen_rows, other_rows
from libragrad_fx.target import Target, as_call, first_tensor, without_autocast
from libragrad_fx.types import Told

_MOST = 16  # the most graphs that are kept; the least recently used one is dropped


@dataclasses.dataclass(frozen=True)
class _Kept:
    module: CapturedModule
    flat: Flat
    run: Runs
    difference: float
    layout: tuple[Any, ...]

    def is_of(self, module: CapturedModule) -> bool:
        """Whether it is of this module, whose tensors lie in memory as they did."""
        return self.module is module and self.layout == _layout(self.flat.state(module))

    def given(self, call: Any, targets: Sequence[Target]) -> list[torch.Tensor]:
        """The arguments of the graph; targets as indices, None for the model's own."""
        tensors = tensors_of(call)
        index = self.flat.index(targets, tensors) if self.flat.indexed else None
        return self.flat.given(self.module, tensors, index)


class Program(Told):
    """An explanation as flat graphs of ATen ops: forward, balanced backward, method. ``program`` makes it.

    A graph serves any batch of more than one sample. A batch of one, and other sizes, are traced when they
    come, and kept. Parameters stay the model's: what is trained or loaded later counts. An autocast around
    a call changes nothing.
    """

    def __init__(self, model: torch.nn.Module, policy: Policy, target: Target, processor: Any,
                 mode: Mode, targets: int, **options: Any) -> None:  # fmt: skip
        self.model, self.policy, self.target, self.processor = model, policy, target, processor
        self.targets = targets
        self.mode: Mode = mode
        self.options = options
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[Any, _Kept] = {}
        self._keys: dict[Any, tuple[Any, Any]] = {}  # of a call: for any batch, and for its own sizes
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without its graphs: a copy traces its own."""
        return {k: v for k, v in vars(self).items() if k not in ("_kept", "_keys", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __call__(self, inputs: Any, target: Target = None) -> Attribution:
        """The answer of ``attribute``.

        Args:
            inputs: as for ``attribute``.
            target: a class of the output, or one for each sample; of an output of more axes, tuples. None
                is the model's own answer (the largest entry), or the callable that the program has.

        Raises:
            InputError: inputs or a target that do not fit; a program of several targets.
        """
        if self.targets != 1:
            raise InputError(f"this program explains {self.targets} targets: call each(inputs, targets)")
        return self.each(inputs, [target])[0]

    @without_autocast()
    def each(self, inputs: Any, targets: Sequence[Target] | None = None) -> list[Attribution]:
        """The answers of ``attribute_each``, by one forward.

        Args:
            inputs: as for ``attribute``.
            targets: as many as the program has, each as for a call. None are the largest entries of each
                sample, in falling order.

        Raises:
            InputError: inputs or targets that do not fit.
        """
        targets = [None] * self.targets if targets is None else targets
        if isinstance(targets, str) or not isinstance(targets, Sequence) or len(targets) != self.targets:
            raise InputError(f"targets is a list of {self.targets} targets, got {targets!r:.80}")
        batch = self._batch(inputs)
        kept = self.fitting(batch.call)
        meant = [self._meant(batch, kept.flat, target) for target in targets]
        answers, output = kept.flat.answers(kept.run(*kept.given(batch.call, meant)))
        if kept.flat.indexed and any(t is None for t in meant):
            require_answers(output)
        chosen = [self.target if i is None else kept.flat.places(i) for _, i in answers]
        return [named(self.model, batch, a, t) for (a, _), t in zip(answers, chosen, strict=True)]

    def said(self) -> list[str]:
        """What prints: what is explained, and the graphs traced so far."""
        of = self.options.get("method") or "fullgrad_plus"
        under = self.policy or "libra"
        lines = [f"program: {of} of {type(self.model).__name__}, policy {under}, mode {self.mode}"]
        for kept in self._kept.values():
            rows = f"{kept.flat.batch} samples" if kept.flat.batch else "any batch of more than one"
            count = sum(n.op == "call_function" for n in kept.flat.graph.graph.nodes)
            lines.append(
                f"  {count} ops for {rows}; values differ from attribute's by {kept.difference:.1e}"
            )
        return lines

    def difference(self, inputs: Any) -> float:
        """How far the graph's values were from those of ``attribute`` when it was traced, relative to the
        largest: 0.0 where they are equal to the bit. Otherwise products of fewer rows rounded otherwise;
        in mode ``compile``, fused ops too."""
        kept = self.fitting(self._batch(inputs).call)
        return max(kept.difference, kept.run.difference)

    def graph(self, inputs: Any) -> torch.fx.GraphModule:
        """The graph that runs for these inputs. It takes the module's tensors, those of the call, and the
        target."""
        return self.fitting(self._batch(inputs).call).flat.graph

    def save(self, path: str | Path, inputs: Any) -> Path:
        """Write the graph for inputs of these sizes with its parameters as a ``.pt2`` file. PyTorch loads
        it where this package is not installed: ``torch.export.load(path).module()(*inputs, target)``.

        It takes the tensors of a call in their order, and ``target``, int64 (B,) or, of several targets,
        (B, targets), behind them: the flat index into a sample's output; -1 for the model's own answer, -2
        for its second of several. It returns the values (B, ...) first,
        then what ``Program.outputs`` names. It serves any batch of more than one, or one of one.

        The file is loaded and run, and its map compared.

        Raises:
            InputError: another ending, or a path that cannot be written.
            LibraGradError: an op that the format lacks.
            VerificationError: another map than the program's.
        """
        return self._write("save", path, inputs)

    def package(self, path: str | Path, inputs: Any) -> Path:
        """As ``save``, compiled to machine code by AOTInductor, for this kind of processor; a C++ compiler
        has to be there. It runs without Python, see ``docs/programs.md``, or with
        ``torch._inductor.aoti_load_package(path)(*inputs, target)``."""
        return self._write("package", path, inputs)

    def to_onnx(self, path: str | Path, inputs: Any) -> Path:
        """As ``save``, as an ``.onnx`` file, for ONNX Runtime and browsers. Its inputs are ``input``
        (``input_2``, … of a model of several) and ``target``, its outputs those that ``Program.outputs``
        names. It needs the extra ``onnx``."""
        return self._write("to_onnx", path, inputs)

    def to_page(
        self, path: str | Path, inputs: Any, *, runtime: str | Path = ".", title: str = "",
        labels: Sequence[str] = (),
    ) -> Path:  # fmt: skip
        """Write ``to_onnx``'s program for one picture as a page for browsers: one ``.html`` file that opens
        from disk, without a network. A reader gives it pictures, and sees the map of each of their answers.

        Args:
            inputs: one picture or several, or their paths: the page offers them as examples. Of a tensor
                it offers none.
            runtime: the folder where ``npm install onnxruntime-web`` was run.
            title: what the page calls the model.
            labels: what its classes are called; else what the model says.

        Raises:
            InputError: the model is no classifier of pictures, or prepares them as no page can.
            LibraGradError, VerificationError: as ``to_onnx``.
        """
        from libragrad_fx.programs import page  # here, so that only pages import what draws

        return page.write(self, Path(path), inputs, Path(runtime), title, labels)

    @without_autocast()
    def _write(self, form: str, path: str | Path, inputs: Any) -> Path:
        leave.require_ending(form, Path(path))  # before anything is traced
        call = self._batch(inputs).call
        kept = self.fitting(call)
        given = kept.given(call, [None] * self.targets)
        with torch.no_grad():
            ((answer, _), *_), _ = kept.flat.answers(kept.run.eager(*given))
        given = given[len(kept.flat.state(kept.module)) :]
        made = leave.exported(kept.flat, kept.module, given, batch_axes(kept.module, call), form)
        names = [*self.signature(inputs)], self.outputs(inputs)
        return leave.write(form, Path(path), made, given, answer.values, kept.flat.scale, *names)

    def signature(self, inputs: Any) -> dict[str, str]:
        """What a saved program takes, by name: dtype and shape, B for a batch of any size."""
        call = self._batch(inputs).call
        kept, tensors = self.fitting(call), tensors_of(call)
        free = batch_axes(kept.module, call) or [()] * len(tensors)
        found = {}
        for i, (t, axes) in enumerate(zip(tensors, free, strict=True)):
            any_size = [a for a in axes if t.shape[a] > 1 and not kept.flat.batch]
            sizes = ", ".join("B" if a in any_size else str(n) for a, n in enumerate(t.shape))
            found[f"input_{i + 1}" if i else "input"] = f"{str(t.dtype).removeprefix('torch.')} ({sizes})"
        if kept.flat.indexed:
            batch: Any = kept.flat.batch or tensors[0].shape[0]
            batch = "B" if any("B" in form for form in found.values()) else batch
            found["target"] = f"int64 ({batch}{f', {self.targets}' * (self.targets > 1)})"
        return found

    def outputs(self, inputs: Any) -> list[str]:
        """What a saved program returns, in its order: fields of ``Attribution``, then ``chosen``, the flat
        index that was explained, and ``model``, the model's output. Those of the second target begin with
        ``target_2.``."""
        fields = self.fitting(self._batch(inputs).call).flat.fields
        return [
            ".".join(filter(None, (f"target_{i + 1}" if i else "", field, key))) for i, field, key in fields
        ]

    @without_autocast()
    def fitting(self, call: Any) -> _Kept:
        """The graph for a call, traced if there is none yet."""
        module = fitting(captured(self.model, call, self.policy), call)
        exact = _key(anchor(module), call, ())
        with self._lock:
            keys = self._keys.get((module, exact))
            if keys is None:
                keys = _key(anchor(module), call, batch_axes(module, call)), exact
                self._keys = {**dict([*self._keys.items()][-_MOST:]), (module, exact): keys}
            key = next((k for k in keys if k in self._kept and self._kept[k].is_of(module)), None)
            found = self._traced(module, call) if key is None else self._kept.pop(key)
            self._kept[keys[found.flat.batch > 0]] = found  # the latest used is the last
            for old in [*self._kept][:-_MOST]:
                del self._kept[old]
            return found

    def _traced(self, module: CapturedModule, call: Any) -> _Kept:
        first = shown(module, call, self.target, **self.options)
        entries = math.prod(first.output.shape[1:]) if first.indexed else 1
        if not self.targets <= entries:
            raise InputError(f"{self.targets} targets of an output with {entries} entries for each sample")
        axes = () if first.apart else batch_axes(module, call)
        # for a free batch PyTorch may choose other kernels, or have none
        for free, python in ((axes, True), (axes, False), ((), False)) if any(axes) else (((), False),):
            try:
                made = traced(first, self.target, self.targets, free, python)
            except RuntimeError:
                if free:
                    continue
                raise
            state = made.state(module)
            where = made.fields.index((0, "values", ""))
            run = Runs(made.graph, self.mode, len(state), where, made.scale)
            kept = _Kept(module, made, run, 0.0, _layout(state))
            answers, output, given = self._first(kept, call)
            equal, distance, ulp = compare([output], [first.output])
            if not equal and not _is_output(output, module, call):
                continue
            if made.batch or self._serves(kept, call, axes, answers[0][0].values, output):
                break
        else:
            raise VerificationError(
                f"the traced forward differs from the model's, by {distance:.1g} at most, {ulp} ulp"
            )
        want, dtype = made.like.values, anchor(module).dtype
        far = max(require_close(a.values, want, "the program's map", dtype, made.scale) for a, _ in answers)
        if self.mode != "eager":
            run(*given)
        return dataclasses.replace(kept, difference=far)

    def _first(self, kept: _Kept, call: Any) -> tuple[list[Any], torch.Tensor, list[torch.Tensor]]:
        """The answers for the first entry of each sample's output; the output; what the graph was given."""
        given = kept.given(call, [(0,) * len(kept.flat.sizes)] * self.targets)
        with torch.no_grad():
            return *kept.flat.answers(kept.run.eager(*given)), given

    def _serves(
        self, kept: _Kept, call: Any, axes: Sequence[Axes], map: torch.Tensor, output: torch.Tensor
    ) -> bool:
        """Whether a graph for any batch gives the model's bits for another one, and the same map of each
        sample if samples do not meet. map, output: of all samples of the call"""
        if not (rows := other_rows(call, axes)):
            return True
        some, dtype = chosen_rows(call, axes, rows), anchor(kept.module).dtype
        try:
            ((answer, _), *_), found, _ = self._first(kept, some)
            if len(map) == len(output) and alike(found, output[rows]):
                require_close(answer.values, map[rows], "the map of another batch", dtype, kept.flat.scale)
        except (RuntimeError, VerificationError):  # as of a callable target with a tensor for each sample
            return False
        return _is_output(found, kept.module, some)

    def _batch(self, inputs: Any) -> Batch:
        (make,) = batches(self.model, inputs, self.processor, None)
        return make()

    def _meant(self, batch: Batch, made: Flat, target: Target) -> Target:
        """The target as indices; None for the model's own."""
        if target is not None and not made.indexed:
            why = (
                "a part of this program"
                if self.target is not None
                else "the one number that the model gives"
            )
            raise InputError(f"the target is {why}: call it without one")
        if callable(target):
            raise InputError("a callable is part of the graph: program(…, target=callable)")
        if target is None:
            if made.indexed and len(made.sizes) > 1:
                raise InputError(
                    f"the output has shape (B, {', '.join(map(str, made.sizes))}): say which target to"
                    " explain, for each sample a tuple of indices"
                )
            return None
        like = torch.empty((batch.size, *made.sizes), device="meta")
        return resolved(self.model, batch, like, [target])[0]


def program(
    model: torch.nn.Module,
    inputs: Any,
    *,
    method: str = "input_x_gradient",
    target: Target = None,
    targets: int = 1,
    policy: Policy = None,
    mode: Mode = "eager",
    layers: Layers = None,
    by: By | None = None,
    resolution: Resolution = "tokens",
    baseline: float = 0.0,
    steps: int = 50,
    seed: int = 0,
    processor: Any = None,
) -> Program:
    """Trace an explanation into one flat graph of ATen ops, which runs without autograd.

    The graph is the forward, the balanced backward and the arithmetic of the method. Its zeros are gone,
    and what only serves other outputs. It is checked against ``attribute`` on ``inputs`` when it is traced.

    Args:
        model, inputs, method, policy, layers, by, resolution, processor: as for ``attribute``.
        baseline, steps, seed: as for ``attribute``. All steps of a method that averages over inputs run as
            one batch: the program needs memory for ``steps`` times the samples of a call.
        target: None: an argument of each call. A callable (``Likeness``, or your own from the output to one
            number for each sample): a part of the graph.
        targets: how many targets of each sample a call explains, by one forward: see ``Program.each``.
        mode: ``"eager"``: op by op. ``"cuda_graph"``: all ops as one CUDA graph, on a GPU, where the host
            is what a small batch waits for. ``"compile"``: fused by TorchInductor, which takes a minute or
            more for each size of the inputs; on a GPU, one CUDA graph too. It rounds otherwise, see
            ``Program.difference``.

    Raises:
        InputError: what ``attribute`` refuses; a method that averages over inputs, of a model whose graph
            is for one batch size; a mode that the device has not.
        VerificationError: the traced forward differs from the model's, or the map from ``attribute``'s.
    """
    if target is not None and not callable(target):
        raise InputError(
            "a target is an argument of each call, prog(inputs, target); here it is a callable"
        )
    if type(targets) is not int or targets < 1 or (targets > 1 and target is not None):
        raise InputError(
            f"targets is how many a call explains; one if the program has its own. Got {targets!r}"
        )
    require_device(mode, anchor(model))
    made = Program(
        model, policy, target, processor, mode, targets, method=method, layers=layers, by=by,
        resolution=resolution, baseline=baseline, steps=steps, seed=seed,
    )  # fmt: skip
    made.fitting(made._batch(inputs).call)
    return made


def tensors_of(call: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(as_call(call)) if isinstance(t, torch.Tensor)]


def _is_output(output: torch.Tensor, module: CapturedModule, call: Any) -> bool:
    """Whether it is what the model returns, to the bit: in grad mode, or without it, where PyTorch may call
    other kernels."""
    args, kwargs = as_call(call)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            if compare([output], [first_tensor(module(*args, **kwargs)).detach()])[0]:
                return True
    return False


def _layout(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    return tuple(t.stride() for t in tensors)


def _key(like: torch.Tensor, call: Any, free: Sequence[Axes]) -> Any:
    """What a graph was traced for; ``like``: of the module's dtype and device."""
    leaves, spec = pytree.tree_flatten(as_call(call))
    axes = iter(free)

    def form(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return repr(x)
        mine = next(axes, ())
        sizes = tuple("B" if a in mine and n > 1 else n for a, n in enumerate(x.shape))
        return sizes, None if x.is_contiguous() else x.stride(), x.dtype, x.device

    return str(spec), tuple(map(form, leaves)), like.dtype, like.device
