"""``libragrad coverage``: check whole model libraries."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from libragrad_fx.cli.options import Json, answer, app, one_line
from libragrad_fx.cli.progress import counting
from libragrad_fx.errors import InputError
from libragrad_fx.extras import writable, writing


@app.command()
def coverage(
    suite: Annotated[
        Literal["timm", "timm-all", "torchvision", "hf", "openclip", "community"] | None,
        typer.Option(
            help="What to check. timm: the smallest model of every module. hf, community: in a checkout."
        ),
    ] = None,
    only: Annotated[
        str, typer.Option("--filter", metavar="GLOB", help="Only names that match: 'vit_*'.")
    ] = "*",
    static: Annotated[bool, typer.Option("--static", help="Capture, plan and prove; run nothing.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Models checked side by side.")] = 1,
    resume: Annotated[bool, typer.Option(help="Keep what is in the results file, check the rest.")] = True,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit a model.")] = 600,
    memory: Annotated[float, typer.Option(min=1, help="Memory limit a model, in GiB.")] = 20,
    results: Annotated[
        Path, typer.Option(metavar="DIR", help="One file of results (JSON lines) a suite.")
    ] = Path("out/coverage"),
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all results in DIR as a page, FILE.md.")
    ] = None,
    json: Json = False,
) -> None:
    """Check every promise on the models of a library, each in a process of its own.

    Each result is appended to the file at once; a stopped run resumes there.
    """
    from libragrad_fx import coverage as cover

    if suite is None and report is None:
        raise InputError("nothing to do: give --suite, or --report to render what is there")
    if report is not None:
        writable(report, (".md",))
    said, lines = dict[str, Any](), list[str]()
    if suite is not None:
        file = results / f"{suite}{'-static' if static else ''}.jsonl"
        writable(file)
        fitting = {n: f for n, f in cover.SUITES[suite].names().items() if fnmatch.fnmatch(n, only)}
        if not fitting:
            raise InputError(f"no name of {suite} matches {only!r}")
        if not resume:
            file.unlink(missing_ok=True)
        done = {r.name for r in cover.read(file) if r.verdict not in cover.STOPPED}
        names = {n: f for n, f in fitting.items() if n not in done}
        limits = cover.Limits(seconds, memory, max(1, (os.cpu_count() or 1) // jobs))
        with counting(f"{suite}{', static' if static else ''}", len(names)) as bar:

            def seen(result: Any) -> None:
                bar.at(result.name)
                bar.step()
                if result.verdict != "balanced":
                    bar.line(f"{result.name}: {result.verdict}: {one_line(result.reason)[:200]}")

            cover.run(suite, names, static=static, file=file, jobs=jobs, limits=limits, seen=seen)
        found = list(cover.read(file))
        balanced = sum(r.verdict == "balanced" for r in found)
        said = {"models": len(found), "balanced": balanced, "checked": len(names), "results": str(file)}
        lines = [f"{suite}: {balanced} of {len(found)} balanced, {len(names)} checked now; {file}"]
    if report is not None:
        files = sorted(results.glob("*.jsonl"))
        if not files:
            raise InputError(f"there are no results in {str(results)!r}")
        with writing(report):
            report.write_bytes(cover.render(r for f in files for r in cover.read(f)).encode())
        said["report"] = str(report)
        lines.append(f"wrote {report}")
    answer(said, json, "\n".join(lines))
