"""Builds every kernel for two GPUs, which need not be there, and prints the shared memory of a block."""

from __future__ import annotations

import itertools
import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from libragrad_fx.kernels import launch

CAPABILITIES = (80, 90)
MASKS = {16: [""], 64: ["", "CAUSAL", "BIAS", "BOOL"], 128: [""], 256: [""]}


def built(
    fn: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3
) -> int:
    names = fn.arg_names
    types = {n: pointers.get(n, "fp32" if n == "scale" else "i32") for n in names if n not in constants}
    source = ASTSource(
        fn=fn, signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()}, attrs={},
    )  # fmt: skip
    options = {"num_warps": warps, "num_stages": stages}
    targets = [GPUTarget("cuda", capability, 32) for capability in CAPABILITIES]
    return max(triton.compile(source, target=t, options=options).metadata.shared for t in targets)


def main() -> None:
    found = {}
    for kind, size in itertools.product(("bf16", "fp16", "fp32"), MASKS):
        rows, cols, warps, stages = launch._blocks(4096, size, 4 if kind == "fp32" else 2)
        dot = "tf32x3" if kind == "fp32" else "tf32"
        for mask in MASKS[size]:
            pointers = dict.fromkeys(("Q", "K", "G", "V", "MASK"), "*" + kind) | {"LSE": "*fp32"}
            if mask == "BOOL":
                pointers["MASK"] = "*i1"
            constants = {name: name == mask for name in ("CAUSAL", "BIAS", "BOOL")}
            constants |= {"ROWS": rows, "COLS": cols, "DOT": dot, "D": size, "E": size}
            of_kernel = built(launch._attention_value, pointers, constants, warps, stages)
            found[f"attention_value {kind} {size} {mask}"] = of_kernel
    for kind, yes in itertools.product(("bf16", "fp32"), (True, False)):
        pointers = {"G": "*" + kind, "W": "*" + kind, "R": "*fp32", "X": "*" + kind, "Y": "*" + kind}
        norm = {"CENTRED": yes, "WEIGHTED": yes, "ROWS": 2, "COLS": 1024}
        found[f"norm_gradient {kind} {yes}"] = built(launch._norm_gradient, pointers, norm)
        found[f"gelu_gate {kind} {yes}"] = built(launch._gelu_gate, pointers, {"TANH": yes, "BLOCK": 1024})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
