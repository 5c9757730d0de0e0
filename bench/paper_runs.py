"""The simulations behind `bench.paper`, each a `Cell`: a job, its arguments, and a JSON result.

A cell knows nothing of the figure that wants it, so several figures share one, and a long run can
be cut in pieces: what is done is on disk, and `--resume` goes on from there.

The paper's baseline "vLLM" is 0.6.1 without prefix caching. Here that is `vllm`: first come, first
served over the same programs, whose prompts nobody finds in a cache. Its "vLLM-opt" is `fcfs`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

from autellix_sglang.config import ProgramConfig
from bench import planner, synthetic
from bench.replay import poisson_arrivals
from bench.sim import Setup, at_rate, capacity, synthetic_plans
from bench.sim_device import KV_BYTES_PER_LAYER, LLAMA_8B, PRESETS
from bench.sim_engine import Blueprint, Kv, Scheduling, SimEngine, blueprint
from bench.sim_fleet import SimFleet
from bench.stats import (
    ProgramRecord,
    Run,
    distribution,
    prefix_hit_rate,
    tokens_per_s,
    wait_share,
)
from bench.trace import TraceProgram

VLLM: Final = "vllm"
DEVICE: Final = "a100-8b"
KV_TOKEN_BYTES: Final = KV_BYTES_PER_LAYER * LLAMA_8B.layers
PROMISED_BETA: Final = ProgramConfig().beta
BLOCK_TOKENS: Final = 16  # vLLM's KV block
NUM_SAMPLES: Final = 240  # of a curve over time

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One simulation to be done; equal cells give equal results."""

    job: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> str:
        return json.dumps([self.job, dict(self.arguments)])

    def compute(self) -> Result:
        return JOBS[self.job](**dict(self.arguments))


def cell(job: str, **arguments: Any) -> Cell:
    return Cell(job, tuple(sorted(arguments.items())))


# --- what is simulated --------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _plans(workload: str, device: str, slots: int, window_s: float, load: float) -> tuple[Any, ...]:
    """(load 1 in programs per second, blueprints, the same without a prefix cache)."""
    setup = Setup(device=PRESETS[device], num_slots=slots, window_s=window_s)
    plans = synthetic_plans(workload, setup, load)
    uncached = [blueprint(without_cache(plan.trace)) for plan in plans]
    return capacity(setup, plans), plans, uncached


def without_cache(program: TraceProgram) -> TraceProgram:
    """The same calls in the same order, every prompt being computed from its first token."""
    calls = [
        dataclasses.replace(
            call,
            new_tokens=call.prompt_tokens,
            shared_prefix_tokens=0,
            same_prompt_as=None,
            extends=None,
            parents=program.waits_for(call),
        )
        for call in program.calls
    ]
    return dataclasses.replace(program, calls=tuple(calls))


def _setup(device: str, slots: int, window_s: float, kv: str = "keep") -> Setup:
    return Setup(device=PRESETS[device], num_slots=slots, window_s=window_s, kv=Kv(kv))


def _scheduling(setup: Setup, policy: str) -> Scheduling:
    return setup.scheduling("fcfs" if policy == VLLM else policy)


class _Watched(SimEngine):
    """An engine that is looked at after every step."""

    look: Callable[[], None] = staticmethod(lambda: None)

    def step(self) -> None:
        super().step()
        self.look()


def _watched(setup: Setup, policy: str) -> _Watched:
    return _Watched(
        setup.device,
        _scheduling(setup, policy),
        num_slots=setup.num_slots,
        chunk_tokens=setup.chunk_tokens,
    )


# --- jobs ---------------------------------------------------------------------------------------


def load_run(
    workload: str, policy: str, load: float, minutes: float, slots: int, device: str, largest: float
) -> Result:
    """Latencies at one load. `largest` is the sweep's largest load: all its runs share programs."""
    window_s = 60 * minutes
    full, plans, uncached = _plans(workload, device, slots, window_s, largest)
    setup = _setup(device, slots, window_s)
    chosen = uncached if policy == VLLM else plans
    run = at_rate(setup, _scheduling(setup, policy), chosen, load * full)
    return {
        "rate": load * full,
        "latency_ms": distribution(p.token_latency_ms for p in run.programs),
        "response_s": distribution(p.response_s for p in run.programs),
        "wait_share": wait_share(run),
        "tokens_per_s": tokens_per_s(run),
        "programs": len(run.programs),
    }


def wait_run(
    workload: str, policy: str, load: float, minutes: float, slots: int, largest: float
) -> Result:
    """The wait share at a load that is relative to what this baseline itself can serve."""
    window_s = 60 * minutes
    _, plans, uncached = _plans(workload, DEVICE, slots, window_s, largest)
    setup = _setup(DEVICE, slots, window_s)
    chosen = uncached if policy == VLLM else plans
    run = at_rate(setup, _scheduling(setup, policy), chosen, load * capacity(setup, chosen))
    return {"wait_share": wait_share(run)}


def steady(policy: str, load: float, minutes: float, slots: int) -> Result:
    """Calls in the batch and in the engine over time, chat, arrivals at a steady rate."""
    window_s = 60 * minutes
    full, plans, uncached = _plans("chat", DEVICE, slots, window_s, load)
    setup = _setup(DEVICE, slots, window_s)
    engine = _watched(setup, policy)
    samples: list[tuple[float, int, int]] = []

    def look() -> None:
        samples.append((engine.now_s, slots - engine.free_slots, engine.table.num_live_calls))

    engine.look = look
    chosen = uncached if policy == VLLM else plans
    arrivals = [t for t in poisson_arrivals(len(chosen), load * full, 1) if t < window_s]
    engine.run(chosen[: len(arrivals)], arrivals)
    inside = [sample for sample in samples if sample[0] < window_s]
    every = max(1, len(inside) // NUM_SAMPLES)
    return {
        "running": _time_mean([(t, running) for t, running, _ in inside]),
        "live": _time_mean([(t, live) for t, _, live in inside]),
        "curve": [[t / 60, running, live] for t, running, live in inside[::every]],
        "rate": load * full,
    }


def _time_mean(samples: Sequence[tuple[float, float]]) -> float:
    """The mean over time of a value that holds until the next sample."""
    held = [(later - at) * value for (at, value), (later, _) in pairwise(samples)]
    return sum(held) / max(1e-9, samples[-1][0] - samples[0][0])


def waits(policy: str, load: float, minutes: float, slots: int) -> Result:
    """Waiting over executing, chat, by a program's decode steps and by its number of calls."""
    window_s = 60 * minutes
    full, plans, _ = _plans("chat", DEVICE, slots, window_s, load)
    setup = _setup(DEVICE, slots, window_s)
    run = at_rate(setup, _scheduling(setup, policy), plans, load * full)
    return {
        "by_steps": _wait_ratio(run, lambda p: p.generated_tokens),
        "by_calls": _wait_ratio(run, lambda p: len(p.calls)),
    }


def _wait_ratio(run: Run, size: Callable[[ProgramRecord], int]) -> list[list[float]]:
    """[geometric middle of a doubling of sizes, waiting over executing of its programs]."""
    groups: dict[int, list[ProgramRecord]] = {}
    for program in run.programs:
        groups.setdefault(int(math.log2(size(program))), []).append(program)
    found = []
    for group, programs in sorted(groups.items()):
        calls = [call for program in programs for call in program.calls]
        waiting = sum(call.queue_s or 0.0 for call in calls)
        running = sum(call.latency_s for call in calls) - waiting
        found.append([2 ** (group + 0.5), waiting / running])
    return found


def hits(workload: str, programs: int) -> Result:
    """Share of prompt tokens that another call brings into the cache, by prompt length."""
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for program in synthetic.corpora(workload, programs, 1)[0]:
        for call in program.calls:
            copied = call.prompt_tokens if call.same_prompt_as else 0
            own = max(call.reused_tokens, copied)
            group = int(math.log2(call.prompt_tokens))
            groups.setdefault(group, []).append(
                (call.prompt_tokens, own, call.shared_prefix_tokens)
            )
    rows = []
    for group, calls in sorted(groups.items()):
        length, own, shared = (sum(column) for column in zip(*calls, strict=True))
        rows.append([2 ** (group + 0.5), own / length, shared / length, len(calls)])
    return {"rows": rows}


def offline(policy: str, programs: int, slots: int) -> Result:
    """All chat programs at once, preempted KV going to the host: when is the last one done?"""
    plans = _generated("chat", programs)
    chosen = [blueprint(without_cache(p.trace)) for p in plans] if policy == VLLM else plans
    setup = _setup(DEVICE, slots, 0.0, kv="swap")
    engine = _watched(setup, policy)
    seen = {"step": 0, "host": 0}

    def look() -> None:
        seen["step"] += 1
        if seen["step"] % 256 == 0:
            held = sum(call.handle.num_on_host for call in engine.table.queue)
            seen["host"] = max(seen["host"], held)

    engine.look = look
    run = engine.run(chosen, [0.0] * programs)
    return {
        "makespan_s": engine.now_s,
        "response_s": statistics.fmean(p.response_s for p in run.programs),
        "preemptions": sum(call.preemptions or 0 for call in run.calls),
        "host_gb": seen["host"] * KV_TOKEN_BYTES / 1e9,
    }


@lru_cache(maxsize=8)
def _generated(workload: str, programs: int) -> list[Blueprint]:
    return [blueprint(program) for program in synthetic.generate(workload, programs, 1)]


def swap(policy: str, load: float, minutes: float, slots: int) -> Result:
    """What moves between GPU and host where every preempted call is swapped; mixed programs."""
    window_s = 60 * minutes
    full, plans, _ = _plans("mixed", DEVICE, slots, window_s, load)
    setup = _setup(DEVICE, slots, window_s, kv="swap")
    engine = _watched(setup, policy)
    arrivals = [t for t in poisson_arrivals(len(plans), load * full, 1) if t < window_s]
    run = engine.run(plans[: len(arrivals)], arrivals)
    waiting = [sum(call.queue_s or 0.0 for call in p.calls) for p in run.programs]
    total = [sum(call.latency_s for call in p.calls) for p in run.programs]
    copied_s = engine.num_copied * setup.device.copy_token_s
    return {
        "rate": load * full,
        "waiting_s": statistics.fmean(waiting),
        "executing_s": statistics.fmean(total) - statistics.fmean(waiting),
        "copying_s": copied_s / len(run.programs),
        "transfers": 2 * sum(call.preemptions or 0 for call in run.calls),
        "blocks": engine.num_copied / BLOCK_TOKENS,
        "copied_s": copied_s,
        "tokens_per_s": tokens_per_s(run),
        "makespan_s": engine.now_s,
    }


def starvation(workload: str, load: float, minutes: float, slots: int, beta: float) -> Result:
    """Per program that waited: [its service, what it waited in all] when it was owed most.

    Both in steps, under `plas`; `bound` are one quantum of each level. A program is owed what it
    waited over what `PROMISED_BETA` allows it at that moment.
    """
    window_s = 60 * minutes
    full, plans, _ = _plans(workload, DEVICE, slots, window_s, load)
    setup = _setup(DEVICE, slots, window_s)
    setup = dataclasses.replace(setup, config=setup.config.replace(policy="plas", beta=beta))
    engine = _watched(setup, "plas")
    table = engine.table
    levels = table.levels
    quanta = sum(levels.quantum_at(start) for start in (0.0, *levels.bounds))
    worst: dict[int, tuple[float, float, float]] = {}

    def look() -> None:
        for program in table.programs():
            if program.stalled_since is None:
                continue
            waited = program.stall_steps + table.clock - program.stalled_since
            service = max(program.service, levels.quantum)
            owed = waited / ((PROMISED_BETA + 1) * service + quanta)
            if waited and owed > worst.get(program.seq, (0.0,))[0]:
                worst[program.seq] = (owed, service, waited)

    engine.look = look
    arrivals = [t for t in poisson_arrivals(len(plans), load * full, 1) if t < window_s]
    engine.run(plans[: len(arrivals)], arrivals)
    return {
        "programs": len(arrivals),
        "points": [[service, waited] for _, service, waited in worst.values()],
        "worst": max((owed for owed, _, _ in worst.values()), default=0.0),
        "quanta": quanta,
        "promotions": table.counters.num_promotions,
        "late_s": engine.now_s - window_s,
    }


def scheduler_pass(policy: str, waiting: int, running: int, repeats: int) -> Result:
    """Milliseconds of a scheduler pass on this machine, measured by `bench.planner`."""
    return dict(planner.measure(policy, waiting, running, repeats))


def placement(
    router: str,
    policy: str,
    workload: str,
    replicas: int,
    load: float,
    minutes: float,
    slots: int,
    largest: float,
) -> Result:
    """Programs over many replicas (`bench.sim_fleet`), placed by the router's own function.

    `policy` is that of every replica's engine; `load` and `largest` are per replica.
    """
    window_s = 60 * minutes
    full, plans, _ = _plans(workload, DEVICE, slots, window_s, largest * replicas)
    setup = _setup(DEVICE, slots, window_s)
    rate = load * replicas * full
    arrivals = [t for t in poisson_arrivals(len(plans), rate, setup.seed) if t < window_s]
    fleet = SimFleet(router, replicas, setup.device, _scheduling(setup, policy), num_slots=slots)
    run = fleet.run(plans[: len(arrivals)], arrivals)
    return {
        "rate": rate,
        "latency_ms": distribution(p.token_latency_ms for p in run.programs),
        "wait_share": wait_share(run),
        "prefix_hit_rate": prefix_hit_rate(run),
        "balance": fleet.balance,
    }


JOBS: Final[dict[str, Callable[..., Result]]] = {
    job.__name__: job
    for job in (
        load_run, wait_run, steady, waits, hits, offline, swap, starvation, scheduler_pass,
        placement,
    )
}  # fmt: skip
