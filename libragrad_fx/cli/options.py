"""The app of the command line, its shared options, and its error messages."""

from __future__ import annotations

import importlib
import importlib.metadata
import json as json_format
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from libragrad_fx.errors import CustomBackwardWarning, CutWarning, GateOutputWarning, LibraGradError
from libragrad_fx.version import __version__

COMMANDS = {
    "demo": "Write a page that shows the difference; offline.",
    "explain": "Draw what speaks for an answer in pictures and texts.",
    "methods": "List the methods that a model supports, and why not the rest.",
    "plan": "List what would change in the backward, and why.",
    "compile": "Write an explanation as a file that runs without this package.",
    "verify": "Check every promise; print the certificate.",
    "audit": "Show which nodes create or destroy attribution.",
    "graph": "Draw where a backward creates or destroys attribution.",
    "bench": "Time the balanced backward against autograd's.",
    "coverage": "Check whole model libraries, model by model.",
    "evaluate": "Measure explanations of models on data, from one file.",
    "report": "Write tables and curves of an evaluation as a page.",
    "search-policy": "Search for a policy by faithfulness, and compare it.",
    "doctor": "Say what is installed, what is missing, and how to get it.",
}
"""What the help page says of each command, in its order."""


class _Commands(TyperGroup):
    """Imports the module of a command when it is called. Prints the library's errors in one line, with exit
    code 2; ``--debug`` adds the traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS:
            importlib.import_module(f"libragrad_fx.cli.{cmd_name.partition('-')[0]}")
        return cast(TyperGroup, typer.main.get_command(app)).commands.get(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except LibraGradError as e:
            if ctx.params.get("debug"):
                typer.echo("".join(traceback.format_exception(e)), err=True, nl=False)
            typer.echo(f"error: {one_line(e)}", err=True)
            raise typer.Exit(2) from e


def _show_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, (CustomBackwardWarning, CutWarning, GateOutputWarning)):
        typer.echo(f"warning: {one_line(message)}", err=True)


def one_line(message: Any) -> str:
    return " ".join(str(message).split())


def answer(said: Any, json: bool, text: Any = None) -> None:
    """Print a result on stdout: as JSON alone, in which a number that is none is null; or as a text, by
    default what it says of itself."""
    if not json:
        typer.echo(str(said) if text is None else text)
        return
    whole = said.to_json() if hasattr(said, "to_json") else json_format.dumps(said, default=str)
    typer.echo(json_format.dumps(json_format.loads(whole, parse_constant=lambda _: None), indent=1))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"libragrad {__version__} (torch {importlib.metadata.version('torch')})")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version.")
    ] = False,
) -> None:
    """Explain any PyTorch model with a balanced backward pass, at an unchanged forward.

    A model is a timm name (vit_base_patch16_224), torchvision:NAME, hf:NAME or hf:FOLDER of Hugging Face,
    or package.module:factory, a function of yours that returns an nn.Module. Start with: libragrad demo
    """


ModelName = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="timm name, torchvision:NAME, hf:NAME or package.module:factory."),
]


Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download the published weights.")]


Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Weights: safetensors, or a torch state dict (no code is run)."),
]


TargetIndex = Annotated[
    int | None, typer.Option(min=0, help="Class to explain; the model's own answer if not given.")
]


def policy_names(incomplete: str) -> list[str]:
    """For the completion of shells."""
    from libragrad_fx.decide import rulebook  # here: it imports torch, and --help does not

    return [name for name in rulebook.policies() if name.startswith(incomplete)]


def method_names(incomplete: str) -> list[str]:
    """For the completion of shells."""
    from libragrad_fx.attribution import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


Policy = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE", help="What to balance, and how: libra, attn_lrp, … or a .yaml file.",
        autocompletion=policy_names,
    ),
]  # fmt: skip


Rules = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Facts about more ops (grammar: rules/README.md)."),
]


Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random weights and inputs.")]


Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]
