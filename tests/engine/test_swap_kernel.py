"""The kernel compiles for the GPUs we name, spills nothing, and says what is missing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from autellix_sglang.engine import swap_kernel
from autellix_sglang.errors import KernelError

ENTRY_POINTS = {"kv_gather_i32", "kv_gather_i64", "kv_scatter_i32", "kv_scatter_i64"}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
needs_nvcc = pytest.mark.skipif(not swap_kernel.nvcc_path(), reason="nvcc is not installed")


def nvcc_knows(arch: str) -> bool:
    """sm_100 needs CUDA 12.8; a machine with an older GPU may well have an older nvcc."""
    command = [str(swap_kernel.nvcc_path()), "--list-gpu-code"]
    return (
        arch in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_ptxas_reports_no_spills(arch, tmp_path):
    """Every entry point is there, and none of them spills or has a stack."""
    if not nvcc_knows(arch):
        pytest.skip(f"this nvcc does not compile for {arch}")
    command = swap_kernel.nvcc_command(swap_kernel.nvcc_path(), arch, tmp_path / "out.cubin")
    done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"entry function '(\w+)'", done.stderr)) == ENTRY_POINTS
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) .*?stores, (\d+)", done.stderr)
    assert spills == [("0", "0", "0")] * len(ENTRY_POINTS)


@needs_nvcc
def test_rows_move_in_16_byte_words(tmp_path):
    """The compiler kept the vector loads and stores."""
    output = tmp_path / "out.ptx"
    command = [str(swap_kernel.nvcc_path()), "-ptx", "-arch=sm_80", *swap_kernel.FLAGS]
    subprocess.run([*command, str(swap_kernel.SOURCE), "-o", str(output)], check=True)
    ptx = output.read_text()
    assert re.search(r"ld\.(global\.)?v4\.[bu]32", ptx)
    assert re.search(r"st\.(global\.)?v4\.[bu]32", ptx)


@needs_nvcc
def test_second_use_comes_from_the_cache(tmp_path, monkeypatch):
    """The cubin is compiled once per source, architecture and compiler."""
    code = swap_kernel.cubin("sm_90", tmp_path)
    assert code.startswith(b"\x7fELF")
    monkeypatch.setattr(swap_kernel, "_by_nvcc", lambda *_: pytest.fail("compiled again"))
    assert swap_kernel.cubin("sm_90", tmp_path) == code
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]


@needs_nvcc
def test_a_compiler_that_refuses_is_quoted(tmp_path):
    """The error names the compiler and what it said."""
    with pytest.raises(KernelError, match="nvcc could not compile"):
        swap_kernel.cubin("sm_1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nvrtc_helps_out_where_nvcc_fails(tmp_path, monkeypatch):
    """An nvcc that is too old for the GPU, or lacks a host compiler, is not the end."""
    monkeypatch.setattr(swap_kernel, "nvcc_path", lambda: tmp_path / "nvcc")
    monkeypatch.setattr(swap_kernel, "_by_nvrtc", lambda source, arch: arch.encode())
    assert swap_kernel.cubin("sm_90", tmp_path) == b"sm_90"


def test_nvrtc_compiles_it_too(tmp_path, monkeypatch):
    """Where there is no nvcc, the NVRTC that comes with SGLang's CUDA packages does it."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda.bindings is not installed")
    monkeypatch.setattr(swap_kernel, "nvcc_path", lambda: None)
    for arch in ARCHITECTURES:
        assert swap_kernel.cubin(arch, tmp_path).startswith(b"\x7fELF")


def test_without_any_compiler_there_is_one_clear_error(tmp_path, monkeypatch):
    """It names both compilers that would do."""
    monkeypatch.setattr(swap_kernel, "nvcc_path", lambda: None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"no nvcc that works was found .* cuda\.bindings"):
        swap_kernel.cubin("sm_90", tmp_path)


def test_source_is_installed_with_the_package():
    """`csrc` is reached through the package, so a wheel has it."""
    assert swap_kernel.SOURCE.parent.parent.name == "autellix_sglang"
    assert swap_kernel.SOURCE.is_file()
