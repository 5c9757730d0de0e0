#!/usr/bin/env bash
# Creates .venv in the checkout and installs the package and everything its tests need.
#
#   PYTHON=...               the interpreter for a new .venv (default: python3; 3.11 or newer)
#   AUTELLIX_TORCH_INDEX=... a package index with CPU builds of PyTorch. Plain PyPI serves the CUDA
#                            build: it works on a CPU too, and is several GB larger.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH=torch==2.13.0
# Their metadata asks for CUDA packages; pyproject.toml's extra `cpu` lists what they need instead.
WITHOUT_DEPS=(sglang==0.5.23 torchvision==0.28.0)
VENV_PYTHON=.venv/bin/python
STAMP=.venv/autellix-setup.sha256

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }
pip() { "$VENV_PYTHON" -m pip -qq --disable-pip-version-check "$@"; }
digest() { cat pyproject.toml scripts/setup.sh | "$VENV_PYTHON" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

check_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$1 is missing or older than Python 3.11; choose another with PYTHON=/path/to/python3"
}

make_venv() {
    local python="${PYTHON:-python3}"
    check_python "$python"
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv ||
        die "$python cannot make a virtual environment (on Debian: install python3-venv)"
}

install_gpu() {
    say "NVIDIA GPU found: installing SGLang with its CUDA packages"
    pip install -e '.[gpu,test]'
}

install_cpu() {
    say "no NVIDIA GPU: installing $TORCH"
    pip install ${AUTELLIX_TORCH_INDEX:+--index-url "$AUTELLIX_TORCH_INDEX"} "$TORCH"
    say "installing this package, SGLang's requirements and the test tools"
    pip install -e '.[cpu,test]'
    say "installing ${WITHOUT_DEPS[*]}"
    pip install --no-deps "${WITHOUT_DEPS[@]}"
}

"$VENV_PYTHON" -m pip --version >/dev/null 2>&1 || make_venv  # none, or one that was interrupted
check_python "$VENV_PYTHON"
if [ "$(cat "$STAMP" 2>/dev/null)" = "$(digest)" ]; then
    say "up to date"
    exit 0
fi
if nvidia-smi >/dev/null 2>&1; then install_gpu; else install_cpu; fi
digest >"$STAMP"
say "done"
