"""The swap kernel's own source, compiled for this CPU: it runs where there is no GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from autellix_sglang.engine.swap_kernel import SOURCE, THREADS_PER_BLOCK

HARNESS = Path(__file__).with_name("kernel_on_cpu.cpp")
# A misaligned 16-byte access is an error on a GPU and works here: it ends the process instead.
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing",
    "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",
)  # fmt: skip


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def compile_for_cpu(directory: Path) -> ctypes.CDLL:
    output = directory / "kv_swap_on_cpu.so"
    source = f'-DKERNEL_SOURCE="{SOURCE}"'
    subprocess.run([compiler(), *FLAGS, source, HARNESS, "-o", output], check=True)
    return ctypes.CDLL(str(output))


class CpuLauncher:
    """`swap_kernel.Launcher`; few blocks, so that each warp strides over many rows."""

    max_blocks = 3

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    def launch(self, name: str, num_blocks: int, args: list[Any]) -> None:
        getattr(self._library, f"run_{name}")(num_blocks, THREADS_PER_BLOCK, *args)
