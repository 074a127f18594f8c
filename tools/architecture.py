"""The parts of ``docs/architecture.md`` that are made from the code: the rooms, and a worked example.

python tools/architecture.py          writes them into the page
python tools/architecture.py --check  fails if the rooms in the page are not those of the code
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

import networkx as nx
import torch
from torch import nn

import libragrad_fx as lg
from libragrad_fx.decide import rulebook
from libragrad_fx.optimise.passes import explain
from libragrad_fx.stages import decide, rewritten

PAGE = Path("docs/architecture.md")
ROOT = Path(lg.__file__).parent
STAGES = ("capture", "decide", "rewrite", "optimise", "module", "account", "pieces", "graph", "ops")


class Gate(nn.Module):
    """The model of the example."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(self.norm(x))
        return y * torch.sigmoid(y)


def rooms() -> str:
    """The table of stages, from their docstrings, and the drawing of their imports."""
    rows = ["| room | comes in | goes out | begin with |", "|---|---|---|---|"]
    for name in STAGES:
        said = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text("utf-8"))) or ""
        body = " ".join(said.split())
        found = re.search(r"Comes in: (.*?)\. Goes out: (.*?)\. May import: .*?Begin with (.*)\.", body)
        assert found is not None, name
        rows.append(f"| `{name}/` | {' | '.join(found.groups())} |".replace("``", "`"))
    return "\n".join([*rows, "", "```mermaid", "flowchart BT", *arrows(), "```"])


def arrows() -> list[str]:
    """The imports between stages, without those that others imply (the transitive reduction)."""
    graph: nx.DiGraph = nx.DiGraph()
    for name in STAGES:
        for path in (ROOT / name).rglob("*.py"):
            for node in ast.parse(path.read_text("utf-8")).body:
                if isinstance(node, ast.ImportFrom) and node.module:
                    other = node.module.removeprefix("libragrad_fx.").partition(".")[0]
                    if other in STAGES and other != name:
                        graph.add_edge(name, other)
    return [f"  {a} --> {b}" for a, b in sorted(nx.transitive_reduction(graph).edges)]


def example() -> str:
    """What each stage returns for a small model."""
    model, x = Gate().double().eval(), torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)
    made = decide(model, x)
    module = rewritten(made)
    roles = "\n".join(f"{name:<12} {role.name}" for name, role in made.analysis.roles.items())
    parts = {
        "`capture`: the trace": str(made.trace.graph).strip(),
        "`decide.roles`: what each value means for the gradient": roles,
        "`decide.plan`: what is to be done about it": str(made.plan),
        "`rewrite`: the balanced graph": str(module.graph).strip(),
        "`optimise`: what each pass did to the graph that runs": explain(module.history.passes),
        "`account`: the ledger of output 0": str(lg.audit(module, x, target=0)),
    }
    book = rulebook.load("libra", None)
    said = [f"**{title}**\n\n```text\n{text}\n```" for title, text in parts.items()]
    return "\n\n".join([*said, f"Rules: `{book.digest[:12]}`; torch {torch.__version__.split('+')[0]}."])


def filled(page: str, name: str, text: str) -> str:
    start, end = f"<!-- {name}: made by tools/architecture.py -->", f"<!-- end of {name} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{PAGE} has no place for {name}")
    return f"{before}{start}\n{text}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text("utf-8")
    if parser.parse_args().check:
        sys.exit(f"{PAGE} is old: run {__file__}" if filled(page, "rooms", rooms()) != page else 0)
    PAGE.write_text(filled(filled(page, "rooms", rooms()), "example", example()), "utf-8")


if __name__ == "__main__":
    main()
