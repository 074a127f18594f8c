"""A file imports only from layers before it, private names stay where they belong, size is watched."""

from __future__ import annotations

import ast
from pathlib import Path

import libragrad_fx

ROOT = Path(libragrad_fx.__file__).parent
LAYERS = [
    {"errors"}, {"extras", "inplace", "state", "target", "types"}, {"graph"}, {"ops"}, {"composite", "execute"},
    {"rulebook", "module"}, {"capture", "variants"}, {"normalize"},
    {"analyze"}, {"plan", "proof"}, {"views"}, {"narrow"}, {"lean"}, {"rewrite"}, {"ledger"},
    {"verify"}, {"birth", "freeze"},
    {"attribution", "pipeline", "segments", "viz"}, {"cuts"}, {"tape"}, {"api"},
    {"demo_data", "models"}, {"bench", "coverage", "demo"}, {"cli"}, {"__init__", "__main__"},
]  # fmt: skip
PRIVATE = {
    "analyze", "capture", "execute", "inplace", "lean", "ledger", "module", "narrow", "normalize", "ops",
    "proof", "rewrite", "rulebook", "verify", "views",
}  # fmt: skip


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in ROOT.rglob("*.py"):
        found.setdefault(path.relative_to(ROOT).parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path) -> set[str]:
    """First-level names of the package that a file imports at its top."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("libragrad_fx."):
            found.add(node.module.split(".")[1])
    return found


def test_every_file_is_in_a_layer() -> None:
    assert set(modules()) == set().union(*LAYERS)


def test_imports_point_down() -> None:
    depth = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{path.name} imports {name}"
        for part, paths in modules().items()
        for path in paths
        for name in imports(path)
        if name != part and depth[name] >= depth[part]
    ]
    assert upward == []


def test_the_package_can_be_read_in_an_afternoon() -> None:
    """The pass itself; what stands on it (attributions, pictures, command line, demo) is apart."""
    apart = {
        "attribution", "viz", "models", "segments", "bench", "cli", "coverage", "demo", "demo_data",
        "extras", "__main__",
    }  # fmt: skip
    lines = {
        part: sum(len(p.read_text("utf-8").splitlines()) for p in paths)
        for part, paths in modules().items()
    }
    assert sum(n for part, n in lines.items() if part not in apart) < 10480
