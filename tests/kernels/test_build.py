"""The kernels are built for GPUs, on a machine that need not have one, and fit their memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from libragrad_fx.kernels import PLAIN

pytest.importorskip("triton", reason="triton is not installed")

SHARED = 99 * 2**10  # bytes of shared memory that a block of a small GPU may have


@pytest.mark.slow
def test_kernels_are_built_for_gpus() -> None:
    """In a process of its own: this one may define them for the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    args = [sys.executable, "-m", "tests.kernels.build"]
    done = subprocess.run(args, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name.split()[0] for name in found} == {op._schema.name.split("::")[1] for op in PLAIN}
    assert {name: size for name, size in found.items() if size > SHARED} == {}
