"""How long a batch takes, and how much KV fits: the simulator's only knowledge of hardware.

A decode step takes `decode_s + decode_call_s * batch + decode_kv_s * context`, a prefill batch
`max(prefill_min_s, work) + overhead_s` with a work of `prefill_token_s * new tokens +
prefill_pair_s * attention pairs + prefill_cached_pair_s * pairs inside what is cached`. The last
term is there for SGLang's `torch_native` attention, which works out the whole sequence again and
throws the cached part away; kernels of GPUs do not, and it is 0 for them. `call_s` is what a call
takes before and after the engine (HTTP, tokenizer, client), one call after another beside the
engine: 0 in the presets, a stated assumption, small beside the seconds that a call takes there.
The coefficients come from a roofline of published figures (`PRESETS`) or from measured points
(`fitted`).

Sources of the preset numbers:

- bandwidth, dense bf16 peak, memory: NVIDIA's data sheets of the A100 80GB SXM (2,039 GB/s,
  312 TFLOPS) and the H200 SXM (4.8 TB/s, 989 TFLOPS, 141 GB); the host link is PCIe 4.0 x16 (the
  paper's machine) or 5.0 x16 at 80 % of its nominal 32 or 64 GB/s.
- models: the published configurations of Llama-3.1-8B (8.03e9 parameters, 32 layers, hidden 4096)
  and 70B (70.6e9, 80 layers, hidden 8192), both with 8 KV heads of 128; bf16 weights and KV.
- `BANDWIDTH_SHARE` 0.77: Llama-3.1-8B in bf16 under vLLM 0.23 decodes one request on an A100 40GB
  at 77 % of the bandwidth ceiling (johnmusgrave.com/p/vllm-throughput-latency-sweep-on). We take
  it for all presets.
- `COMPUTE_SHARE` 0.5, `OVERHEAD_S` 1 ms per batch, `ALL_REDUCE_S` 20 us and `MEMORY_SHARE` 0.88 are
  assumptions, not measurements; so is that 70B runs on 4 A100 (the paper's choice) or 2 H200.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np

BANDWIDTH_SHARE: Final = 0.77
COMPUTE_SHARE: Final = 0.5
OVERHEAD_S: Final = 1e-3
ALL_REDUCE_S: Final = 20e-6
MEMORY_SHARE: Final = 0.88
KV_BYTES_PER_LAYER: Final = 2 * 8 * 128 * 2  # K and V, 8 heads of 128, bf16
CALIBRATION_TOKENS: Final = 1024  # the long prompt of engine/calibration.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One engine's speed and room. `copy_token_s` is a KV token's way to the host, or back."""

    name: str
    decode_s: float
    decode_call_s: float
    decode_kv_s: float
    prefill_min_s: float
    prefill_token_s: float
    prefill_pair_s: float
    overhead_s: float
    copy_token_s: float
    kv_tokens: int
    prefill_cached_pair_s: float = 0.0
    call_s: float = 0.0

    def decode_time_s(self, batch: int, context: int, steps: int = 1) -> float:
        """`steps` decode steps in a row; `context` are the KV tokens read by the first."""
        grown = batch * steps * (steps - 1) / 2
        fixed = self.decode_s + self.decode_call_s * batch
        return steps * fixed + self.decode_kv_s * (steps * context + grown)

    def decode_steps_until(self, batch: int, context: int, seconds: float) -> int:
        """The smallest number of steps, at least 1, that take `seconds` or longer."""
        square = self.decode_kv_s * batch / 2
        linear = self.decode_s + self.decode_call_s * batch + self.decode_kv_s * context - square
        if square == 0:
            return max(1, math.ceil(seconds / linear - 1e-9))
        root = (math.sqrt(linear * linear + 4 * square * seconds) - linear) / (2 * square)
        return max(1, math.ceil(root - 1e-9))

    def prefill_time_s(self, tokens: int, pairs: float, cached_pairs: float = 0.0) -> float:
        """A prefill batch of `tokens` new tokens that attend to `pairs` positions in all.

        `cached_pairs` are those of the tokens before them among themselves.
        """
        work = self.prefill_token_s * tokens + self.prefill_pair_s * pairs
        work += self.prefill_cached_pair_s * cached_pairs
        return self.overhead_s + max(self.prefill_min_s, work)

    @property
    def prefill_weight(self) -> float:
        """Steps per uncached prefill token, as the engine measures it at start (alone, empty)."""
        long, short = CALIBRATION_TOKENS, 8
        prefill = self.prefill_time_s(long, attention_pairs(0, long))
        prefill -= self.prefill_time_s(short, attention_pairs(0, short))
        return prefill / (long - short) / self.decode_time_s(1, short)


def pooled(device: Device, num_devices: int) -> Device:
    """So many devices as one that splits every batch evenly: no placement has more to work with.

    Each still reads all weights in a decode step. Of a prefill batch each does a part, fixed costs
    included, so a prompt is computed so many times as fast.
    """
    split = ("decode_call_s", "decode_kv_s", "prefill_min_s", "prefill_token_s", "prefill_pair_s",
             "prefill_cached_pair_s", "overhead_s", "copy_token_s")  # fmt: skip
    shares = {name: getattr(device, name) / num_devices for name in split}
    name = f"{num_devices}x{device.name}"
    return replace(device, name=name, kv_tokens=num_devices * device.kv_tokens, **shares)


def attention_pairs(num_before: int, num_new: int) -> float:
    """Positions that `num_new` tokens attend to, after `num_before` that are in the cache."""
    return num_new * (num_before + (num_new + 1) / 2)


# --- presets ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    bytes_per_s: float
    flops: float
    memory_bytes: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    parameters: float
    layers: int
    hidden: int


A100: Final = Gpu("a100", 2.039e12, 312e12, 80 * 2**30, 0.8 * 32e9)
H200: Final = Gpu("h200", 4.8e12, 989e12, 141e9, 0.8 * 64e9)
LLAMA_8B: Final = Model("8b", 8.03e9, 32, 4096)
LLAMA_70B: Final = Model("70b", 70.6e9, 80, 8192)


def roofline(gpu: Gpu, model: Model, num_gpus: int) -> Device:
    """What `num_gpus` GPUs in tensor parallel would do, from the sources in the module's text."""
    bandwidth = num_gpus * gpu.bytes_per_s * BANDWIDTH_SHARE
    flops = num_gpus * gpu.flops * COMPUTE_SHARE
    weights = 2 * model.parameters
    kv_bytes = KV_BYTES_PER_LAYER * model.layers
    talk = 2 * model.layers * ALL_REDUCE_S if num_gpus > 1 else 0.0
    return Device(
        name=f"{gpu.name}-{model.name}",
        decode_s=weights / bandwidth + OVERHEAD_S + talk,
        decode_call_s=2 * model.parameters / flops,
        decode_kv_s=kv_bytes / bandwidth,
        prefill_min_s=weights / bandwidth,
        prefill_token_s=2 * model.parameters / flops,
        prefill_pair_s=4 * model.layers * model.hidden / flops,
        overhead_s=OVERHEAD_S + talk,
        copy_token_s=kv_bytes / (num_gpus * gpu.link_bytes_per_s),
        kv_tokens=int((num_gpus * gpu.memory_bytes * MEMORY_SHARE - weights) / kv_bytes),
    )


PRESETS: Final[dict[str, Device]] = {
    device.name: device
    for device in (
        roofline(A100, LLAMA_8B, 1),
        roofline(A100, LLAMA_70B, 4),
        roofline(H200, LLAMA_8B, 1),
        roofline(H200, LLAMA_70B, 2),
    )
}

# --- fit ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Point:
    """One measured batch. Decode: calls, KV tokens read. Prefill: new tokens, attention pairs.

    `cached` are the attention pairs among the tokens that a prefill batch found in the cache.
    """

    count: float
    reach: float
    seconds: float
    cached: float = 0.0


def fit(points: Sequence[Point]) -> tuple[float, float, float, float]:
    """`(fixed, per count, per reach, per cached)` seconds, none of them negative.

    Least squares of the relative errors. Raises `ValueError` with fewer than three points. A
    coefficient that would be negative is noise: it is set to 0 and the others are fitted without.
    """
    if len(points) < 3:
        raise ValueError(f"a fit of three numbers needs three points or more, got {len(points)}")
    matrix = np.array([[1.0, p.count, p.reach, p.cached] for p in points])
    matrix /= np.array([[p.seconds] for p in points])
    used = [column for column in range(4) if matrix[:, column].any()]
    while used:
        found, *_ = np.linalg.lstsq(matrix[:, used], np.ones(len(points)), rcond=None)
        if found.min() >= 0:
            break
        del used[int(found.argmin())]
    by_column = dict(zip(used, found.tolist(), strict=True))
    fixed, count, reach, cached = (by_column.get(column, 0.0) for column in range(4))
    return fixed, count, reach, cached


def fitted(
    name: str,
    decode: Sequence[Point],
    lone: Sequence[Point],
    kv_tokens: int,
    short: Point | None = None,
) -> Device:
    """A device from measured batches; copies to the host are taken to be free of charge.

    `lone` are prefill batches as a lone call sees them, `short` one as it delays a busy engine.
    What the lone call takes beyond that is outside the engine; without `short`, nothing is.
    """
    decode_s, decode_call_s, decode_kv_s, _ = fit(decode)
    lone_s, prefill_token_s, prefill_pair_s, prefill_cached_pair_s = fit(lone)
    overhead_s = lone_s
    if short is not None:
        work_s = prefill_token_s * short.count + prefill_pair_s * short.reach
        overhead_s = min(lone_s, max(0.0, short.seconds - work_s))
    return Device(
        name=name,
        decode_s=decode_s,
        decode_call_s=decode_call_s,
        decode_kv_s=decode_kv_s,
        prefill_min_s=0.0,
        prefill_token_s=prefill_token_s,
        prefill_pair_s=prefill_pair_s,
        overhead_s=overhead_s,
        copy_token_s=0.0,
        kv_tokens=kv_tokens,
        prefill_cached_pair_s=prefill_cached_pair_s,
        call_s=lone_s - overhead_s,
    )


class DeviceError(ValueError):
    """A file of measured points cannot be used; the message names the file and what is wrong."""


def load_device(path: Path) -> Device:
    """The device fitted to a file of measured batches; raises `DeviceError` or `OSError`.

    The file is a JSON object: `name`, `kv_tokens`, `decode` with rows of [calls, KV tokens read,
    seconds], `prefill` with rows of [new tokens, attention pairs, seconds, pairs in the cache], the
    last being optional, and `short`, one such row, which is optional, too (see `fitted`).
    """
    try:
        value = json.loads(path.read_text())
        decode, lone = ([Point(*row) for row in value[key]] for key in ("decode", "prefill"))
        short = Point(*value["short"]) if "short" in value else None
        return fitted(str(value["name"]), decode, lone, int(value["kv_tokens"]), short)
    except (ValueError, TypeError, KeyError) as error:
        raise DeviceError(f"{path}: {type(error).__name__}: {error}") from error
