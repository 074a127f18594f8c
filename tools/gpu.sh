#!/usr/bin/env bash
# What a machine with a GPU is asked: are the kernels right, and what do the headline models cost.
# Runs from a checkout; torch, timm, triton and pytest have to be there, nothing is installed or fetched.
#
#   tools/gpu.sh                    all of it, in about four minutes
#   tools/gpu.sh --only 'convnext*' other rows: arguments of tools/bench.py
#   tools/gpu.sh --dry              without a GPU: imports, kernels built by Triton, every case as shapes
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=.
tests() { python3 -m pytest -q -p no:cacheprovider "$@"; }
bench() { python3 tools/bench.py --device cuda --dtype bfloat16 --mode program --rounds 10 "$@"; }
if [ "${1:-}" = --dry ]; then
    tests --collect-only tests/contract/test_robustness.py tests/programs/test_modes.py | tail -1
    tests tests/kernels/test_build.py
    bench "$@"
    exit
fi
tests -k "Cuda or kernel or log_sum_exp" \
    tests/kernels tests/contract/test_robustness.py tests/programs/test_modes.py
[ $# -gt 0 ] || set -- --only 'vit*' --compile
bench "$@"
