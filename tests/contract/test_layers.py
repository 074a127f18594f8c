"""Imports go one way, between rooms and inside them; rooms say what they are for; size is watched."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import libragrad_fx

ROOT = Path(libragrad_fx.__file__).parent
ROOMS = [
    {"errors", "types", "version"}, {"extras", "target"}, {"kernels"}, {"graph"}, {"ops"}, {"decide"},
    {"optimise"}, {"module"}, {"capture"}, {"rewrite"}, {"account"},
    {"attribution", "metrics", "stages", "viz"}, {"perturb", "pieces"}, {"api"}, {"models"}, {"explain"},
    {"programs"}, {"bench", "coverage", "demo", "evaluate", "interop", "segments"}, {"cli"},
    {"__init__", "__main__"},
]  # fmt: skip
"""What a room imports stands before it."""
STAGES = ["graph", "ops", "decide", "optimise", "module", "capture", "rewrite", "account", "pieces"]
PRIVATE = {
    "torch._C.DisableTorchFunction": {"capture"},
    "torch._C.DispatchKey.Autograd": {"pieces"},
    "torch._C.DispatchKey.CompositeExplicitAutograd": {"pieces"},
    "torch._C.DispatchKey.CompositeImplicitAutograd": {"capture"},
    "torch._C._AutoDispatchBelowAutograd": {"programs"},
    "torch._C._DisablePythonDispatcher": {"programs"},
    "torch._C._TorchDispatchModeKey.PROXY": {"ops"},
    "torch._C._are_functorch_transforms_active": {"capture", "ops"},
    "torch._C._autograd._get_current_graph_task_keep_graph": {"ops"},
    "torch._C._dispatch_get_all_op_names": {"capture"},
    "torch._C._dispatch_has_kernel_for_dispatch_key": {"graph"},
    "torch._C._functorch.is_functorch_wrapped_tensor": {"pieces"},
    "torch._C._functorch.is_legacy_batchedtensor": {"ops"},
    "torch._C._get_dispatch_mode": {"ops"},
    "torch._C._is_any_autocast_enabled": {"ops", "optimise"},
    "torch._C._len_torch_dispatch_stack": {"optimise"},
    "torch._C._nn": {"ops"},
    "torch._C._set_grad_enabled": {"capture"},
    "torch._C._will_engine_execute_node": {"ops"},
    "torch._dispatch.python.enable_python_dispatcher": {"programs"},
    "torch._dynamo.config.patch": {"pieces"},
    "torch._functorch.compile_utils.fx_graph_cse": {"programs"},
    "torch._fused_sdp_choice": {"ops"},
    "torch._guards.detect_fake_mode": {"capture"},
    "torch._inductor.aoti_compile_and_package": {"programs"},
    "torch._inductor.aoti_load_package": {"programs"},
    "torch._inductor.compile": {"programs"},
    "torch._prims_common.suggest_memory_format": {"ops", "programs"},
    "torch._subclasses.FakeTensorMode": {"capture"},
    "torch._subclasses.fake_tensor.FakeTensor": {"account", "capture", "ops"},
    "torch._subclasses.fake_tensor.FakeTensorMode": {"programs"},
    "torch._subclasses.functional_tensor.FunctionalTensor": {"capture"},
    "torch.nn.modules.batchnorm._BatchNorm": {"coverage"},
    "torch.nn.modules.conv._ConvNd": {"capture"},
    "torch.utils._python_dispatch._disable_current_modes": {"kernels", "programs"},
    "torch.utils._python_dispatch._get_current_dispatch_mode": {"pieces"},
    "torch.utils._sympy.printers.PythonPrinter": {"capture"},
}
"""Private names of torch, and the rooms that may use them. Each may break with the next release."""
SETTLED = ("torch._ops.", "torch.utils._pytree", "torch.utils._python_dispatch.TorchDispatchMode")
"""Private by name alone: PyTorch documents them, and half of its users import them."""


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(p): p for p in ROOT.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The files of the package that a file imports at its top, by dotted name."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("libragrad_fx"):
            place = (node.module or "").removeprefix("libragrad_fx").removeprefix(".")
            names = [".".join(filter(None, (place, a.name))) for a in node.names]
            found |= {n if n in FILES else place for n in names}
    return {n if n in FILES else f"{n}.__init__".removeprefix(".") for n in found}


def test_every_file_is_in_a_room() -> None:
    assert {room_of(p) for p in FILES.values()} == set().union(*ROOMS)
    tests = {p.parent.name for p in (ROOT.parent / "tests").glob("*/test_*.py")}
    assert tests <= set().union(*ROOMS) | {"contract", "models", "rows"}


def test_imports_go_one_way_between_rooms() -> None:
    depth = {name: i for i, names in enumerate(ROOMS) for name in names}
    upward = [
        f"{name} imports {other}"
        for name, path in FILES.items()
        for other in imports(path)
        if (mine := room_of(path)) != (theirs := other.partition(".")[0])
        and depth[theirs] >= depth[mine]
    ]
    assert upward == []


def test_imports_go_one_way_inside_a_room() -> None:
    needs = {n: imports(p) - {"__init__"} for n, p in FILES.items() if n != "__init__"}
    assert len([*graphlib.TopologicalSorter(needs).static_order()]) >= len(needs)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_says_what_it_is_for(stage: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / stage / "__init__.py").read_text("utf-8"))) or ""
    for part in ("Comes in: ", "Goes out: ", "May import: ", "Begin with "):
        assert part in said
    assert len(said.splitlines()) <= 6


def dotted(node: ast.AST) -> str:
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def private_names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
    names = {n for n in found if n.startswith("torch.") and "._" in n.replace(".__", "")}
    longest = {n for n in names if not any(o.startswith(f"{n}.") for o in names)}
    return {n for n in longest if not n.startswith(SETTLED)}


def test_private_names_of_torch_are_listed() -> None:
    found: dict[str, set[str]] = {}
    for path in FILES.values():
        for name in private_names(path):
            found.setdefault(name, set()).add(room_of(path))
    assert found == PRIVATE


def op_names(path: Path) -> set[str]:
    """The ops that a file names: by attribute, by overload name or by the start of a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        name = dotted(node)
        if name.startswith(("aten.", "torch.ops.aten")) or name.endswith("._opname"):
            found.add(name)
        elif isinstance(node, ast.Constant) and str(node.value).startswith(("aten.", "aten::", "_opname")):
            found.add(str(node.value))
    return found


def test_ops_are_named_in_the_rule_book_and_in_their_room() -> None:
    """What holds of an op is a key of its row; what is written for one op is in ``ops/`` and ``kernels/``.
    The passes on flat graphs, and what ONNX lacks, are about ops of theirs, which have no rows. A search
    over policies writes rows."""
    apart = ("ops", "kernels")
    named = {n: found for n, p in FILES.items() if room_of(p) not in apart and (found := op_names(p))}
    flat = {f"programs.{name}" for name in ("forms", "free", "reuse", "settle", "zeros")}
    assert named.keys() == {*flat, "evaluate.search"}


@pytest.mark.slow
def test_pictures_are_imported_by_who_draws() -> None:
    code = (
        "import sys, libragrad_fx;"
        "[getattr(libragrad_fx, name) for name in libragrad_fx.__all__];"
        "print([m for m in sys.modules if m == 'networkx' or m.startswith('libragrad_fx.viz')])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_the_architecture_page_is_of_this_code() -> None:
    tool = ROOT.parent / "tools" / "architecture.py"
    subprocess.run([sys.executable, tool, "--check"], cwd=ROOT.parent, check=True)


def test_the_package_can_be_read_in_an_afternoon() -> None:
    """The pass itself; what stands on it (attributions, pictures, command line, demo) is apart."""
    apart = {
        "attribution", "explain", "kernels", "programs", "viz", "models", "bench", "cli", "coverage",
        "demo", "evaluate", "extras", "interop", "metrics", "perturb", "segments", "__main__",
    }  # fmt: skip
    lines = {
        n: len(p.read_text("utf-8").splitlines())
        for n, p in FILES.items()
        if room_of(p) not in apart
    }
    assert sum(lines.values()) < 12350
