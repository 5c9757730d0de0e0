"""Measure a live engine's batches, for the simulator to be fitted to (`bench.sim --points`).

    python -m bench.sim_points --out points.json -- --max-running-requests 12
    python -m bench.sim_points --out points.json --base-url http://localhost:30000

Without `--base-url` it starts a server with the flags after `--`. The engine must have nothing
else to do. A decode step is timed as the difference between a batch that generates 33 tokens per
call and the same batch that generates one, over 32. A prefill batch is timed as one token after a
prompt of so many new tokens, or of some that an earlier prompt has left in the cache and some new
ones; that is all that a lone call costs, HTTP and client included. Which part of it is in the
engine's way is seen on an engine that is busy: how much later does a batch that decodes end for
each short call that comes and goes meanwhile? Every point is the median of `--repeats` rounds.

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from bench.common import format_table, new_parser, print_result, provenance, say
from bench.server import ServerError, policy_servers, server_info
from bench.sim_device import Device, Point, attention_pairs, fitted

BATCHES: Final = (1, 2, 4, 8, 12)
CONTEXTS: Final = (16, 1024)
PROMPTS: Final = (  # tokens in the cache, new tokens
    *((0, new) for new in (16, 64, 256, 512, 1024)),
    *((cached, new) for cached in (256, 512, 1024) for new in (16, 128)),
)
BUSY_CALLS: Final = 4  # that decode while short calls come and go
BUSY_STEPS: Final = 96
SHORT_PROMPT: Final = 16
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


@dataclass(frozen=True, slots=True)
class Points:
    """Measured batches: decode steps, lone calls, and a short call's cost to a busy engine."""

    decode: tuple[Point, ...]
    lone: tuple[Point, ...]
    short: Point

    def device(self, name: str, kv_tokens: int) -> Device:
        return fitted(name, self.decode, self.lone, kv_tokens, self.short)

    def as_json(self) -> dict[str, Any]:
        """The keys that `bench.sim_device.load_device` reads."""
        return {
            "decode": _rows(self.decode),
            "prefill": _rows(self.lone),
            "short": _rows([self.short])[0],
        }


def _rows(points: Sequence[Point]) -> list[list[float]]:
    return [[point.count, point.reach, point.seconds, point.cached] for point in points]


class Prober:
    """Times batches of fresh random prompts: all that the engine takes, once per round."""

    def __init__(
        self, generate: Generate, max_batch: int, max_prompt: int, *, seed: int = 0
    ) -> None:
        self._generate = generate
        self._rng = random.Random(seed)
        self._batches = [batch for batch in BATCHES if batch <= max_batch]
        self._contexts = [context for context in CONTEXTS if context <= max_prompt]
        self._lone = [(cached, new) for cached, new in PROMPTS if cached + new <= max_prompt]
        self._busy_calls = max(1, min(BUSY_CALLS, max_batch - 1))
        self._decode(self._batches[-1], CONTEXTS[0])  # warms up

    def round(self) -> Points:
        return Points(
            tuple(self._decode(b, context) for context in self._contexts for b in self._batches),
            tuple(self._prefill(cached, new) for cached, new in self._lone),
            self._short(),
        )

    def _decode(self, batch: int, num_prompt: int) -> Point:
        """A decode step of `batch` calls, half way through the steps that are timed."""
        few = self._generate(self._prompts(batch, num_prompt), 1)
        many = self._generate(self._prompts(batch, num_prompt), 1 + EXTRA_STEPS)
        context = batch * (num_prompt + 1 + EXTRA_STEPS / 2)
        return Point(batch, context, (many - few) / EXTRA_STEPS)

    def _prefill(self, num_cached: int, num_new: int) -> Point:
        """One prompt with so many new tokens after cached ones, and its first token."""
        (cached,) = self._prompts(1, num_cached)
        if cached:
            self._generate([cached], 1)
        (new,) = self._prompts(1, num_new)
        seconds = self._generate([cached + new], 1)
        pairs = attention_pairs(num_cached, num_new)
        return Point(num_new, pairs, seconds, attention_pairs(0, num_cached))

    def _short(self) -> Point:
        """What each short call adds to the time of a batch that decodes."""
        undisturbed = self._generate(self._busy(), BUSY_STEPS)
        num_calls = 0
        with ThreadPoolExecutor(1) as pool:
            disturbed = pool.submit(self._generate, self._busy(), BUSY_STEPS)
            while not disturbed.done():
                self._generate(self._prompts(1, SHORT_PROMPT), 1)
                num_calls += 1
        seconds = max(0.0, disturbed.result() - undisturbed) / max(1, num_calls)
        return Point(SHORT_PROMPT, attention_pairs(0, SHORT_PROMPT), seconds)

    def _busy(self) -> list[list[int]]:
        return self._prompts(self._busy_calls, SHORT_PROMPT)

    def _prompts(self, batch: int, num_tokens: int) -> list[list[int]]:
        return [[self._rng.randrange(256) for _ in range(num_tokens)] for _ in range(batch)]


def medians(rounds: Sequence[Points]) -> Points:
    """Every point of several rounds with its median time."""

    def middle(points: Sequence[Point]) -> Point:
        return replace(points[0], seconds=median(point.seconds for point in points))

    return Points(
        tuple(middle(points) for points in zip(*(r.decode for r in rounds), strict=True)),
        tuple(middle(points) for points in zip(*(r.lone for r in rounds), strict=True)),
        middle([r.short for r in rounds]),
    )


def measure(generate: Generate, repeats: int, max_batch: int, max_prompt: int) -> Points:
    """All points within what the engine takes."""
    prober = Prober(generate, max_batch, max_prompt)
    return medians([prober.round() for _ in range(repeats)])


def errors(device: Device, points: Points) -> list[float]:
    """The fit over each measured time, less one."""
    pairs = [
        *((p, device.decode_time_s(int(p.count), int(p.reach))) for p in points.decode),
        *((p, device.call_s + _prefill_time_s(device, p)) for p in points.lone),
        (points.short, _prefill_time_s(device, points.short)),
    ]
    return [seconds / point.seconds - 1 if point.seconds else 0.0 for point, seconds in pairs]


def _prefill_time_s(device: Device, point: Point) -> float:
    return device.prefill_time_s(int(point.count), point.reach, point.cached)


# --- command line -------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = new_parser("bench.sim_points", __doc__)
    add = out.add_argument
    add("--out", type=Path, required=True, help="the file to write, for `bench.sim --points`")
    add("--base-url", help="a running server; without it one is started")
    add("--name", default="measured", help="what to call the device (default: %(default)s)")
    add("--repeats", type=int, default=3, help="default: %(default)s")
    add("--max-batch", type=int, default=12, help="calls in a batch (default: %(default)s)")
    add("--max-prompt", type=int, default=1280, help="longest prompt (default: %(default)s)")
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
        points = measure(
            over_http(base_url), options.repeats, options.max_batch, options.max_prompt
        )
    result = {"name": options.name, "kv_tokens": kv_tokens, **points.as_json()}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return report(result, points, points.device(options.name, kv_tokens), started)


def report(result: dict[str, Any], points: Points, device: Device, started: float) -> int:
    found = errors(device, points)
    rows = [["decode", *row] for row in result["decode"]]
    rows += [["lone call", *row] for row in result["prefill"]]
    rows += [["short call, busy engine", *result["short"]]]
    table = [[*row, error] for row, error in zip(rows, found, strict=True)]
    print(format_table(["batch", "count", "reach", "seconds", "cached", "fit error"], table))
    fit = {
        "mean_abs_fit_error": fmean(map(abs, found)),
        "prefill_weight": device.prefill_weight,
        "call_s": device.call_s,
    }
    print_result(result | fit | provenance(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
