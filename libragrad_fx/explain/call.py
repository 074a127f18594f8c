"""``attribute``: explain any model on what a person has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from libragrad_fx.attribution import Attribution, methods
from libragrad_fx.attribution.formulas import method_of
from libragrad_fx.attribution.methods import Layers, Resolution
from libragrad_fx.attribution.shares import By
from libragrad_fx.errors import InputError
from libragrad_fx.explain.inputs import Batch, batches
from libragrad_fx.explain.kept import Policy, captured
from libragrad_fx.explain.targets import Against, named, of_samples, resolved, warn_if_curved
from libragrad_fx.target import Target


def attribute(
    model: torch.nn.Module,
    inputs: Any,
    target: Target = None,
    *,
    method: str = "fullgrad_plus",
    policy: Policy = None,
    against: Target = None,
    layers: Layers = None,
    by: By | None = None,
    resolution: Resolution = "tokens",
    baseline: float = 0.0,
    steps: int = 50,
    seed: int = 0,
    processor: Any = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Attribution:
    """Explain ``target`` of a model, each sample of a batch by itself.

    Args:
        model: any ``nn.Module``, which is captured on the way (its transform is kept as long as the model
            lives, so that the next call is fast); or the result of ``transform`` or ``trace``.
        inputs: a tensor, a tuple, or a dict of keyword arguments, batch first; or what a person has: a
            picture (PIL, or the path of a file), a text, or a list of these; or a dict of such for a
            processor (``{"text": …, "text_pair": …}``, ``{"text": …, "images": …}``).
        target: as in Captum (int, tuple, tensor, list), or a callable from output to scalars. None is the
            model's own answer: the class of the largest logit, the next token of a text, the best span of
            an answer. A text is the class or the next token of that name; of a language model that gets
            texts, a number is a next token.
        method: a name in ``attribution.METHODS``, which says what it needs and its source.
            ``"fullgrad_plus"`` (FullGrad+, LibraGrad's flagship): Σ_c h g over the inputs of all blocks,
            plus every additive bias of the graph times its gradient, once. ``path_averaged(NAME)`` is the
            mean of such maps on the way from the baseline.
        policy: what to balance, and how: see ``transform``; ``"autograd"`` changes nothing. None is
            ``"libra"``, or of a captured module what that was captured by.
        against: another target, whose number is subtracted: why this, and not that?
        layers: module paths whose inputs to use in place of the method's own choice among the repeated
            blocks of the network (``blocks``); of a module that is called twice, ``path#2`` is the second
            call. ``"stages"``: the first block at each resolution, each with a map of its own
            (``Attribution.stages``), by one forward and one backward.
        by: ``"head"``, ``"block"`` or ``"module"``: also say what part each has (``Attribution.parts``).
        resolution: of methods that look at one place: ``"tokens"``, at the input of the first block, if
            there are blocks; ``"pixels"``, at the input of the model.
        baseline: of paths: where the line to the input starts, a number for each entry of it.
        steps: how many inputs ``integrated_gradients`` (Gauss-Legendre nodes), ``smoothgrad`` and
            ``path_averaged`` average over.
        seed: of ``smoothgrad``'s noise, of standard deviation 0.15 of the input's range, and of ``random``.
        processor: makes tensors of pictures or texts: a tokenizer or processor of Hugging Face, or a
            callable from a PIL picture to a tensor (C, H, W). A model of timm knows its own.
        batch_size: how many samples to explain at once; all by default.
        progress: show a progress bar.

    A model that had to be cut into several graphs, or to be recorded at each call, has the methods that
    look at its inputs alone: ``gradient``, ``input_x_gradient``, ``smoothgrad``, ``integrated_gradients``.

    Raises:
        InputError: unknown method or layer, inputs or a target that do not fit, or a model without what
            the method needs.
        LibraGradError: the model cannot be captured: see ``transform``.
    """
    if target is None and against is not None:
        raise InputError("against needs a target to compare with: target=3, against=5")
    asked = target if against is None else Against(target, against)
    return attribute_each(
        model, inputs, [asked], method=method, policy=policy, layers=layers, by=by, resolution=resolution,
        baseline=baseline, steps=steps, seed=seed, processor=processor, batch_size=batch_size,
        progress=progress,
    )[0]  # fmt: skip


def attribute_each(
    model: torch.nn.Module,
    inputs: Any,
    targets: Sequence[Target] | None = None,
    *,
    top: int = 1,
    policy: Policy = None,
    processor: Any = None,
    batch_size: int | None = None,
    progress: bool = False,
    **options: Any,
) -> list[Attribution]:
    """Explain several targets by one forward, and a backward for each.

    Args:
        targets: see ``attribute``; None are the ``top`` largest answers of each sample, in falling order.
        options: as for ``attribute``.

    Raises:
        InputError: as ``attribute``; no targets, or ``top`` less than 1.
    """
    if targets is not None and (isinstance(targets, (str, torch.Tensor)) or not len(targets)):
        raise InputError(f"targets is a list of targets, got {targets!r:.80}")
    if targets is None and top < 1:
        raise InputError(f"top is at least 1, got {top}")
    if not isinstance(batch_size, (int, type(None))) or (batch_size is not None and batch_size < 1):
        raise InputError(f"batch_size is a number from 1 on, got {batch_size!r}")
    complete = method_of(options.get("method", "fullgrad_plus")).sums
    parts: list[list[Attribution]] = []
    for batch in _shown(batches(model, inputs, processor, batch_size), progress):
        module = captured(model, batch.call, policy)
        chosen = [of_samples(t, batch) for t in targets or [None] * top]
        meant: list[Target] = []

        def resolve(output: Any, batch: Batch = batch, chosen: Any = chosen, meant: Any = meant) -> Any:
            meant += resolved(model, batch, output, chosen)
            for target in meant if complete else ():
                warn_if_curved(output, target)
            return meant

        found = methods.explain(module, batch.call, resolve, **options)
        parts.append([named(model, batch, a, t) for a, t in zip(found, meant, strict=True)])
    return [Attribution.joined(answers) for answers in zip(*parts, strict=True)]


def _shown(found: Sequence[Callable[[], Batch]], progress: bool) -> Any:
    """The batches, one made at a time."""
    made = (make() for make in found)
    if not progress:
        return made
    from rich.progress import track

    return track(made, "explaining", total=len(found))
