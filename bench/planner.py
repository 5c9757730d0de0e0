"""How long does a scheduler pass take when thousands of calls wait?

    python -m bench.planner --quick
    python -m bench.planner --waiting 4096 --running 256 --step-ms 20

A pass is what the engine's adapter does before each batch: ask for the plan, which looks for
victims in a full batch, and put the waiting queue into the plan's order. It is timed when nothing
changed since the pass before (`unchanged_ms`), and when every waiting call's key did
(`all_changed_ms`). Beside it `accounting_ms`: charging every running call for one decode step.
Medians; the numbers at the top are those of the slowest policy. What the engine does for a plan
(matching prefixes, releasing the KV of victims) is not in them.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from autellix_sglang.core.planner import Demand, Plan, Planner
from autellix_sglang.core.policy import POLICIES
from autellix_sglang.core.program import Call
from autellix_sglang.testing import PLENTY, table_from
from bench.common import format_table, new_parser, run_benchmark, say

BARS_MS: Final = {"unchanged_ms": 1.0, "all_changed_ms": 5.0}
CALLS_PER_PROGRAM: Final = 8
PREFILL: Final = 512  # tokens per waiting call, of a budget of 16,384
SEED: Final = 1


class FullEngine:
    """An engine whose batch is full, with a waiting queue of its own to keep in order."""

    free_slots = 0
    free_kv_tokens = PLENTY
    prefill_tokens = 16_384

    def __init__(self, policy: str, num_waiting: int, num_running: int) -> None:
        config = ProgramConfig(policy=policy, min_run=0, schedule_interval=1)
        rng = random.Random(SEED)
        self.table = table_from(config)
        self.planner = Planner(self.table, config.min_run, config.schedule_interval)
        num_calls = num_waiting + num_running
        calls = [
            self.table.open_call(str(i), program_id=f"p{i // CALLS_PER_PROGRAM}", handle=object())
            for i in range(num_calls)
        ]
        rng.shuffle(calls)
        self.running, waiting = calls[:num_running], calls[num_running:]
        for call in self.running:
            self.table.start(call)
        self.waiting_queue = [call.handle for call in waiting]
        for call in calls:
            self.table.charge(call, rng.expovariate(1 / 50))

    def preemptible(self) -> Sequence[Call]:
        return [call for call in self.running if call.handle is not None]

    def demand(self, call: Call, ahead: Sequence[Call]) -> Demand:
        return Demand(PREFILL, PREFILL)

    def holding(self, call: Call) -> int:
        return PREFILL

    def resume_steps(self, call: Call) -> float:
        return 1.0

    def run_pass(self) -> Plan:
        plan = self.planner.plan(self)
        if plan.order is not None:
            self.waiting_queue[:] = [call.handle for call in plan.order]
        return plan

    def account_step(self) -> None:
        for call in self.running:
            self.table.charge(call, 1.0)
        self.table.advance(1.0)

    def change_every_key(self, rng: random.Random) -> None:
        """Move waiting calls to other levels, and file all of them anew."""
        queue = self.table.queue
        for call in list(queue):
            self.table.charge(call, rng.expovariate(1 / 200))
        for call in list(queue):
            queue.touch(call)


def time_ms(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def measure(policy: str, num_waiting: int, num_running: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` engines, each with fresh calls."""
    rng = random.Random(SEED)
    unchanged: list[float] = []
    all_changed: list[float] = []
    accounting: list[float] = []
    for _ in range(repeats):
        engine = FullEngine(policy, num_waiting, num_running)
        engine.run_pass()
        engine.change_every_key(rng)
        engine.table.advance(1.0)  # or the planner would not consider preemption again
        all_changed.append(time_ms(engine.run_pass))
        for _ in range(5):
            engine.table.advance(1.0)
            unchanged.append(time_ms(engine.run_pass))
        accounting.extend(time_ms(engine.account_step) for _ in range(5))
    return {
        "unchanged_ms": round(median(unchanged), 4),
        "all_changed_ms": round(median(all_changed), 4),
        "accounting_ms": round(median(accounting), 4),
    }


def benchmark(num_waiting: int, num_running: int, repeats: int, step_ms: float) -> dict[str, Any]:
    """The result without its provenance."""
    policies = {}
    for policy in POLICIES:
        say(f"{policy}: {repeats} times {num_waiting} waiting and {num_running} running calls")
        policies[policy] = measure(policy, num_waiting, num_running, repeats)
    worst = {key: max(row[key] for row in policies.values()) for key in policies["fcfs"]}
    return {
        **worst,
        "waiting": num_waiting,
        "running": num_running,
        "step_ms": step_ms,
        "share_of_step": {key: round(value / step_ms, 4) for key, value in worst.items()},
        "within_bars": all(worst[key] <= bar for key, bar in BARS_MS.items()),
        "policies": policies,
    }


def table(result: Mapping[str, Any]) -> str:
    rows = [[policy, *row.values()] for policy, row in result["policies"].items()]
    return format_table(["policy", "unchanged ms", "all changed ms", "accounting ms"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = new_parser("bench.planner", __doc__)
    parser.add_argument("--quick", action="store_true", help="10 repeats in place of 50")
    parser.add_argument("--waiting", type=int, default=4096, help="default: %(default)s")
    parser.add_argument("--running", type=int, default=256, help="default: %(default)s")
    parser.add_argument(
        "--step-ms", type=float, default=20.0, help="decode step to compare with (%(default)s)"
    )

    def run(options: argparse.Namespace) -> dict[str, Any]:
        repeats = 10 if options.quick else 50
        return benchmark(options.waiting, options.running, repeats, options.step_ms)

    return run_benchmark(parser, argv, run, table)


if __name__ == "__main__":
    sys.exit(main())
