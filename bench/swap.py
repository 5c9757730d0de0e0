"""How fast does KV move between the engine's pool and host memory, and when is that worth it?

    python -m bench.swap --quick
    python -m bench.swap --minutes 4 --prefill-tokens-per-s 12000

For each shape, page size and number of victims the rows of all layers go out and come back. GB/s
count the rows' bytes, once, until they are there. Cases that do not fit into memory, or into
`--minutes`, are left out and counted. On a CUDA device:

    ceiling        one pinned cudaMemcpyAsync of as many contiguous bytes
    direct         our kernel on mapped pinned memory
    staged         our kernel into a buffer on the device, then bulk copies
    per block      one copy per page and buffer, as vLLM 0.6 swapped
    get_cpu_copy   SGLang's MHATokenToKVPool.get_cpu_copy and load_cpu_copy
    hicache        SGLang's HiCache transfer kernel, host memory one layer after the other

A variant that fails is a row with `error`, and the others go on; if it is one of ours, the exit
status is 1. `bars` has the ratios of our variants to the others for chunks of at least 64 MiB.

On a CPU there is no link: `reference` (plain torch) is set against `naive loop`, one copy per token
and buffer, and `ceiling` is one memory copy. `break_even_tokens` is the length from which moving a
call out and in takes less time than computing it again at `--prefill-tokens-per-s`, by a straight
line through the times of one victim; 0 is always, null never or rate not known. Where the rate is
not given, a GPU measures the model's matrix products alone: no prefill is faster than that.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Final

import psutil
import torch

from autellix_sglang.engine.swap_op import HostChunk, KVPool, Mover, mover_for, swap_in, swap_out
from bench.common import Progress, format_table, new_parser, print_result, provenance, say

Move = Callable[[], object]
Variant = Callable[[], AbstractContextManager[tuple[Move, Move]]]  # out, in
OURS: Final = ("direct", "staged", "reference")
BASELINES: Final = ("ceiling", "per block", "get_cpu_copy", "hicache")
LARGE_BYTES: Final = 64 * 2**20  # from here on the bars count
ENOUGH_S: Final = 0.25  # spent on one move of one variant
PREFILL_TOKENS: Final = 4096  # in one batch, for the rate
MAX_SMALL_COPIES: Final = 100_000  # of one measurement by a variant that copies piece by piece
QUICK_BYTES: Final = 128 * 2**20
MEMORY_SHARE: Final = 0.25  # of what is free, for one case: its pool, its chunk and the copies


@dataclass(frozen=True, slots=True)
class Shape:
    """KV of one rank of a model; `is_mla` has one buffer per layer, in place of K and V.

    `products` are the weights, [inputs, outputs] each, that a token meets in a layer.
    """

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    is_mla: bool = False
    products: tuple[tuple[int, int], ...] = ()

    @property
    def num_buffers(self) -> int:
        return self.num_layers * (1 if self.is_mla else 2)

    @property
    def token_bytes(self) -> int:
        return self.num_buffers * self.num_heads * self.head_dim * 2  # bfloat16


SHAPES: Final = (
    Shape(
        "llama-3.1-8b", 32, 8, 128,
        products=((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)),
    ),
    Shape(
        "llama-3.1-70b/tp4", 80, 2, 128,
        products=((8192, 2560), (2048, 8192), (8192, 14336), (7168, 8192)),
    ),
    Shape("deepseek-v3", 61, 1, 576, is_mla=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """What is moved at once: `num_victims` calls of `num_tokens` tokens each."""

    shape: Shape
    page_size: int
    num_victims: int
    num_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.num_victims * self.num_tokens

    @property
    def num_bytes(self) -> int:
        return self.total_tokens * self.shape.token_bytes

    def labels(self) -> dict[str, Any]:
        return {
            "shape": self.shape.name,
            "page_size": self.page_size,
            "victims": self.num_victims,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
        }


def cases(is_quick: bool) -> Iterator[Case]:
    """All combinations; with `is_quick` few of them.

    Should time run out, the first ones span the ranges: every shape and page size for one victim of
    each length, then several victims in a shuffled order.
    """
    lengths = (128, 512) if is_quick else (128, 512, 2048, 8192, 32768)
    one = [(1, length) for length in lengths]
    several = list(product((8,) if is_quick else (4, 16, 64), lengths))
    random.Random(0).shuffle(several)
    page_sizes = (1, 64) if is_quick else (1, 16, 64)
    for (num_victims, num_tokens), shape, page_size in product(one + several, SHAPES, page_sizes):
        yield Case(shape, page_size, num_victims, num_tokens)


def fits(case: Case, is_quick: bool, num_free_bytes: int) -> bool:
    """Whether a case, its pool, its chunk and the copies of other variants fit into memory."""
    limit = num_free_bytes * MEMORY_SHARE / 4
    return case.num_bytes <= (min(limit, QUICK_BYTES) if is_quick else limit)


class Workload:
    """The pool, the slots and the host memory of one case, and the ways to move it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        num_slots = case.total_tokens * 5 // 4 // case.page_size * case.page_size
        width = (case.shape.num_heads, case.shape.head_dim)
        self.pool = KVPool(
            tuple(
                torch.zeros((num_slots, *width), dtype=torch.bfloat16, device=device)
                for _ in range(case.shape.num_buffers)
            )
        )
        order = torch.randperm(
            num_slots // case.page_size, generator=torch.Generator().manual_seed(0)
        )
        self.pages = order[: case.total_tokens // case.page_size]
        within = torch.arange(case.page_size)
        self.slots = (self.pages[:, None] * case.page_size + within).flatten().to(device)
        self.chunk = HostChunk.new(self.pool, len(self.slots))

    def variants(self) -> dict[str, Variant]:
        """Each way to move it on this device."""
        found: dict[str, Variant] = {"ceiling": self._bulk}
        is_gpu = self.device.type == "cuda"
        if is_gpu:
            from autellix_sglang.engine.swap_kernel import kernel_mover

            found["direct"] = partial(self._ours, partial(kernel_mover, self.device, False))
            found["staged"] = partial(self._ours, partial(kernel_mover, self.device, True))
            if not self.case.shape.is_mla:
                found["get_cpu_copy"] = self._get_cpu_copy
                found["hicache"] = self._hicache
        else:
            found["reference"] = partial(self._ours, partial(mover_for, self.pool))
        piece = self.case.page_size if is_gpu else 1
        if len(self.slots) // piece * len(self.pool.buffers) <= MAX_SMALL_COPIES:
            found["per block" if is_gpu else "naive loop"] = partial(self._small, piece)
        return found

    @contextmanager
    def _ours(self, make: Callable[[], Mover]) -> Iterator[tuple[Move, Move]]:
        mover = make()

        def move_out() -> None:
            swap_out(self.pool, self.slots, self.chunk, mover=mover, is_checked=True)

        def move_in() -> None:
            swap_in(self.chunk, self.pool, self.slots, mover=mover, is_checked=True)

        yield move_out, move_in

    @contextmanager
    def _bulk(self) -> Iterator[tuple[Move, Move]]:
        storage = self.chunk.storage
        packed = torch.empty(storage.shape, dtype=torch.uint8, device=self.device)
        yield (
            lambda: storage.copy_(packed, non_blocking=True),
            lambda: packed.copy_(storage, non_blocking=True),
        )

    @contextmanager
    def _small(self, piece: int) -> Iterator[tuple[Move, Move]]:
        """One copy per `piece` consecutive slots and buffer, to host memory of the same layout."""
        starts = self.slots[::piece].tolist()
        is_pinned = self.device.type == "cuda"
        host = [
            torch.empty((len(self.slots), *rows.shape[1:]), dtype=rows.dtype, pin_memory=is_pinned)
            for rows in self.pool.buffers
        ]

        def move(is_out: bool) -> None:
            for rows, held in zip(self.pool.buffers, host, strict=True):
                for i, start in enumerate(starts):
                    here = rows[start : start + piece]
                    there = held[i * piece : (i + 1) * piece]
                    (there if is_out else here).copy_(here if is_out else there, non_blocking=True)

        yield (lambda: move(True)), (lambda: move(False))

    @contextmanager
    def _sglang_pool(self) -> Iterator[Any]:
        """A pool of SGLang's, of the same shape, within SGLang's default settings."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
        from sglang.srt.runtime_context import get_context

        shape = self.case.shape
        with get_context().override_server_args():
            yield MHATokenToKVPool(
                self.pool.num_slots, self.case.page_size, torch.bfloat16, shape.num_heads,
                shape.head_dim, shape.num_layers, str(self.device), False,
            )  # fmt: skip

    @contextmanager
    def _get_cpu_copy(self) -> Iterator[tuple[Move, Move]]:
        with self._sglang_pool() as theirs:
            copied: list[Any] = [theirs.get_cpu_copy(self.slots)]

            def move_out() -> None:
                copied[0] = theirs.get_cpu_copy(self.slots)

            yield move_out, lambda: theirs.load_cpu_copy(copied[0], self.slots)

    @contextmanager
    def _hicache(self) -> Iterator[tuple[Move, Move]]:
        from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

        with self._sglang_pool() as theirs:
            host = MHATokenToKVPoolHost(
                theirs.get_device_pool_infos()[0].buffer_info, 1.0, 0, self.case.page_size,
                "layer_first", device_capacity_tokens=theirs.size, start_layer=theirs.start_layer,
                end_layer=theirs.end_layer, host_token_capacity=len(self.slots),
            )  # fmt: skip
            places = torch.arange(len(self.slots), device=self.device)

            def move_in() -> None:
                for layer in range(self.case.shape.num_layers):
                    host.load_to_device_per_layer(theirs, places, self.slots, layer, "kernel")

            try:
                yield (
                    lambda: host.backup_from_device_all_layer(theirs, places, self.slots, "kernel"),
                    move_in,
                )
            finally:
                host.destroy()


def seconds(move: Move, device: torch.device, repeats: int) -> float:
    """Median time of a move until its bytes are there.

    The first one does not count, unless it takes so long that there is no second.
    """
    times: list[float] = []
    while len(times) <= repeats and sum(times) < ENOUGH_S:
        _wait(device)
        started = time.perf_counter()
        move()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:] or times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per variant and direction, or one with `error` for a variant that failed."""
    workload = Workload(case, device)
    rows: list[dict[str, Any]] = []
    for variant, make in workload.variants().items():
        named = {"variant": variant, **case.labels()}
        try:
            with make() as moves:
                taken = [seconds(move, device, repeats) for move in moves]
        except Exception as error:  # of somebody else's kernel, perhaps: it must not end the run
            rows.append({**named, "error": f"{type(error).__name__}: {error}"[:300]})
            say(f"{variant}, {case}: {rows[-1]['error']}")
            continue
        for direction, taken_s in zip(("out", "in"), taken, strict=True):
            rows.append(
                {
                    **named,
                    "direction": direction,
                    "seconds": round(taken_s, 6),
                    "gb_per_s": round(case.num_bytes / taken_s / 1e9, 3),
                }
            )
    return rows


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """GB/s of our variants as a ratio to each of the others, over chunks of at least 64 MiB."""
    rates: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["bytes"] >= LARGE_BYTES:
            case = tuple(
                row[key] for key in ("page_size", "direction", "shape", "victims", "tokens")
            )
            rates.setdefault(case, {})[row["variant"]] = row["gb_per_s"]
    ratios: dict[tuple[Any, ...], list[float]] = {}
    for (page_size, direction, *_), found in rates.items():
        for ours in found.keys() & set(OURS):
            for theirs in found.keys() & set(BASELINES):
                key = (ours, theirs, page_size, direction)
                ratios.setdefault(key, []).append(found[ours] / found[theirs])
    names = ("variant", "to", "page_size", "direction")
    return [
        {
            **dict(zip(names, key, strict=True)),
            "smallest": round(min(values), 3),
            "median": round(statistics.median(values), 3),
            "cases": len(values),
        }
        for key, values in sorted(ratios.items())
    ]


def prefill_rates(device: torch.device) -> dict[str, float]:
    """Tokens per second of each shape's matrix products alone, on a GPU: a limit to prefill."""
    return {
        shape.name: PREFILL_TOKENS / (shape.num_layers * _layer_s(shape, device))
        for shape in SHAPES
        if shape.products
    }


def _layer_s(shape: Shape, device: torch.device) -> float:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    pairs = [
        (torch.randn(PREFILL_TOKENS, inputs, **options), torch.randn(inputs, outputs, **options))
        for inputs, outputs in shape.products
    ]
    return seconds(lambda: [tokens @ weight for tokens, weight in pairs], device, 10)


def break_even(times: dict[int, float], prefill_tokens_per_s: float) -> int | None:
    """Tokens from which a swap (`times`: tokens -> seconds out and in) beats computing again.

    0 if it always does; None if it never does, or if one of the two is not known.
    """
    if len(times) < 2 or prefill_tokens_per_s <= 0:
        return None
    slope, fixed = statistics.linear_regression(list(times), list(times.values()))
    saved_per_token = 1 / prefill_tokens_per_s - slope
    if saved_per_token <= 0:
        return None
    return max(0, round(fixed / saved_per_token))


def break_evens(
    rows: Sequence[dict[str, Any]], variant: str, rates: Mapping[str, float]
) -> dict[str, int | None]:
    """Per shape, for one victim at the smallest page size; `rates` are prefill tokens per s."""
    found: dict[str, int | None] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        times: dict[int, float] = {}
        for row in rows:
            key = (row["variant"], row["shape"], row["victims"], row["page_size"])
            if key == (variant, shape, 1, 1):
                times[row["tokens"]] = times.get(row["tokens"], 0.0) + row["seconds"]
        found[shape] = break_even(times, rates.get(shape, 0.0))
    return found


def summary(
    rows: Sequence[dict[str, Any]], device: torch.device, rates: Mapping[str, float]
) -> dict[str, Any]:
    """The result without its provenance; `rates` are prefill tokens per second, by shape."""
    measured = [row for row in rows if "error" not in row]
    variant = "staged" if device.type == "cuda" else "reference"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "note": None if device.type == "cuda" else "no GPU: reference against a naive loop",
        "ceiling_gb_per_s": max(
            (row["gb_per_s"] for row in measured if row["variant"] == "ceiling"), default=None
        ),
        "break_even_tokens": break_evens(measured, variant, rates),
        "prefill_tokens_per_s": {shape: round(rate) for shape, rate in rates.items()},
        "bars": bars(measured),
        "errors": [row for row in rows if "error" in row],
        "results": measured,
    }


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = _parser().parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        say("no GPU: this measures the plain-torch reference against a naive loop, no link")
    num_free_bytes = _free_bytes(device)
    chosen = [c for c in cases(options.quick) if fits(c, options.quick, num_free_bytes)]
    rows: list[dict[str, Any]] = []
    repeats = options.repeats or (2 if options.quick else 5)
    num_measured = 0
    with Progress("cases", len(chosen)) as progress:
        for case in chosen:
            if options.minutes and time.perf_counter() - started > 60 * options.minutes:
                break
            rows += measure(case, device, repeats)
            num_measured += 1
            progress.advance()
    rates = {shape.name: options.prefill_tokens_per_s for shape in SHAPES}
    if not options.prefill_tokens_per_s:
        rates = prefill_rates(device) if device.type == "cuda" else {}
    result = summary(rows, device, rates)
    columns = ("variant", "shape", "page_size", "victims", "tokens", "direction", "gb_per_s")
    print(format_table(columns, [[row[key] for key in columns] for row in result["results"]]))
    num_cases = sum(1 for _ in cases(options.quick))
    left_out = {"for_memory": num_cases - len(chosen), "for_time": len(chosen) - num_measured}
    print_result(result | {"cases_left_out": left_out} | provenance(started))
    return int(any(row["variant"] in OURS for row in result["errors"]))


def _free_bytes(device: torch.device) -> int:
    """What may be used: host memory, and the device's if that is less."""
    host = int(psutil.virtual_memory().available)
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.swap", __doc__)
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--repeats", type=int, default=0, help="default: 2 with --quick, else 5")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no case after; 0: all")
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, default=0.0, help="of your model, for the break-even"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
