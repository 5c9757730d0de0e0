#!/usr/bin/env bash
# What needs an NVIDIA GPU, in one command of under 8 minutes: kernel tests, compute-sanitizer where
# there is one, and the swap benchmark, whose result goes to bench/results/. A step that fails does
# not keep the next one from running; the exit status says whether all went well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-.venv/bin/python}"
RESULTS=bench/results
TESTS=(tests/engine/test_swap_{op,kernel}.py tests/engine/test_host_pool.py)

say() { printf 'gpu-check: %s\n' "$*"; }
nvidia-smi -L || { say "error: no NVIDIA GPU on this machine"; exit 1; }

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { say "error: PyTorch in $PYTHON cannot use the GPU (a CPU build?): rm -rf .venv, make setup"; exit 1; }
status=0
failed() { say "FAILED: $*"; status=1; }

say "kernel tests"
timeout 120 "$PYTHON" -m pytest -q "${TESTS[@]}" -k 'not CPU' || failed "kernel tests"

say "the manager on the GPU: random events, every output and every slot checked"
timeout 90 "$PYTHON" -m bench.chaos --no-model --minutes 0.5 --device cuda || failed "the manager"

if command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer, on the smaller tests"
    # Memory errors only: PyTorch's own probing of the driver makes API calls that fail.
    timeout 90 compute-sanitizer --report-api-errors no --error-exitcode 1 \
        "$PYTHON" -m pytest -q tests/engine/test_swap_op.py \
        -k 'GPU and (records or victims or strided or 33)' || failed "compute-sanitizer, or 90 s"
else
    say "compute-sanitizer is not installed: skipped"
fi

say "benchmark"
mkdir -p "$RESULTS"
"$PYTHON" -m bench.swap --minutes 3 "$@" | tee "$RESULTS/swap.txt" || failed "benchmark"
tail -n 1 "$RESULTS/swap.txt" >"$RESULTS/swap.json"
say "results in $RESULTS/swap.txt and swap.json"
exit "$status"
