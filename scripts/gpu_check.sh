#!/usr/bin/env bash
# What needs an NVIDIA GPU, in one command of under 8 minutes: kernel tests, compute-sanitizer where
# there is one that can, and the swap benchmark, whose result goes to bench/results/. A step that
# fails does not keep the next one from running; the exit status says whether all went well.
# Of Python packages it needs torch, sglang, numpy and pytest, no plugins of the latter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-.venv/bin/python}"
RESULTS=bench/results
TESTS=(tests/engine/test_swap_{op,kernel}.py tests/engine/test_host_pool.py)
# Without the project's settings, which name plugins.
PYTEST=("$PYTHON" -m pytest -q -c /dev/null --rootdir . --import-mode=importlib
    -W ignore::pytest.PytestUnknownMarkWarning)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { printf 'gpu-check: %s\n' "$*"; }
nvidia-smi -L || { say "error: no NVIDIA GPU on this machine"; exit 1; }

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    say "error: PyTorch in $PYTHON cannot use the GPU: either it is a CPU build (rm -rf .venv, make" \
        "setup), or the driver is older than its CUDA version (nvidia-smi)"
    exit 1
}
status=0
failed() { say "FAILED: $*"; status=1; }

say "kernel tests"
timeout 120 "${PYTEST[@]}" "${TESTS[@]}" -k 'not CPU' || failed "kernel tests"

say "the manager on the GPU, beside batches in flight: random events, every output checked"
timeout 90 "$PYTHON" -m bench.chaos --no-model --minutes 0.5 --device cuda || failed "the manager"

if command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer, on a few tests"
    # Memory errors only: PyTorch's own probing of the driver makes API calls that fail.
    log="$(mktemp)"
    code=0
    timeout 120 compute-sanitizer --report-api-errors no --error-exitcode 1 \
        "${PYTEST[@]}" tests/engine/test_swap_op.py -k 'GPU and (records or victims or strided)' \
        >"$log" 2>&1 || code=$?
    tail -n 40 "$log"
    if [ "$code" = 124 ]; then
        say "compute-sanitizer did not end in 120 s: skipped"
    elif grep -qi 'device not supported' "$log"; then
        say "compute-sanitizer does not support this machine: skipped"
    elif [ "$code" != 0 ]; then
        failed "compute-sanitizer"
    fi
    rm -f "$log"
else
    say "compute-sanitizer is not installed: skipped"
fi

say "benchmark"
mkdir -p "$RESULTS"
"$PYTHON" -m bench.swap --minutes 3 "$@" | tee "$RESULTS/swap.txt" || failed "benchmark"
tail -n 1 "$RESULTS/swap.txt" >"$RESULTS/swap.json"
say "results in $RESULTS/swap.txt and swap.json"
exit "$status"
