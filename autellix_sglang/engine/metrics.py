"""Prometheus series about programs, among SGLang's own at `/metrics` (`--enable-metrics`).

One scheduler process writes them, once a second at most, from what `GET /program_stats` shows. No
series has a program in its labels: their number would grow with traffic. What a single program
does is in `GET /v1/programs/{id}`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from autellix_sglang.core.program import ProgramTable
from autellix_sglang.engine import control

if TYPE_CHECKING:
    from autellix_sglang.engine.scheduler import ProgramScheduler

INTERVAL_S: Final = 1.0
PREFIX: Final = "autellix:"
# Name of the series: (key of /program_stats, help).
COUNTERS: Final = {
    "programs_seen": ("num_programs", "Programs that arrived."),
    "calls": ("num_calls", "Calls that arrived."),
    "finished_calls": ("num_finished", "Calls that ended, however they did."),
    "preemptions": ("num_preemptions", "Times a running call was put back into the queue."),
    "promotions": ("num_promotions", "Times a call of a starving program went ahead."),
    "demotions": ("num_demotions", "Times a call went down a level."),
    "expired_programs": ("num_expired", "Programs forgotten for being idle."),
    "recomputed_tokens": ("recomputed_tokens", "Tokens prefilled again after a preemption."),
    "prefix_waits": ("prefix_waits", "Calls that waited for a prefix being computed."),
    "retracted_calls": ("retracted_calls", "Calls that SGLang took off for lack of KV."),
    "orphaned_calls": ("orphaned_calls", "Calls that left the engine unseen; a bug if not 0."),
    "swapped_out_tokens": ("swapped_out_tokens", "Tokens whose KV was copied to the host."),
    "swapped_in_tokens": ("swapped_in_tokens", "Tokens whose KV was copied back."),
    "swaps_refused": ("dropped_for_full_pool", "Victims that the host pool had no room for."),
}
GAUGES: Final = {
    "programs": ("programs", "Programs that are remembered."),
    "live_calls": ("live_calls", "Calls waiting or running."),
    "kv_loss_share": ("kv_loss_share", "Share of preempted calls' KV that is lost on resumption."),
    "swapped_calls": ("swapped_calls", "Calls whose KV is in host memory."),
    "host_pool_bytes": ("host_pool_bytes", "Host memory for swapped KV."),
    "host_pool_used_bytes": ("host_pool_used_bytes", "Of it, in use."),
}
WAITING: Final = "waiting_calls"
MAX_STALL: Final = "max_stall_ratio"


class ProgramMetrics:
    """The series of one scheduler. `labels` are those of SGLang's own series."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        # Not before SGLang has said where its processes leave their numbers.
        import prometheus_client as prometheus

        def gauge(name: str, text: str, *more: str) -> Any:
            return prometheus.Gauge(
                PREFIX + name, text, [*labels, *more], multiprocess_mode="mostrecent"
            )

        self._labels = dict(labels)
        self._counters = {
            key: prometheus.Counter(PREFIX + name, text, list(labels)).labels(**labels)
            for name, (key, text) in COUNTERS.items()
        }
        self._gauges = {
            key: gauge(name, text).labels(**labels) for name, (key, text) in GAUGES.items()
        }
        self._waiting = gauge(WAITING, "Calls in the queue, by level.", "level")
        self._max_stall = gauge(
            MAX_STALL, "Waiting over service, of the waiting program that has most of it."
        ).labels(**labels)
        self._counted: dict[str, float] = dict.fromkeys(self._counters, 0)
        self._num_levels = 0
        self._next_s = 0.0

    def update(self, scheduler: ProgramScheduler) -> None:
        """Write what has changed, unless that was done within `INTERVAL_S`."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            return
        self._next_s = now_s + INTERVAL_S
        totals = control.totals(scheduler)
        for key, counter in self._counters.items():
            counter.inc(totals[key] - self._counted[key])
            self._counted[key] = totals[key]
        for key, gauge in self._gauges.items():
            gauge.set(totals[key])
        table = scheduler.program_table
        by_level = Counter(call.level for call in table.queue)
        self._num_levels = max(self._num_levels, table.levels.count)  # none keeps an old value
        for level in range(self._num_levels):
            self._waiting.labels(**self._labels, level=level).set(by_level[level])
        self._max_stall.set(max_stall_ratio(table))


def max_stall_ratio(table: ProgramTable) -> float:
    """The largest `ProgramTable.stall_ratio` of a waiting program, 0 where none waits."""
    programs = {call.program for call in table.queue}
    return max((table.stall_ratio(program) for program in programs), default=0.0)
