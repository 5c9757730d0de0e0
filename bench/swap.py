"""How fast does KV move between the engine's pool and host memory, and when is that worth it?

    python -m bench.swap --quick
    python -m bench.swap --prefill-tokens-per-s 12000

For each shape, page size and number of victims the rows of all layers go out and come back. GB/s
count the rows' bytes, once. On a CUDA device:

    ceiling        one pinned cudaMemcpyAsync of as many contiguous bytes
    direct         our kernel on mapped pinned memory
    staged         our kernel into a buffer on the device, then bulk copies
    per block      one copy per page and buffer, as vLLM 0.6 swapped
    get_cpu_copy   SGLang's MHATokenToKVPool.get_cpu_copy and load_cpu_copy

On a CPU there is no link: `reference` (plain torch) is set against `naive loop`, one copy per token
and buffer, and `ceiling` is one memory copy. `break_even_tokens` is the length from which moving a
call out and in takes less time than computing it again at `--prefill-tokens-per-s`, by a straight
line through the times of one victim; 0 is always, null never or rate not given.

The last line of stdout is one JSON object (DESIGN section 11).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch

from autellix_sglang.engine.swap_op import HostChunk, KVPool, Mover, mover_for, swap_in, swap_out
from bench.common import Progress, format_table, new_parser, print_result, provenance, say

Move = Callable[[], object]
MAX_SMALL_COPIES: Final = 100_000  # of one measurement by a variant that copies piece by piece
QUICK_BYTES: Final = 128 * 2**20
MEMORY_SHARE: Final = 0.25  # of what is free, for one case: its pool, its chunk and the copies


@dataclass(frozen=True, slots=True)
class Shape:
    """KV of one rank of a model; `is_mla` has one buffer per layer, in place of K and V."""

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    is_mla: bool = False

    @property
    def num_buffers(self) -> int:
        return self.num_layers * (1 if self.is_mla else 2)

    @property
    def token_bytes(self) -> int:
        return self.num_buffers * self.num_heads * self.head_dim * 2  # bfloat16


SHAPES: Final = (
    Shape("llama-3.1-8b", 32, 8, 128),
    Shape("llama-3.1-70b/tp4", 80, 2, 128),
    Shape("deepseek-v3", 61, 1, 576, is_mla=True),
)


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


def cases(is_quick: bool, num_free_bytes: int) -> Iterator[Case]:
    """All combinations that fit into memory; with `is_quick` few of them, and small ones."""
    limit = num_free_bytes * MEMORY_SHARE / 4  # pool, chunk, and the copies of other variants
    limit = min(limit, QUICK_BYTES) if is_quick else limit
    victims = (1, 8) if is_quick else (1, 4, 16, 64)
    tokens = (128, 512) if is_quick else (128, 512, 2048, 8192, 32768)
    for shape in SHAPES:
        for page_size in (1, 64) if is_quick else (1, 16, 64):
            for num_victims in victims:
                for num_tokens in tokens:
                    case = Case(shape, page_size, num_victims, num_tokens)
                    if case.num_bytes <= limit:
                        yield case


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

    def variants(self) -> dict[str, tuple[Move, Move]]:
        """(out, in) of each way to move it on this device."""
        found = {"ceiling": self._bulk()}
        if self.device.type == "cuda":
            from autellix_sglang.engine.swap_kernel import kernel_mover

            found["direct"] = self._ours(kernel_mover(self.device, is_staged=False))
            found["staged"] = self._ours(kernel_mover(self.device, is_staged=True))
            if not self.case.shape.is_mla:
                found["get_cpu_copy"] = self._by_sglang()
        else:
            found["reference"] = self._ours(mover_for(self.pool))
        is_gpu = self.device.type == "cuda"
        piece = self.case.page_size if is_gpu else 1
        if len(self.slots) // piece * len(self.pool.buffers) <= MAX_SMALL_COPIES:
            found["per block" if is_gpu else "naive loop"] = self._small(piece)
        return found

    def _ours(self, mover: Mover) -> tuple[Move, Move]:
        def move_out() -> None:
            swap_out(self.pool, self.slots, self.chunk, mover=mover, is_checked=True)

        def move_in() -> None:
            swap_in(self.chunk, self.pool, self.slots, mover=mover, is_checked=True)

        return move_out, move_in

    def _bulk(self) -> tuple[Move, Move]:
        storage = self.chunk.storage
        packed = torch.empty(storage.shape, dtype=torch.uint8, device=self.device)
        return (
            lambda: storage.copy_(packed, non_blocking=True),
            lambda: packed.copy_(storage, non_blocking=True),
        )

    def _small(self, piece: int) -> tuple[Move, Move]:
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

        return (lambda: move(True)), (lambda: move(False))

    def _by_sglang(self) -> tuple[Move, Move]:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        shape, case = self.case.shape, self.case
        theirs = MHATokenToKVPool(
            self.pool.num_slots, case.page_size, torch.bfloat16, shape.num_heads, shape.head_dim,
            shape.num_layers, str(self.device), False,
        )  # fmt: skip
        copied: list[Any] = [theirs.get_cpu_copy(self.slots)]

        def move_out() -> None:
            copied[0] = theirs.get_cpu_copy(self.slots)

        return move_out, lambda: theirs.load_cpu_copy(copied[0], self.slots)


def seconds(move: Move, device: torch.device, repeats: int) -> float:
    """Median time of a move until its bytes are there, after one that does not count."""
    times = []
    for i in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        move()
        _wait(device)
        if i:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(case: Case, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per variant and direction."""
    workload = Workload(case, device)
    rows = []
    for variant, moves in workload.variants().items():
        for direction, move in zip(("out", "in"), moves, strict=True):
            taken = seconds(move, device, repeats)
            rows.append(
                {
                    "variant": variant,
                    "shape": case.shape.name,
                    "page_size": case.page_size,
                    "victims": case.num_victims,
                    "tokens": case.num_tokens,
                    "direction": direction,
                    "seconds": round(taken, 6),
                    "gb_per_s": round(case.num_bytes / taken / 1e9, 3),
                }
            )
    return rows


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


def break_evens(rows: Sequence[dict[str, Any]], variant: str, rate: float) -> dict[str, int | None]:
    """Per shape, for one victim at the smallest page size."""
    found: dict[str, int | None] = {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        times: dict[int, float] = {}
        for row in rows:
            key = (row["variant"], row["shape"], row["victims"], row["page_size"])
            if key == (variant, shape, 1, 1):
                times[row["tokens"]] = times.get(row["tokens"], 0.0) + row["seconds"]
        found[shape] = break_even(times, rate)
    return found


def summary(rows: Sequence[dict[str, Any]], device: torch.device, rate: float) -> dict[str, Any]:
    """The result without its provenance."""
    ceiling = max(row["gb_per_s"] for row in rows if row["variant"] == "ceiling")
    variant = "staged" if device.type == "cuda" else "reference"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "note": None if device.type == "cuda" else "no GPU: reference against a naive loop",
        "ceiling_gb_per_s": ceiling,
        "break_even_tokens": break_evens(rows, variant, rate),
        "prefill_tokens_per_s": rate or None,
        "results": list(rows),
    }


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = _parser().parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        say("no GPU: this measures the plain-torch reference against a naive loop, no link")
    chosen = list(cases(options.quick, _free_bytes(device)))
    rows: list[dict[str, Any]] = []
    repeats = options.repeats or (2 if options.quick else 5)
    with Progress("cases", len(chosen)) as progress:
        for case in chosen:
            rows += measure(case, device, repeats)
            progress.advance()
    columns = ("variant", "shape", "page_size", "victims", "tokens", "direction", "gb_per_s")
    print(format_table(columns, [[row[key] for key in columns] for row in rows]))
    result = summary(rows, device, options.prefill_tokens_per_s)
    print_result(result | provenance(started))
    return 0


def _free_bytes(device: torch.device) -> int:
    """What may be used: host memory, and the device's if that is less."""
    host = int(psutil.virtual_memory().available)
    return min(host, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.swap", __doc__)
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--repeats", type=int, default=0, help="default: 2 with --quick, else 5")
    parser.add_argument(
        "--prefill-tokens-per-s", type=float, default=0.0, help="of your model, for the break-even"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
