#!/usr/bin/env bash
# What needs an NVIDIA GPU, in one command: kernel tests, compute-sanitizer where there is one, and
# the swap benchmark, whose result goes to bench/results/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-.venv/bin/python}"
RESULTS=bench/results
TESTS=(tests/engine/test_swap_op.py tests/engine/test_swap_kernel.py)

say() { printf 'gpu-check: %s\n' "$*"; }
nvidia-smi -L || { say "error: no NVIDIA GPU on this machine"; exit 1; }

say "kernel tests"
"$PYTHON" -m pytest -q "${TESTS[@]}"

if command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer, on the smaller tests"
    compute-sanitizer --error-exitcode 1 "$PYTHON" -m pytest -q tests/engine/test_swap_op.py \
        -k 'GPU and (records or victims or strided or 33)'
else
    say "compute-sanitizer is not installed: skipped"
fi

say "benchmark"
mkdir -p "$RESULTS"
"$PYTHON" -m bench.swap "$@" | tee "$RESULTS/swap.txt"
tail -n 1 "$RESULTS/swap.txt" >"$RESULTS/swap.json"
say "results in $RESULTS/swap.txt and swap.json"
