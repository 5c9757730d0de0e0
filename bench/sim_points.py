"""Measure a live engine's batches, for the simulator to be fitted to (`bench.sim --points`).

    python -m bench.sim_points --out points.json -- --max-running-requests 12
    python -m bench.sim_points --out points.json --base-url http://localhost:30000

Without `--base-url` it starts a server with the flags after `--`. The engine must have nothing
else to do. A decode step is timed as the difference between a batch that generates 33 tokens per
call and the same batch that generates one, over 32; a prefill batch as one token after a prompt of
so many tokens, which includes what any request costs. Every prompt is new, so nothing is cached.
Each point is the median of `--repeats` rounds.

The last line of stdout is one JSON object: the points, and how far the fit is from them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from bench.common import format_table, new_parser, print_result, provenance, say
from bench.server import ServerError, policy_servers, server_info
from bench.sim_device import Device, Point, attention_pairs, fitted

BATCHES: Final = (1, 2, 4, 8, 12)
CONTEXTS: Final = (16, 256)
PROMPTS: Final = (16, 64, 256, 512, 1024)
EXTRA_STEPS: Final = 32
TIMEOUT_S: Final = 120.0

Generate = Callable[[list[list[int]], int], float]
"""Generates so many tokens for each prompt, all in one batch; returns the seconds it took."""


def over_http(base_url: str) -> Generate:
    def generate(prompts: list[list[int]], num_output: int) -> float:
        sampling = {"temperature": 0, "max_new_tokens": num_output, "ignore_eos": True}
        body = json.dumps({"input_ids": prompts, "sampling_params": sampling}).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{base_url}/generate", body, headers)
        started = time.perf_counter()
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            response.read()
        return time.perf_counter() - started

    return generate


class Prober:
    """Times batches of fresh random prompts."""

    def __init__(self, generate: Generate, repeats: int, seed: int = 0) -> None:
        self._generate = generate
        self._repeats = repeats
        self._rng = random.Random(seed)

    def decode(self, batch: int, num_prompt: int) -> Point:
        """A decode step of `batch` calls, half way through the steps that are timed."""
        context = batch * (num_prompt + 1 + EXTRA_STEPS / 2)
        return Point(batch, context, median(self._rounds(lambda: self._step_s(batch, num_prompt))))

    def prefill(self, num_prompt: int) -> Point:
        """One prompt of this length, and its first token."""
        seconds = median(self._rounds(lambda: self._timed(1, num_prompt, 1)))
        return Point(num_prompt, attention_pairs(0, num_prompt), seconds)

    def _rounds(self, once: Callable[[], float]) -> list[float]:
        return [once() for _ in range(self._repeats)]

    def _step_s(self, batch: int, num_prompt: int) -> float:
        few = self._timed(batch, num_prompt, 1)
        many = self._timed(batch, num_prompt, 1 + EXTRA_STEPS)
        return (many - few) / EXTRA_STEPS

    def _timed(self, batch: int, num_prompt: int, num_output: int) -> float:
        prompts = [[self._rng.randrange(256) for _ in range(num_prompt)] for _ in range(batch)]
        return self._generate(prompts, num_output)


def measure(
    generate: Generate, repeats: int, max_batch: int, max_prompt: int
) -> tuple[list[Point], list[Point]]:
    """Decode and prefill points within what the engine takes; a first batch of each warms up."""
    prober = Prober(generate, repeats)
    batches = [batch for batch in BATCHES if batch <= max_batch]
    prober.decode(batches[-1], CONTEXTS[0])
    decode = [prober.decode(batch, context) for context in CONTEXTS for batch in batches]
    return decode, [prober.prefill(num) for num in PROMPTS if num <= max_prompt]


def errors(device: Device, decode: Sequence[Point], prefill: Sequence[Point]) -> list[float]:
    """The fit over each measured time, less one."""
    steps = [device.decode_time_s(int(p.count), int(p.reach)) / p.seconds - 1 for p in decode]
    return steps + [device.prefill_time_s(int(p.count), p.reach) / p.seconds - 1 for p in prefill]


def as_rows(points: Sequence[Point]) -> list[list[float]]:
    return [[point.count, point.reach, point.seconds] for point in points]


# --- command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = new_parser("bench.sim_points", __doc__)
    add = out.add_argument
    add("--out", type=Path, required=True, help="the file to write, for `bench.sim --points`")
    add("--base-url", help="a running server; without it one is started")
    add("--name", default="measured", help="what to call the device (default: %(default)s)")
    add("--repeats", type=int, default=3, help="default: %(default)s")
    add("--max-batch", type=int, default=12, help="calls in a batch (default: %(default)s)")
    add("--max-prompt", type=int, default=1024, help="longest prompt (default: %(default)s)")
    add("flags", nargs="*", help="flags for the server that is started")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    arguments = parser()
    options = arguments.parse_args(argv)
    with ExitStack() as stack:
        base_url = options.base_url
        if base_url is None:
            servers = stack.enter_context(policy_servers(["fcfs"], options.flags))
            base_url = servers["fcfs"].base_url
        try:
            kv_tokens = int(server_info(base_url)["max_total_num_tokens"])
        except (ServerError, KeyError) as error:
            arguments.error(f"{base_url} does not tell its KV size: {error}")
        say(f"measuring {base_url}")
        decode, prefill = measure(
            over_http(base_url), options.repeats, options.max_batch, options.max_prompt
        )
    points = {
        "name": options.name,
        "kv_tokens": kv_tokens,
        "decode": as_rows(decode),
        "prefill": as_rows(prefill),
    }
    options.out.write_text(json.dumps(points, indent=1) + "\n")
    return report(points, fitted(options.name, decode, prefill, kv_tokens), started)


def report(points: dict[str, Any], device: Device, started: float) -> int:
    decode, prefill = ([Point(*row) for row in points[key]] for key in ("decode", "prefill"))
    found = errors(device, decode, prefill)
    rows = [["decode", *row] for row in points["decode"]]
    rows += [["prefill", *row] for row in points["prefill"]]
    table = [[*row, error] for row, error in zip(rows, found, strict=True)]
    print(format_table(["batch", "count", "reach", "seconds", "fit error"], table))
    result = {**points, "mean_abs_fit_error": fmean(map(abs, found))}
    result["prefill_weight"] = device.prefill_weight
    print_result(result | provenance(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
