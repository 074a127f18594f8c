"""The command line: exit codes, one readable line for each error, and what it writes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import libragrad_fx as lg
from libragrad_fx import models
from libragrad_fx.cli import app
from libragrad_fx.cli.options import COMMANDS
from libragrad_fx.evaluate.config import Config
from libragrad_fx.evaluate.search import SearchConfig
from libragrad_fx.extras import writable

SIDE = 32


class Block(nn.Sequential):
    """One residual step on tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Tiny(nn.Module):
    """Patches, two blocks, a pooled head; it brings the example that tells its input size."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, 8)
        steps = (Block(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU()) for _ in range(2))
        self.blocks = nn.Sequential(*steps)
        self.head = nn.Linear(6, 5)
        self.example_input_array = torch.randn(2, 3, SIDE, SIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny()


def raises() -> nn.Module:
    raise ValueError("no weights today\nand a second line")


def no_module() -> int:
    return 3


TINY = f"{__name__}:tiny"


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


def refusal(*args: object) -> str:
    """The one line that an error leaves on stderr."""
    done = run(*args)
    lines = [x for x in done.stderr.splitlines() if not x.startswith("note: ")]
    assert done.exit_code == 2, done.output
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    return lines[0]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return file


# --- refusals


def test_unknown_model_names_near_ones() -> None:
    assert "vit_tiny_patch16_224" in refusal("plan", "vit_tny_patch16_224")
    assert "resnet18" in refusal("verify", "torchvision:resnet81")
    assert "zzz" in refusal("audit", "zzz")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{__name__}:raises", "ValueError: no weights today"),
        (f"{__name__}:no_module", "returned int, not an nn.Module"),
        (f"{__name__}:absent", "has no attribute 'absent'"),
        ("no_such_package:make", "No module named 'no_such_package'"),
    ],
)
def test_bad_factory(name: str, says: str) -> None:
    assert says in refusal("plan", name)


def test_bad_images(tmp_path: Path) -> None:
    assert "no image file" in refusal("explain", tmp_path / "none.png", "--model", TINY)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    assert "cannot read" in refusal("explain", text, "--model", TINY)


def test_bad_target(photo: Path) -> None:
    assert "does not fit" in refusal("explain", photo, "--model", TINY, "--target", 5)
    assert "does not fit" in refusal("verify", TINY, "--target", 5)
    assert run("verify", TINY, "--target", -1).exit_code == 2


def test_bad_checkpoints(tmp_path: Path) -> None:
    for name in ("garbage.pt", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"\x93garbage" * 40)
        assert "neither a safetensors file" in refusal(
            "verify", TINY, "--checkpoint", tmp_path / name
        )
    assert "no checkpoint file" in refusal("verify", TINY, "--checkpoint", tmp_path / "none.pt")
    weights = {**tiny().state_dict(), "extra": torch.zeros(1)}
    weights["head.weight"] = torch.zeros(7, 6)
    del weights["patches.bias"]
    torch.save(weights, tmp_path / "other.pt")
    said = refusal("verify", TINY, "--checkpoint", tmp_path / "other.pt")
    assert "1 missing (patches.bias); 1 unexpected (extra)" in said
    assert "head.weight is (7, 6) in the file and (5, 6) in the model" in said


def test_a_checkpoint_with_code_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> object:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"head.weight": Trap()}, tmp_path / "trap.pt")
    refusal("verify", TINY, "--checkpoint", tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()


def test_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.pt"
    torch.save(tiny().state_dict(), file)
    both = refusal("verify", "resnet18", "--pretrained", "--checkpoint", file)
    assert "--pretrained or --checkpoint, not both" in both
    assert "your own factory" in refusal("verify", TINY, "--pretrained")

    def broken(*_: object, **__: object) -> nn.Module:
        raise OSError("No such file\nwhile requesting it")

    monkeypatch.setattr(torchvision.models, "get_model", broken)
    said = refusal("verify", "torchvision:resnet18", "--pretrained")
    assert "No such file" in said
    assert "--checkpoint" in said


@pytest.fixture
def silent_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub that hangs up on everyone, and an empty cache; how often it was called."""
    calls = []
    server = socket.create_server(("127.0.0.1", 0))

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                calls.append(connection.close())

    threading.Thread(target=hang_up, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield calls
    server.close()


@pytest.mark.parametrize("args", [("resnet18", "--pretrained"), ("hf:some/model",)])
def test_a_hub_that_does_not_answer_is_asked_once(args: Any, silent_hub: Any) -> None:
    """Its own loaders ask again and again, and wait longer each time."""
    said = refusal("verify", *args)
    assert "its weights could not be downloaded" in said
    assert "--checkpoint" in said
    assert "hf:FOLDER" in said
    assert len(silent_hub) == 1


def test_bad_policy_and_rules(tmp_path: Path) -> None:
    assert "no policy 'none'" in refusal("plan", TINY, "--policy", "none")
    (tmp_path / "rules.yaml").write_text("- {op: aten.gelu, kind: wrong}\n")
    assert "rules.yaml:1" in refusal("plan", TINY, "--rules", tmp_path / "rules.yaml")


WRITERS = {
    "explain": (("x.png", "--model", f"{__name__}:raises"), ".png"),
    "graph": ((f"{__name__}:raises",), ".svg"),
    "compile": ((f"{__name__}:raises",), ".pt2"),
    "demo": ((), ".html"),
    "report": (("no-such-folder",), ".html"),
    "coverage": (("--results", "no-such-folder"), ".md"),
}
"""Commands that write a file: arguments that would fail behind the check, and an ending."""


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_that_cannot_be_written_is_told_before_the_work(command: str, photo: Path) -> None:
    args, ending = WRITERS[command]
    option = "--report" if command == "coverage" else "-o"
    under = refusal(command, *args, option, photo / "under" / f"a{ending}")
    assert "cannot write" in under
    assert "is no folder" in under
    (photo.parent / f"a{ending}").mkdir()
    if command != "explain":  # writes into it
        assert "is a folder" in refusal(command, *args, option, photo.parent / f"a{ending}")
    assert ending in refusal(command, *args, option, photo.parent / "a.jpg")
    assert not (photo.parent / "a.jpg").exists()


@pytest.mark.parametrize(("command", "option"), [
    ("evaluate", "-o"), ("search-policy", "-o"), ("coverage", "--results"),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    command: str, option: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for config in (Config, SearchConfig):
        monkeypatch.setattr(config, "load", lambda file: None)
    args = ("--suite", "timm") if command == "coverage" else ("c.yaml",)
    assert "is no folder" in refusal(command, *args, option, photo)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path, photo: Path) -> None:
    tmp_path.chmod(0o500)
    said = refusal("explain", photo, "--model", f"{__name__}:raises", "-o", tmp_path / "a.png")
    assert "is read-only" in said


def test_what_may_be_written_is_not_made(tmp_path: Path) -> None:
    for folder in (False, True):
        assert writable(tmp_path / "a" / "b", folder=folder) == tmp_path / "a" / "b"
    assert writable(tmp_path, folder=True) == tmp_path
    assert not [*tmp_path.iterdir()]


def test_debug_shows_the_traceback() -> None:
    done = run("--debug", "plan", f"{__name__}:raises")
    assert done.exit_code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert 'raise ValueError("no weights today' in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


# --- answers


def test_version_and_help() -> None:
    assert lg.__version__ in run("--version").stdout
    for command in ("demo", "explain", "plan", "verify", "audit"):
        assert run(command, "--help").exit_code == 0
    assert run("plan").exit_code == 2


def test_random_weights_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: tiny())
    assert "the names of its classes mean nothing" in run("plan", "vit_tiny_patch16_224").stderr
    assert "random" in models.Loaded("a", "timm", tiny(), "random").title
    assert models.Loaded("a:b", "factory", tiny(), "as the factory made them").title == "a:b"


def test_plan_is_a_table_an_explanation_or_json() -> None:
    table = run("plan", TINY).stdout.splitlines()
    assert table[1].split() == ["node", "module", "source", "action", "rule", "reason"]
    assert any(row.startswith("gelu ") for row in table)
    assert "x * gate(x)" in run("plan", TINY, "--why", "gelu").stdout
    assert "no node 'gelv'; did you mean gelu" in refusal("plan", TINY, "--why", "gelv")
    assert json.loads(run("plan", TINY, "--json").stdout)["policy"] == "libra"


def test_verify_exits_0_when_balanced_and_1_when_not() -> None:
    good = run("verify", TINY, "--dtype", "float64", "--json")
    assert good.exit_code == 0
    assert lg.Certificate.from_json(good.stdout).dtype == "torch.float64"
    bad = run("verify", TINY, "--policy", "ali_lrp")  # leaves gated activations to autograd
    assert bad.exit_code == 1
    assert "NOT BALANCED" in bad.stdout


def test_audit_finds_the_loss_and_its_repair() -> None:
    plain, balanced = run("audit", TINY).stdout, run("audit", TINY, "--balanced").stdout
    error = [
        float(t.partition("completeness error ")[2].partition(")")[0]) for t in (plain, balanced)
    ]
    assert error[1] < 1e-5 < error[0]


def test_a_factory_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_me.py").write_text(f"from {__name__} import tiny as make\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert run("plan", "beside_me:make").exit_code == 0


@pytest.mark.parametrize(
    "mode", ["RGBA", *(pytest.param(m, marks=pytest.mark.slow) for m in ("L", "CMYK", "P", "I;16"))]
)
def test_explain_draws_any_kind_of_picture(tmp_path: Path, photo: Path, mode: str) -> None:
    file = tmp_path / ("in.tif" if mode == "CMYK" else "in.png")
    with Image.open(photo) as rgb:
        if mode == "I;16":
            Image.fromarray(np.asarray(rgb.convert("L"), np.uint16) * 257).save(file)
        else:
            rgb.convert(mode).save(file)
    out = tmp_path / "new" / "out.png"
    done = run("explain", file, "--model", TINY, "-o", out)
    assert done.exit_code == 0, done.output
    assert "FullGrad+, balanced, class" in done.stdout
    with Image.open(out) as drawn:
        wide = drawn.size
    assert run("explain", file, "--model", TINY, "--compare", "plain", "-o", out).exit_code == 0
    with Image.open(out) as drawn:
        assert drawn.size[0] > 1.3 * wide[0]
        assert drawn.size[1] == wide[1]
    assert lg.Attribution.load(out.with_suffix(".npz")).values.shape == (1, 4, 4)
    assert lg.Attribution.load(out.with_suffix(".plain.npz")).policy == ""


def test_explain_only_plain_with_a_checkpoint(tmp_path: Path, photo: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(tiny().state_dict(), weights)
    out = tmp_path / "out.png"
    given = ("--checkpoint", weights, "--policy", "plain", "--method", "input_x_gradient", "--target", 3)
    done = run("explain", photo, "--model", TINY, *given, "-o", out)
    assert done.exit_code == 0, done.output
    assert "class 3" in done.stdout
    assert "balanced" not in done.stdout
    assert out.is_file()


# --- pictures


def test_a_picture_is_read_upright_opaque_and_in_range(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGBA", (4, 2), (255, 0, 0, 0)).save(file)
    assert models.read_image(file).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((2, 4), 0x8080, np.uint16)).save(file)
    assert models.read_image(file).getpixel((0, 0)) == (128, 128, 128)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=turned)
    assert models.read_image(tmp_path / "a.jpg").size == (2, 4)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.png", "a.jpg"])
def test_no_program_is_run_on_a_users_file(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Ghostscript is installed, Pillow would hand it PostScript, whatever the file's name."""
    (tmp_path / name).write_bytes(POSTSCRIPT)
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("it ran a program"))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(lg.errors.InputError, match=r"none of .*PNG"):
        models.read_image(tmp_path / name)


@pytest.mark.parametrize("format", models.IMAGE_FORMATS)
def test_every_format_that_is_allowed_is_read(tmp_path: Path, format: str) -> None:
    file = tmp_path / "picture"
    try:
        Image.new("RGB", (32, 32), (200, 100, 50)).save(file, format=format)
    except (OSError, KeyError) as e:
        pytest.skip(f"this Pillow was built without a writer of {format}: {e}")
    assert models.read_image(file).mode == "RGB"


def test_bench_is_a_table_of_both_sides() -> None:
    result = run("bench", TINY, "--rounds", "2", "--batch", "3")
    assert result.exit_code == 0, result.output
    rows = [r.split("|")[1].strip() for r in result.stdout.splitlines() if r.startswith("|")]
    assert rows == ["backward", "---", "plain", "balanced"]


def test_help_imports_no_torch_and_names_every_command() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from libragrad_fx.cli import app;"
        "print(CliRunner().invoke(app, ['--help']).output); print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "False"
    files = (Path(lg.__file__).parent / "cli").glob("*.py")
    there = {p.stem for p in files if "@app.command" in p.read_text("utf-8")}
    assert {name.partition("-")[0] for name in COMMANDS} == there
    assert all(re.search(rf"^  {name} ", said.stdout, re.MULTILINE) for name in COMMANDS)
