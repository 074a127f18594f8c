"""Measures what a balanced gradient costs beside other ways to compute one: ``docs/performance.md``.

    python tools/bench.py [--only 'vit_*'] [--rounds 10] [--threads 1] [--device cuda]
                          [--mode eager|compiled|program|transform|sample|suite] [--limit 120]

The sides of a case run in turns in one process: plain autograd, ours, the authors' stop-gradient arithmetic
on our graph, Captum's InputXGradient, and on torchvision's ViT the CP-LRP patches of LXT, if installed
(``pip install lxt``). Weights and inputs are random; parameters are frozen unless a case says otherwise.
Long inputs also run in segments (``checkpointed``).

Modes: ``compiled`` compares plain and ours under ``torch.compile``. ``program`` compares programs of
``--method``, in each of their modes, with plain autograd and with it compiled. ``transform`` times the
transform against ``torch.export`` alone. ``sample`` runs the small models of the coverage
sample. ``suite`` runs all of timm's modules and Hugging Face's architectures (``--only 'hf/*'``), each in a
process of its own with ``--limit`` seconds. Results are kept in ``docs/performance.jsonl``; a case that is
run again replaces its old one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import importlib.util
import json
import math
import multiprocessing
import platform
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

import libragrad_fx as lg
from libragrad_fx.bench import HEAD, Cost, Side, compare, gradient, peak, race
from libragrad_fx.coverage.check import generic
from libragrad_fx.coverage.suites import SUITES, build
from libragrad_fx.ops import insert
from libragrad_fx.target import as_call, first_tensor, inexact, middle, select
from zoo import SAMPLE

RESULTS = Path("docs/performance.jsonl")
Forward = Callable[[torch.Tensor], torch.Tensor]


# --- the models


@dataclasses.dataclass(frozen=True)
class Case:
    """One model on one input; ``rounds`` is how often the slow ones are run at most."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rounds: int = 99
    frozen: bool = True
    long: bool = False


def _timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **kwargs)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


class _Decoder(nn.Module):
    """A Llama, from its input embeddings to the logits of the last token."""

    def __init__(self, depth: int, width: int, hidden: int, count: int, vocabulary: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": depth}
        heads = {"num_attention_heads": count, "num_key_value_heads": count // 2, "vocab_size": vocabulary}
        self.llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.llama(inputs_embeds=x).logits[:, -1]


def _cases() -> Iterator[Case]:
    image = lambda batch, size=224: (batch, 3, size, size)  # noqa: E731
    for name in (
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224",
        "deit3_base_patch16_224", "eva02_small_patch14_224", "beitv2_base_patch16_224",
        "gmixer_24_224", "swin_tiny_patch4_window7_224", "convnext_tiny",
    ):  # fmt: skip
        yield Case(name, functools.partial(_timm, name), image(4))
    yield Case("vit_large_patch16_224", lambda: _timm("vit_large_patch16_224"), image(4), rounds=4)
    tv = functools.partial(Case, make=lambda: _torchvision("vit_b_16"), shape=image(4))
    yield tv("torchvision/vit_b_16")
    yield tv("torchvision/vit_b_16, parameters that require grad", frozen=False)
    yield Case("llama 8x512, 256 tokens", lambda: _Decoder(8, 512, 1408, 8, 8000), (2, 256, 512))
    for size in (256, 512, 1024, 1440):
        tokens = (size // 16) ** 2
        make = functools.partial(
            _timm, "vit_small_patch16_224", img_size=size, class_token=False, global_pool="avg"
        )
        rounds = 99 if tokens < 4000 else 4
        yield Case(f"vit_small, {tokens} tokens", make, image(1, size), rounds, long=True)
    for batch in (1, 2, 8, 16):
        yield Case(f"vit_small, batch {batch}", lambda: _timm("vit_small_patch16_224"), image(batch))


def _gpu_cases() -> Iterator[Case]:
    """Sizes that fill a GPU, and one sample alone."""
    for name in (
        "vit_base_patch16_224", "convnext_tiny", "gmixer_24_224", "eva02_small_patch14_224",
        "swin_tiny_patch4_window7_224",
    ):  # fmt: skip
        yield Case(f"{name}, batch 64", functools.partial(_timm, name), (64, 3, 224, 224))
    yield Case("torchvision/vit_b_16, batch 64", lambda: _torchvision("vit_b_16"), (64, 3, 224, 224))
    yield Case("vit_base_patch16_224, batch 1", lambda: _timm("vit_base_patch16_224"), (1, 3, 224, 224))
    for size, batch in ((1024, 8), (2048, 1)):
        make = functools.partial(
            _timm, "vit_small_patch16_224", img_size=size, class_token=False, global_pool="avg"
        )
        yield Case(f"vit_small, {(size // 16) ** 2} tokens, batch {batch}", make, (batch, 3, size, size))
    llama = functools.partial(_Decoder, 16, 2048, 8192, 32, 32000)  # 1.1 billion parameters
    yield Case("llama 16x2048, 2048 tokens, batch 4", llama, (4, 2048, 2048))


# --- the authors' arithmetic: the value of f and the gradient of g, as cst(f) + (g - cst(g))


def _swap(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return f.detach() + (g - g.detach())


def _gated(op: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    x, y = args[0], op(*args, **kwargs)
    gate = torch.where(x == 0, 0.5, y / x).detach()
    return _swap(y, x * gate)


def _layer_norm(
    op: Any, x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float, *_: Any
) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.var(-1, keepdim=True, correction=0) + eps).sqrt().detach()
    if weight is not None:
        scaled = scaled * weight
    return _swap(op(x, shape, weight, bias, eps), scaled if bias is None else scaled + bias)


def _attention(op: Any, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return op(q.detach(), k.detach(), *args, **kwargs)


def _halved(x: torch.Tensor, factor: float) -> torch.Tensor:
    return _swap(x, x * factor)


_ARITHMETIC = {
    "gelu": _gated, "silu": _gated, "layer_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
}  # fmt: skip


def stop_gradient_arithmetic(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Our graph with its edits written as the authors write them; twins not named above stay ours."""
    root = nn.Module()
    root.__dict__.update(vars(gm))
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    for node in graph.nodes:
        op = getattr(node.target, "aten_op", None)
        if node.target is insert.scale:
            node.target = _halved
        elif op is not None and node.target.__name__ in _ARITHMETIC:
            node.target, node.args = _ARITHMETIC[node.target.__name__], (op, *node.args)
    return torch.fx.GraphModule(gm, graph)


# --- LXT patches classes for the whole process: here for one call


@contextlib.contextmanager
def _lxt_patches() -> Iterator[None]:
    from lxt.efficient.core import monkey_patch
    from lxt.efficient.models.vit_torch import cp_LRP
    from torchvision.models import vision_transformer

    originals = {cls: cls.forward for cls in cp_LRP}
    try:
        monkey_patch(vision_transformer, cp_LRP)
        yield
    finally:
        for cls, forward in originals.items():
            cls.forward = forward


def _under_lxt(run: Side) -> Side:
    def patched(x: torch.Tensor) -> Any:
        with _lxt_patches():
            return run(x)

    return patched


# --- a case


def _sides(case: Case, model: nn.Module, gm: Any, classes: int) -> dict[str, Side]:
    from captum.attr import InputXGradient

    logit = lambda m: lambda x: select(m(x), middle)  # noqa: E731
    plain = logit(model)
    captum = InputXGradient(model)
    sides = {
        "plain": gradient(plain),
        "balanced": gradient(logit(gm)),
        "stop-gradient arithmetic": gradient(logit(stop_gradient_arithmetic(gm))),
        "Captum InputXGradient": lambda x: captum.attribute(x, target=classes // 2),
    }
    if case.long:
        sides["balanced, checkpointed"] = gradient(logit(lg.checkpointed(gm)))
    if case.name.startswith("torchvision/vit") and importlib.util.find_spec("lxt"):
        sides["LXT, CP-LRP"] = _under_lxt(gradient(plain))
    return sides


def _compiled(model: nn.Module, gm: Any, x: torch.Tensor) -> dict[str, Side]:
    logit = lambda m: lambda x: select(m(x), middle)  # noqa: E731
    both = {"plain, compiled": model, "balanced, compiled": gm}
    sides = {k: gradient(logit(torch.compile(m, fullgraph=True))) for k, m in both.items()}
    for side in sides.values():
        side(x)
    return sides


def _programs(model: nn.Module, gm: Any, x: torch.Tensor, options: argparse.Namespace) -> dict[str, Side]:
    """The model's own gradient, and programs, each warmed up. A GPU's batch of one is traced for itself."""
    logit = lambda m: lambda x: select(m(x), middle)  # noqa: E731
    target = math.prod(model(x).shape[1:]) // 2
    sides = {"plain": gradient(logit(model)), "balanced": gradient(logit(gm))}
    sides["attribute"] = lambda x: lg.attribute(gm, x, target, method=options.method)
    modes = ["eager", *["cuda_graph"] * x.is_cuda, *["compile"] * options.compile]
    for mode in modes:
        made = lg.program(gm, x, method=options.method, mode=mode)
        sides[f"program, {mode}"] = lambda x, made=made: made(x, target)
    if options.compile:
        sides["plain, compiled"] = gradient(logit(torch.compile(model, fullgraph=True)))
    for side in sides.values():
        side(x), side(x)
    return sides


def _transforms(model: nn.Module) -> dict[str, Side]:
    return {
        "torch.export": lambda x: torch.export.export(model, (x,)),
        "transform": lambda x: lg.transform(model, x),
    }


def _of_suite(suite: str, name: str, program: bool) -> tuple[torch.Tensor, dict[str, Side]]:
    """A model of a suite: the gradient of its target by its first float input. Numbers too
    small for a normal float are 0: random weights make some, and arithmetic with them is slow."""
    torch.set_flush_denormal(True)
    subject = build(suite, name)
    model = subject.model.eval().requires_grad_(False)
    generic(model, subject.inputs)
    leaves, spec = pytree.tree_flatten(as_call(subject.inputs))
    at = next(i for i, v in enumerate(leaves) if inexact(v))

    def answer(m: nn.Module) -> Forward:
        def f(x: torch.Tensor) -> torch.Tensor:
            args, kwargs = pytree.tree_unflatten([*leaves[:at], x, *leaves[at + 1 :]], spec)
            return select(m(*args, **kwargs), subject.target)

        return f

    gm = lg.transform(model, subject.inputs)
    sides = {"plain": gradient(answer(model)), "balanced": gradient(answer(gm))}
    if program:
        sides["program, eager"] = _program_of(gm, subject.inputs)
    return leaves[at], sides


def _program_of(gm: Any, inputs: Any) -> Side:
    """The middle entry of each sample's output, by a program; all inputs get their maps."""
    made = lg.program(gm, inputs)
    args, kwargs = as_call(inputs)
    sizes = first_tensor(gm(*args, **kwargs)).shape
    place = np.unravel_index(math.prod(sizes[1:]) // 2, sizes[1:])
    target = [tuple(map(int, place))] * sizes[0] if len(sizes) > 1 else None
    return lambda x: made(inputs, target)


def dry(case: Case, dtype: torch.dtype) -> str:
    """A case without its device: model, input and output as shapes."""
    with torch.device("meta"):
        model = case.make().eval().to(dtype)
    with torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True):
        y = first_tensor(model(torch.empty(case.shape, dtype=dtype)))
    weights = sum(p.numel() for p in model.parameters())
    return f"{case.name}: {case.shape} -> {tuple(y.shape)}, {weights / 1e6:.0f} million parameters"


def _apart(case: Case, options: argparse.Namespace) -> list[Cost]:
    """``run`` in a process of its own, which is ended when its time is up; no costs if it fails."""
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    process = context.Process(target=lambda: found.put(run(case, options)), daemon=True)
    process.start()
    costs: list[Cost] = []
    deadline = time.monotonic() + options.limit
    while not costs and process.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            costs = found.get(timeout=1)
    process.kill()
    process.join()
    return costs


def run(case: Case, options: argparse.Namespace) -> list[Cost]:
    torch.manual_seed(0)
    if options.mode in ("sample", "suite"):
        x, sides = _of_suite(*case.name.split("/", 1), options.mode == "sample")
        spent = sum(c.seconds for c in race(sides, x, 3))
        rounds = options.rounds if options.mode == "sample" else int(options.limit / 20 / spent)
        return compare(sides, x, min(options.rounds, max(rounds, 3)))
    dtype = getattr(torch, options.dtype)
    model = case.make().eval().requires_grad_(not case.frozen).to(options.device, dtype)
    x = torch.randn(case.shape, device=options.device, dtype=dtype)
    rounds = min(options.rounds, case.rounds)
    if options.mode == "transform":
        return race(_transforms(model), x, rounds)
    gm = lg.transform(model, x)
    if options.mode == "program":
        for p in model.parameters():
            if not p.any():  # timm's heads: without them every gradient is zero
                nn.init.normal_(p, std=0.02)
        sides = _programs(model, gm, x, options)
        peaks = {name: peak(side, x) for name, side in sides.items()} if x.is_cuda else None
        return race(sides, x, rounds, peaks)
    if options.mode == "compiled":
        return race(_compiled(model, gm, x), x, rounds)
    return compare(_sides(case, model, gm, model(x).shape[-1]), x, rounds)


# --- results


def _machine(options: argparse.Namespace) -> str:
    where = f"{options.threads} thread{'s' * (options.threads > 1)} of {_processor()}"
    if options.device != "cpu":
        where = torch.cuda.get_device_name(options.device)
    return f"{where}, {options.dtype}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _keep(case: Case, machine: str, mode: str, costs: list[Cost]) -> None:
    new = {"case": case.name, "shape": case.shape, "machine": machine, "mode": mode}
    old = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    key = lambda r: (r["case"], r["machine"], r["mode"])  # noqa: E731
    rows = [r for r in old if key(r) != key(new)]
    rows.append({**new, "costs": [dataclasses.asdict(c) for c in costs]})
    RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows))


def report() -> str:
    """The page, made from ``RESULTS``."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    text = [(Path(__file__).parent / "performance.md").read_text().rstrip()]
    for machine, mode in dict.fromkeys((r["machine"], r["mode"]) for r in rows):
        text += ["", f"## {mode.capitalize()}: {machine}"]
        here = [
            (r["case"], r["shape"], [Cost(**c) for c in r["costs"]])
            for r in rows
            if (r["machine"], r["mode"]) == (machine, mode)
        ]
        if mode == "suite":
            text += _summary({case: costs for case, _, costs in here})
            continue
        for case, sizes, costs in here:
            shape = " x ".join(map(str, sizes))
            text += ["", f"### {case}{f' ({shape})' * bool(shape)}", "", HEAD]
            text += [c.against(costs[0]) for c in costs]
    return "\n".join(text) + "\n"


def _summary(cases: dict[str, list[Cost]]) -> list[str]:
    """All models of whole libraries, a line each, the dearest first."""
    done = sorted((c for c in cases.items() if c[1]), key=lambda c: -c[1][1].ratio)
    ratios = [costs[1].ratio for _, costs in done] or [math.nan]
    within = sum(r <= 1 for r in ratios)
    failed = [case for case, costs in cases.items() if not costs]
    return [
        "",
        f"Of {len(done)} models the balanced backward is no dearer than autograd's in {within};"
        f" the median ratio is {statistics.median(ratios):.3f}, the largest {ratios[0]:.3f}."
        + f" Not timed (no float input, or not done in time): {', '.join(failed)}."
        * bool(failed),
        "",
        HEAD.replace("backward", "model", 1),
        *(dataclasses.replace(costs[1], name=case).against(costs[0]) for case, costs in done),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="*", help="cases whose name matches this pattern")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--mode", choices=("eager", "compiled", "program", "transform", "sample", "suite"), default="eager"
    )
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--dry", action="store_true", help="only build the cases, as shapes")
    parser.add_argument("--method", default="input_x_gradient", help="of programs")
    parser.add_argument("--compile", action="store_true", help="compiled programs and models too: minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    named = [*SAMPLE]
    if options.mode == "suite":
        named = [(suite, name) for suite in ("timm", "hf") for name in SUITES[suite].names()]
    of_suites = [Case("/".join(key), nn.Identity, ()) for key in named]
    own = _gpu_cases if options.device.startswith("cuda") else _cases
    every = of_suites if options.mode in ("sample", "suite") else own()
    cases = [c for c in every if fnmatch.fnmatch(c.name, options.only)]
    if options.dry:
        print(*(dry(case, getattr(torch, options.dtype)) for case in cases), sep="\n")
        return
    for case in tqdm(cases, unit="case"):
        costs = (_apart if options.mode == "suite" else run)(case, options)
        tqdm.write("\n".join([f"\n{case.name}", HEAD, *(c.against(costs[0]) for c in costs)]))
        mode = f"program, {options.method}" if options.mode == "program" else options.mode
        _keep(case, _machine(options), mode, costs)
        RESULTS.with_suffix(".md").write_text(report())


if __name__ == "__main__":
    main()
