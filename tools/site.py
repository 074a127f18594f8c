"""Hooks of the documentation site (mkdocs.yml): pages that are made from the code, and links out of docs/.

    mkdocs build --strict

``reference/cli.md`` is what ``--help`` of each command prints; ``reference/rules.md`` and ``changelog.md``
are files of the checkout.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from typer.testing import CliRunner

from libragrad_fx.cli import app
from libragrad_fx.cli.options import COMMANDS

ROOT = Path(__file__).parent.parent
COPIED = {"reference/rules.md": "rules/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages that are files of the checkout outside of docs/."""
PLACES = {source: page for page, source in COPIED.items()}


def on_files(files: Any, config: Any) -> Any:
    for page, source in COPIED.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    files.append(File.generated(config, "reference/cli.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the checkout lead to their page on this site, or become plain text."""
    of = page.file.src_uri
    source = COPIED.get(of, f"docs/{of}")

    def mended(link: re.Match[str]) -> str:
        text, place, anchor = link.groups()
        if "://" in place or place.startswith("mailto:"):
            return link[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), place))
        to = PLACES.get(there, there.removeprefix("docs/") if there.startswith("docs/") else "")
        if not to:
            return text
        return f"[{text}]({os.path.relpath(to, posixpath.dirname(of) or '.')}{anchor or ''})"

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)", mended, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Nothing is fetched from elsewhere: a script beside the pages takes the place of one that the theme
    names, and the drawing of diagrams in notebooks, which have none, is left out."""
    here = os.path.relpath("assets/iframe-worker.js", posixpath.dirname(page.url) or ".")
    output = output.replace("https://unpkg.com/iframe-worker/shim", here)
    return re.sub(
        r"<script[^>]*>(?:(?!</script>).)*cdnjs(?:(?!</script>).)*</script>", "", output, flags=re.S
    )


def commands() -> str:
    """Every command's own help."""
    parts = ["# Command line\n", _help([])]
    for name in COMMANDS:
        parts += [f"\n## libragrad {name}\n", _help([name])]
    return "\n".join(parts)


def _help(arguments: list[str]) -> str:
    said = CliRunner().invoke(app, [*arguments, "--help"], prog_name="libragrad", terminal_width=100)
    if said.exit_code:
        raise SystemExit(f"libragrad {' '.join(arguments)} --help failed: {said.output}")
    return f"```text\n{said.output.rstrip()}\n```"
