"""The command line. Results go to stdout, what is said about them to stderr.

Exit codes: 0 done; 1 a verification failed; 2 bad usage, or an error that one line explains.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import traceback
import warnings
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from torch.utils import _pytree as pytree
from typer.core import TyperGroup

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.capture.examples import infer_inputs
from libragrad_fx.errors import (
    CustomBackwardWarning,
    CutWarning,
    GateOutputWarning,
    InputError,
    LibraGradError,
)
from libragrad_fx.extras import need
from libragrad_fx.target import first_tensor, largest, middle, select
from libragrad_fx.viz.draw import tree
from libragrad_fx.viz.flow import streams
from libragrad_fx.viz.strip import joined, streams_table

_CAPTIONS = {"fullgrad_plus": "FullGrad+", "input_x_gradient": "Input×Gradient"}


class _OneLineErrors(TyperGroup):
    """The library's errors become one line and exit code 2; ``--debug`` shows where they arose."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _say_warning
                return super().invoke(ctx)
        except LibraGradError as e:
            if ctx.params.get("debug"):
                typer.echo("".join(traceback.format_exception(e)), err=True, nl=False)
            typer.echo(f"error: {_one_line(e)}", err=True)
            raise typer.Exit(2) from e


def _say_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, (CustomBackwardWarning, CutWarning, GateOutputWarning)):
        typer.echo(f"warning: {_one_line(message)}", err=True)


def _one_line(message: Any) -> str:
    return " ".join(str(message).split())


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"libragrad {lg.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the full traceback of an error.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version.")
    ] = False,
) -> None:
    """Explain any PyTorch model with a balanced backward pass, at an unchanged forward.

    A model is a timm name (vit_base_patch16_224), torchvision:NAME, or package.module:factory, a
    function of yours that returns an nn.Module. Start with: libragrad demo
    """


ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="timm name, torchvision:NAME or package.module:factory."),
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the published weights.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Weights: safetensors, or a torch state dict (no code is run)."
    ),
]
TargetIndex = Annotated[
    int | None, typer.Option(min=0, help="Class to explain; the model's own answer if not given.")
]
Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE", help="What to balance, and how: libra, cp_lrp or a .yaml file."
    ),
]
Rules = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Facts about more ops (grammar: rules/README.md)."),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random weights and inputs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command(short_help="Write a page that shows the difference; offline.")
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The page.")] = Path(
        "out/demo.html"
    ),
    images: Annotated[int, typer.Option(min=1, max=64, help="Pictures shown for each model.")] = 6,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write a page that shows the difference on two small trained models. Needs no network.

    One self-contained HTML file: plain and balanced heat maps of a vision transformer and a mixer,
    their errors, the certificates, and every change that was made to the backward.
    """
    from libragrad_fx.demo import build as builder  # its dependencies are an extra

    with _working("two models") as say:
        text = builder.page(images, say)
    _write(output, text.encode())
    typer.echo(f"wrote {output}")
    if show:
        webbrowser.open(output.resolve().as_uri())


@app.command(short_help="Draw what speaks for a class in a picture.")
def explain(
    image: Annotated[Path, typer.Argument(help="Any picture.")],
    model: Annotated[str, typer.Option(help="As MODEL in the other commands.")],
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    method: Annotated[
        Literal["fullgrad_plus", "input_x_gradient"],
        typer.Option(help="input_x_gradient is taken at the first block, if the model has blocks."),
    ] = "fullgrad_plus",
    plain: Annotated[
        bool, typer.Option("--plain", help="Only the map of the plain gradient.")
    ] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture.")] = Path("out.png"),
) -> None:
    """Draw which parts of a picture speak for a class, and which against it.

    A PNG: the input, the map of the plain gradient and the map of the balanced one, on one scale.
    """
    heatmap = _heatmap()
    picture = models.read_image(image)
    loaded = _load(model, pretrained, checkpoint, seed=0)
    steps = models.preprocessing(loaded)
    x = steps.to_tensor(picture)[None].to(_dtype(loaded.module))
    with _working("capturing the model") as say:
        sides: dict[str, Any] = {"plain": lg.trace(loaded.module, x)}
        if not plain:
            sides["balanced"] = lg.transform(loaded.module, x)
        logits = first_tensor(_run(sides["plain"], x))
        if bool(logits.isnan().any()):
            raise InputError(f"{model} answers nan on this picture: there is nothing to draw")
        chosen = target if target is not None else largest(logits)
        say("explaining")
        found = {k: _attribute(gm, x, chosen, method) for k, gm in sides.items()}
    maps = {k: a.values[0] for k, a in found.items()}
    if any(m.ndim != 2 for m in maps.values()):
        raise InputError(f"{model} gives a map over tokens that have no place in the picture")
    title = _title(loaded, logits, chosen)
    captions = [
        (f"{_CAPTIONS[method]}, {k}\ncompleteness error {float(a.completeness_error[0]):.3g}", k)
        for k, a in found.items()
    ]
    sheet = heatmap.figure(
        steps.seen(x[0]), [(c, maps[k].numpy()) for c, k in captions], title, _weights(loaded)
    )
    _write(output, lambda file: sheet.savefig(file, format="png"))
    typer.echo(f"{title}\nimage: {steps.note}")
    for k, a in found.items():
        size = "x".join(map(str, maps[k].shape))
        typer.echo(
            f"{k}: {_CAPTIONS[method]} on {size} positions,"
            f" completeness error {float(a.completeness_error[0]):.3g} of output {float(a.output[0]):.4g}"
        )
    typer.echo(f"wrote {output}")


@app.command(short_help="List what would change in the backward, and why.")
def plan(
    model: ModelName,
    policy: Policy = "libra",
    rules: Rules = None,
    why: Annotated[str | None, typer.Option(metavar="NODE", help="Explain one node only.")] = None,
    json: Json = False,
) -> None:
    """List what would change in a model's backward, node by node, with the rule and the reason."""
    module = _load(model, False, None, seed=0).module
    with _working("capturing the model"):
        made = lg.plan(module, policy=policy, rules=rules)
    if why is not None:
        typer.echo(_explain_node(made, why))
    else:
        typer.echo(made.to_json() if json else str(made))


@app.command(short_help="Check every promise; print the certificate.")
def verify(
    model: ModelName,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    dtype: Annotated[
        Literal["float32", "float64"],
        typer.Option(help="What to compute in; float64 is the sharper."),
    ] = "float32",
    policy: Policy = "libra",
    rules: Rules = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Check every promise on random inputs and print the certificate; exit 1 if one is broken.

    Same output to the bit, the original graph under the edits, every node balanced, nothing lost.
    """
    module = _load(model, pretrained, checkpoint, seed).module.to(getattr(torch, dtype))
    with _working("capturing the model") as say:
        inputs = _inputs(module, seed)
        gm = lg.transform(module, inputs, policy=policy, on_unknown="keep", rules=rules)
        say("checking")
        certificate = lg.verify(module, gm, inputs, _target(module, inputs, target))
    typer.echo(certificate.to_json() if json else str(certificate))
    if not certificate.ok:
        raise typer.Exit(1)


@app.command(short_help="Show which nodes create or destroy attribution.")
def audit(
    model: ModelName,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Audit the balanced backward.")
    ] = False,
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Show where a backward creates or destroys attribution: the account of each node, worst first."""
    module = _load(model, pretrained, checkpoint, seed).module
    with _working("capturing the model") as say:
        inputs = _inputs(module, seed)
        gm = lg.transform(module, inputs) if balanced else lg.trace(module, inputs)
        say("one backward")
        account = lg.audit(gm, inputs, _target(module, inputs, target))
    typer.echo(account.to_json() if json else str(account))


@app.command(short_help="Draw where a backward creates or destroys attribution.")
def graph(
    model: ModelName,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Picture: .html .svg .png .pdf .dot .json"
        ),
    ] = None,
    depth: Annotated[int, typer.Option(min=1, help="Names of a module path to tell apart.")] = 2,
    focus: Annotated[
        str, typer.Option(metavar="MODULE", help="Module to draw op by op: blocks.3")
    ] = "",
    view: Annotated[
        Literal["graph", "streams", "model-explorer"],
        typer.Option(
            help="streams: the residual stream against its branches (.svg .png .pdf)."
            " model-explorer: for Google's tool (.json)."
        ),
    ] = "graph",
    pretrained: Pretrained = False,
    checkpoint: Checkpoint = None,
    target: TargetIndex = None,
    seed: Seed = 0,
) -> None:
    """Print what each module loses and creates under autograd, and what balancing does; or draw it."""
    if out is None and (focus or view == "model-explorer"):
        raise InputError("--focus and --view model-explorer are for a file: add -o FILE")
    module = _load(model, pretrained, checkpoint, seed).module
    with _working("capturing the model, two backwards"):
        inputs = _inputs(module, seed)
        chosen = _target(module, inputs, target)
        if out is None:
            found = lg.gradient_graph(module, inputs, chosen)
            text = (
                streams_table(joined(streams(found))) if view == "streams" else tree(found, depth)
            )
        else:
            text = str(
                lg.visualize(module, out, inputs, chosen, view=view, depth=depth, focus=focus)
            )
    typer.echo(text)


@app.command(short_help="Time the balanced backward against autograd's.")
def bench(
    model: ModelName,
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side is run.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    weights: Annotated[
        bool, typer.Option("--weights", help="Leave parameters requiring gradients.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Run forward and backward to the input, plain and balanced in turns, and print what they cost.

    "operations" is the share that is left of the plain side's matrix products: what the time would
    be if nothing else cost anything.
    """
    from libragrad_fx.bench import HEAD, compare, gradient

    torch.set_num_threads(threads)
    module = _load(model, False, None, seed).module
    module.requires_grad_(weights)
    with _working("capturing the model") as say:
        inputs = _inputs(module, seed)
        (x,) = inputs if isinstance(inputs, tuple) and len(inputs) == 1 else (None,)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise InputError(
                f"bench times the gradient of one image-like input; {model} takes others"
            )
        x = torch.randn(batch, *x.shape[1:], dtype=x.dtype)
        gm = lg.transform(module, x)
        say("timing")
        sides = {
            n: gradient(lambda z, m=m: select(m(z), middle))
            for n, m in (("plain", module), ("balanced", gm))
        }
        found = compare(sides, x, rounds)
    typer.echo(
        f"{model}, {tuple(x.shape)}, {x.dtype}, {threads} threads, torch {torch.__version__}"
    )
    typer.echo("\n".join([HEAD, *(c.against(found[0]) for c in found)]))


@app.command(short_help="Check whole model libraries, model by model.")
def coverage(
    suite: Annotated[
        Literal["timm", "timm-all", "torchvision", "hf", "openclip", "community"] | None,
        typer.Option(help="What to check. timm: the smallest model of every module."),
    ] = None,
    only: Annotated[
        str, typer.Option("--filter", metavar="GLOB", help="Only names that match: 'vit_*'.")
    ] = "*",
    static: Annotated[
        bool, typer.Option("--static", help="Capture, plan and prove; run nothing.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Models checked side by side.")] = 1,
    resume: Annotated[
        bool, typer.Option(help="Keep what is in the results file, check the rest.")
    ] = True,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit a model.")] = 600,
    memory: Annotated[float, typer.Option(min=1, help="Memory limit a model, in GiB.")] = 20,
    results: Annotated[
        Path, typer.Option(metavar="DIR", help="One file of results (JSON lines) a suite.")
    ] = Path("out/coverage"),
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all results in DIR as a page.")
    ] = None,
) -> None:
    """Take the models of a library through every promise, each in a process of its own.

    Results are appended as they come; a run that was stopped goes on where it was.
    """
    from libragrad_fx import coverage as cover

    if suite is None and report is None:
        raise InputError("nothing to do: give --suite, or --report to render what is there")
    if suite is not None:
        file = results / f"{suite}{'-static' if static else ''}.jsonl"
        if not resume:
            file.unlink(missing_ok=True)
        done = {r.name for r in cover.read(file) if r.verdict not in cover.STOPPED}
        everything = cover.SUITES[suite].names()
        names = {n: f for n, f in everything.items() if fnmatch.fnmatch(n, only) and n not in done}
        if not any(fnmatch.fnmatch(n, only) for n in everything):
            raise InputError(f"no name of {suite} matches {only!r}")
        limits = cover.Limits(seconds, memory, max(1, (os.cpu_count() or 1) // jobs))
        with _counting(f"{suite}{', static' if static else ''}", len(names)) as seen:
            cover.run(suite, names, static=static, file=file, jobs=jobs, limits=limits, seen=seen)
        found = list(cover.read(file))
        balanced = sum(r.verdict == "balanced" for r in found)
        typer.echo(
            f"{suite}: {balanced} of {len(found)} balanced, {len(names)} checked now; {file}"
        )
    if report is not None:
        files = sorted(results.glob("*.jsonl"))
        if not files:
            raise InputError(f"there are no results in {str(results)!r}")
        _write(report, cover.render(r for f in files for r in cover.read(f)).encode())
        typer.echo(f"wrote {report}")


@contextlib.contextmanager
def _counting(what: str, total: int) -> Iterator[Any]:
    """A progress bar on a terminal; what does not hold is printed as it is found."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}"), console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=total)

        def seen(result: Any) -> None:
            bar.update(task, advance=1, description=result.name)
            if result.verdict != "balanced":
                text = f"{result.name}: {result.verdict}: {_one_line(result.reason)[:200]}"
                console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield seen


# --- what the commands share


def _load(name: str, pretrained: bool, checkpoint: Path | None, seed: int) -> models.Loaded:
    with _working(f"building {name}"):
        loaded = models.resolve(name, pretrained, checkpoint, seed)
    if loaded.weights == "random":
        typer.echo(
            f"note: the weights of {name} are random (--pretrained or --checkpoint)", err=True
        )
    return loaded


def _heatmap() -> Any:
    need("matplotlib", "demo")  # say so before minutes of work
    from libragrad_fx.viz import heatmap

    return heatmap


@contextlib.contextmanager
def _working(what: str) -> Iterator[Any]:
    """A spinner on a terminal, silence elsewhere. Yields a function that renames the work."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(what) as status:
        yield status.update


def _dtype(module: torch.nn.Module) -> torch.dtype:
    found = (p.dtype for p in module.parameters() if p.is_floating_point())
    return next(found, torch.float32)


def _inputs(module: torch.nn.Module, seed: int) -> Any:
    torch.manual_seed(seed)
    args, kwargs = infer_inputs(module)
    dtype = _dtype(module)  # a model that brings its own example brings it in its own dtype
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, kwargs or args
    )


def _run(module: torch.nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        if isinstance(inputs, dict):
            return module(**inputs)
        return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def _target(module: torch.nn.Module, inputs: Any, index: int | None) -> Any:
    return index if index is not None else largest(_run(module, inputs))


def _attribute(gm: Any, x: torch.Tensor, target: Any, method: str) -> lg.Attribution:
    layers = lg.blocks(gm)[:1] or None if method == "input_x_gradient" else None
    return lg.attribute(gm, x, target, method=method, layers=layers)


def _title(loaded: models.Loaded, logits: torch.Tensor, target: Any) -> str:
    """``model: class 3 (tiger shark), probability 12 %``, as far as it is known."""
    index = target[0] if isinstance(target, list) else target
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    if not isinstance(index, int) or logits.ndim != 2 or index >= logits.shape[1]:
        return f"{loaded.name}: {'its only output' if index is None else f'output {index}'}"
    label = models.class_name(loaded, index, logits.shape[1]).partition(",")[0]
    share = float(logits[0].double().softmax(0)[index])
    return f"{loaded.name}: class {index}{f' ({label})' if label else ''}, softmax {share:.1%}"


def _weights(loaded: models.Loaded) -> str:
    return f"weights {loaded.weights}"


def _explain_node(made: lg.Plan, node: str) -> str:
    try:
        return made.explain(node)
    except KeyError as e:
        raise InputError(e.args[0]) from e


def _write(file: Path, content: Any) -> None:
    """Write bytes, or let a function write, making the folder; an error is one line."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(file)
        else:
            file.write_bytes(content)
    except OSError as e:
        raise InputError(f"cannot write {str(file)!r}: {e.strerror or e}") from e


def main() -> None:
    app(prog_name="libragrad")
