"""The CUDA kernel behind `swap_op`: compiled on first use, cached, launched on the current stream.

`csrc/kv_swap.cu` becomes a cubin for the device at hand, by nvcc where there is one that can, else
by the NVRTC that comes with SGLang (`cuda.bindings`), and is kept in the user's cache directory
under a hash of source, architecture and compiler. It is loaded through the CUDA driver's C
interface, so neither torch's ABI nor a host compiler's matters. Nothing here happens at import.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from autellix_sglang.engine.swap_op import HostChunk, KVPool
from autellix_sglang.errors import KernelError
from autellix_sglang.platform.tiny_model import cache_directory

SOURCE: Final = Path(__file__).resolve().parent.parent / "csrc" / "kv_swap.cu"
FLAGS: Final = ("--std=c++17",)
THREADS_PER_BLOCK: Final = 256  # the kernel's launch bounds
WARPS_PER_BLOCK: Final = THREADS_PER_BLOCK // 32
BLOCKS_PER_SM: Final = 8  # fills an SM; the kernel strides over what is left
STAGING_BYTES: Final = 64 * 2**20
COMPILE_TIMEOUT_S: Final = 120.0

# --- compiling ----------------------------------------------------------------------------------


def cubin(arch: str, directory: Path | None = None) -> bytes:
    """Machine code for `arch` (such as "sm_90"), from the cache or compiled now.

    Raises `KernelError`, naming what was tried, if there is no compiler or it fails.
    """
    source = SOURCE.read_bytes()
    compiler = nvcc_path()
    key = hashlib.sha256(b"\0".join([source, arch.encode(), str(compiler).encode()]))
    name = f"kv_swap-{arch}-{key.hexdigest()[:16]}.cubin"
    path = (directory or cache_directory()) / name
    if not path.is_file():
        _write_atomically(path, _compile(compiler, source, arch))
    return path.read_bytes()


def _compile(compiler: Path | None, source: bytes, arch: str) -> bytes:
    if compiler is None:
        return _by_nvrtc(source, arch)
    try:
        return _by_nvcc(compiler, arch)
    except KernelError as error:  # too old for the device, or without a host compiler
        try:
            return _by_nvrtc(source, arch)
        except KernelError as other:
            raise KernelError(f"{error}; {other}") from error


def nvcc_path() -> Path | None:
    """`$CUDA_HOME/bin/nvcc`, or the one on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    return next((path.resolve() for path in candidates if path.is_file()), None)


def nvcc_command(compiler: Path, arch: str, output: Path) -> list[str]:
    return [str(compiler), "-cubin", f"-arch={arch}", *FLAGS, str(SOURCE), "-o", str(output)]


def _by_nvcc(compiler: Path, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "kv_swap.cubin"
        command = nvcc_command(compiler, arch, output)
        try:
            subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=COMPILE_TIMEOUT_S
            )
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or error
            raise KernelError(f"{compiler} could not compile {SOURCE}: {said}") from error
        return output.read_bytes()


def _by_nvrtc(source: bytes, arch: str) -> bytes:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(
            "the swap kernel needs a compiler: no nvcc that works was found ($CUDA_HOME, PATH), "
            f"and cuda.bindings, which brings NVRTC, cannot be imported ({error})"
        ) from error
    options = [f"--gpu-architecture={arch}".encode(), *(flag.encode() for flag in FLAGS)]
    try:
        program = _nvrtc(nvrtc.nvrtcCreateProgram(source, SOURCE.name.encode(), 0, [], []))
        _nvrtc(nvrtc.nvrtcCompileProgram(program, len(options), options))
        code = bytearray(_nvrtc(nvrtc.nvrtcGetCUBINSize(program)))
        _nvrtc(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    except RuntimeError as error:  # NVRTC's library is missing, or it refused
        raise KernelError(f"NVRTC could not compile {SOURCE} for {arch}: {error}") from error


def _nvrtc(reply: tuple[Any, ...]) -> Any:
    """The value of a `cuda.bindings` call, whose first element is the status."""
    status, *values = reply
    if int(status):
        raise RuntimeError(str(status))
    return values[0] if values else None


def _write_atomically(path: Path, data: bytes) -> None:
    """Several ranks compile at once; each renames a whole file into place."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
        draft.write(data)
    Path(draft.name).replace(path)


# --- loading ------------------------------------------------------------------------------------


class Driver:
    """The few functions of the CUDA driver that we call, with errors as `KernelError`."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise KernelError(f"the CUDA driver cannot be loaded: {error}") from error
        self.call("cuInit", 0)

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise KernelError(f"{name}: CUDA error {status}, {(text.value or b'').decode()}")


class Launcher(Protocol):
    """What a mover asks of the machine that runs the kernel."""

    max_blocks: int  # enough to keep the machine busy; the kernel strides over the rest

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a small CPU tensor where the kernel can read it, in the stream's order."""

    def launch(self, name: str, num_blocks: int, args: list[Any]) -> None:
        """Start an entry point; `args` are ctypes values in the kernel's order."""


class CudaLauncher:
    """The kernel on one device, in the primary context and on the current stream of torch."""

    def __init__(self, driver: Driver, device: torch.device) -> None:
        self._driver = driver
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self.max_blocks = BLOCKS_PER_SM * int(properties.multi_processor_count)
        code = cubin(f"sm_{properties.major}{properties.minor}")
        handle, self._context, module = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuDeviceGet", ctypes.byref(handle), device.index)
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        driver.call("cuCtxSetCurrent", self._context)
        driver.call("cuModuleLoadData", ctypes.byref(module), code)
        self._functions = {name: self._function(module, name) for name in _entry_points()}

    def _function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._driver.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return function

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        return values.pin_memory().to(self._device, non_blocking=True)

    def launch(self, name: str, num_blocks: int, args: list[Any]) -> None:
        pointers = [ctypes.cast(ctypes.byref(arg), ctypes.c_void_p) for arg in args]
        parameters = (ctypes.c_void_p * len(args))(*pointers)
        grid, block, shared_bytes = (num_blocks, 1, 1), (THREADS_PER_BLOCK, 1, 1), 0
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._driver.call("cuCtxSetCurrent", self._context)
        self._driver.call(
            "cuLaunchKernel",
            self._functions[name],
            *map(ctypes.c_uint, (*grid, *block, shared_bytes)),
            ctypes.c_void_p(stream),
            parameters,
            None,
        )


def _entry_points() -> Iterator[str]:
    for direction in ("gather", "scatter"):
        for bits in (32, 64):
            yield f"kv_{direction}_i{bits}"


# --- moving -------------------------------------------------------------------------------------


class BufferEntry(ctypes.Structure):
    """`struct Buffer` of the kernel."""

    _fields_ = (
        ("base", ctypes.c_uint64),
        ("stride_bytes", ctypes.c_int64),
        ("row_bytes", ctypes.c_int32),
        ("record_offset", ctypes.c_int32),
    )


def buffer_table(pool: KVPool) -> bytearray:
    """The kernel's description of a pool's buffers."""
    entries = [
        BufferEntry(rows.data_ptr(), rows.stride(0), rows.shape[1], offset)
        for rows, offset in zip(pool.byte_rows, pool.record_offsets, strict=False)
    ]
    return bytearray().join(bytes(entry) for entry in entries)


def kernel_args(
    table: int,
    pool: KVPool,
    slots: torch.Tensor,
    records: torch.Tensor | None,
    host: int,
) -> list[Any]:
    """Arguments of every entry point; `table` and `host` are addresses, `records` may be absent."""
    return [
        ctypes.c_uint64(table),
        ctypes.c_int32(len(pool.buffers)),
        ctypes.c_uint64(slots.data_ptr()),
        ctypes.c_uint64(0 if records is None else records.data_ptr()),
        ctypes.c_int64(len(slots)),
        ctypes.c_uint64(host),
        ctypes.c_int64(pool.record_bytes),
    ]


def entry_point(direction: str, slots: torch.Tensor) -> str:
    return f"kv_{direction}_i{8 * slots.element_size()}"


class DirectMover:
    """The kernel reads and writes the pinned chunk itself, over the link."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._tables: weakref.WeakKeyDictionary[KVPool, torch.Tensor] = weakref.WeakKeyDictionary()

    def gather(self, pool: KVPool, slots: torch.Tensor, chunk: HostChunk) -> None:
        records = self._launcher.upload(chunk.records)
        self._launch("gather", pool, slots, records, chunk.storage)

    def scatter(self, chunk: HostChunk, pool: KVPool, slots: torch.Tensor) -> None:
        records = self._launcher.upload(chunk.records)
        self._launch("scatter", pool, slots, records, chunk.storage)

    def _launch(
        self,
        direction: str,
        pool: KVPool,
        slots: torch.Tensor,
        records: torch.Tensor | None,
        host: torch.Tensor,
    ) -> None:
        """One launch; `host` is pinned or on the device, `records` None counts from 0."""
        table = self._table(pool)
        num_warps = len(slots) * len(pool.buffers)
        num_blocks = min(-(-num_warps // WARPS_PER_BLOCK), self._launcher.max_blocks)
        args = kernel_args(table.data_ptr(), pool, slots, records, host.data_ptr())
        self._launcher.launch(entry_point(direction, slots), num_blocks, args)

    def _table(self, pool: KVPool) -> torch.Tensor:
        """The pool's description where the kernel reads it; uploaded once, which is waited for."""
        table = self._tables.get(pool)
        if table is None:
            table = self._launcher.upload(torch.frombuffer(buffer_table(pool), dtype=torch.uint8))
            if table.is_cuda:  # later moves may be on another stream
                torch.cuda.current_stream(table.device).synchronize()
            self._tables[pool] = table
        return table


class StagedMover(DirectMover):
    """The kernel works on a buffer on the device, and the copy engine moves whole runs of it."""

    def __init__(self, launcher: Launcher, staging_bytes: int = STAGING_BYTES) -> None:
        super().__init__(launcher)
        self._staging_bytes = staging_bytes

    def gather(self, pool: KVPool, slots: torch.Tensor, chunk: HostChunk) -> None:
        for some, part, staging in self._pieces(pool, slots, chunk):
            self._launch("gather", pool, some, None, staging)
            for token, record, length in part.runs():
                target = part.storage[record : record + length]
                target.copy_(staging[token : token + length], non_blocking=True)

    def scatter(self, chunk: HostChunk, pool: KVPool, slots: torch.Tensor) -> None:
        for some, part, staging in self._pieces(pool, slots, chunk):
            for token, record, length in part.runs():
                source = part.storage[record : record + length]
                staging[token : token + length].copy_(source, non_blocking=True)
            self._launch("scatter", pool, some, None, staging)

    def _pieces(
        self, pool: KVPool, slots: torch.Tensor, chunk: HostChunk
    ) -> Iterator[tuple[torch.Tensor, HostChunk, torch.Tensor]]:
        """(slots, their part of the chunk, the staging buffer) for each filling of the latter."""
        # Always as large, so that the allocator has it at hand from the second move on.
        size = max(1, self._staging_bytes // pool.record_bytes)
        shape = (size, pool.record_bytes)
        staging = torch.empty(shape, dtype=torch.uint8, device=pool.device)
        for start in range(0, len(slots), size):
            yield slots[start : start + size], chunk.part(start, start + size), staging


@functools.cache
def _launcher(device: torch.device) -> CudaLauncher:
    with torch.cuda.device(device):
        return CudaLauncher(Driver(), device)


@functools.cache
def kernel_mover(device: torch.device, is_staged: bool = True) -> DirectMover:
    """The mover for a CUDA device; compiles on the first call, or raises `KernelError`."""
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    return (StagedMover if is_staged else DirectMover)(_launcher(device))
