"""``libragrad plan``: list what would change in the backward."""

from __future__ import annotations

from typing import Annotated

import typer

import libragrad_fx as lg
from libragrad_fx.cli.common import load_model
from libragrad_fx.cli.options import Json, ModelName, Policy, Rules, answer, app
from libragrad_fx.cli.progress import working
from libragrad_fx.errors import InputError


@app.command()
def plan(
    model: ModelName,
    policy: Policy = "libra",
    rules: Rules = None,
    why: Annotated[str | None, typer.Option(metavar="NODE", help="Explain one node only.")] = None,
    json: Json = False,
) -> None:
    """List what would change in a model's backward, node by node, with the rule and the reason."""
    module = load_model(model, False, None, seed=0).module
    with working("capturing the model"):
        made = lg.plan(module, policy=policy, rules=rules)
    if why is None:
        answer(made, json)
    else:
        text = _explain_node(made, why)
        answer({"node": why, "why": text}, json, text)


def _explain_node(made: lg.Plan, node: str) -> str:
    try:
        return made.explain(node)
    except KeyError as e:
        raise InputError(e.args[0]) from e
