# ruff: noqa: I001
"""The command line. Results go to stdout; notes, warnings and errors to stderr.

Exit codes: 0 done; 1 a verification failed; 2 bad usage, or an error that one line explains.
"""

from __future__ import annotations

# imported in the order of the help page
from libragrad_fx.cli.demo import demo
from libragrad_fx.cli.explain import explain
from libragrad_fx.cli.methods import methods
from libragrad_fx.cli.plan import plan
from libragrad_fx.cli.compile import compile_
from libragrad_fx.cli.verify import verify
from libragrad_fx.cli.audit import audit
from libragrad_fx.cli.graph import graph
from libragrad_fx.cli.bench import bench
from libragrad_fx.cli.coverage import coverage
from libragrad_fx.cli.evaluate import evaluate
from libragrad_fx.cli.report import report
from libragrad_fx.cli.search import search_policy
from libragrad_fx.cli.doctor import doctor
from libragrad_fx.cli.options import app

__all__ = [
    "app", "audit", "bench", "compile_", "coverage", "demo", "doctor", "evaluate", "explain", "graph",
    "main", "methods", "plan", "report", "search_policy", "verify",
]  # fmt: skip


def main() -> None:
    app(prog_name="libragrad")
