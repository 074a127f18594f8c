"""The command line. Results go to stdout; notes, warnings and errors to stderr.

Exit codes: 0 done; 1 a verification failed; 2 bad usage, or an error that one line explains.
"""

from __future__ import annotations

from libragrad_fx.cli.options import app

__all__ = ["app", "main"]


def main() -> None:
    app(prog_name="libragrad")
