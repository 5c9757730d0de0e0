"""Is the simulator right? What `bench.sim_validate` found, for the page of `bench.paper`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from bench import charts, report
from bench.charts import Series
from bench.common import ROOT
from bench.stats import NO_QUEUE_WAIT_SHARE

RESULTS: Final = ROOT / "bench" / "results"
PATTERN: Final = "sim_validate*.json"
MEASURE: Final = "program_token_latency_ms"
STATISTICS: Final = ("mean", "p95")
HEADER: Final = (
    "trace", "load", "mean ms, live", "simulated", "error", "p95 ms, live", "simulated", "error",
    "within 15 %", "waiting, live", "simulated", "preempted, live", "simulated",
)  # fmt: skip


def load_results() -> list[dict[str, Any]]:
    """The validations that were saved, by load."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(PATTERN))]
    return sorted(found, key=lambda result: bool(result["load"] > 1))


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """A sentence, a chart and a table; markup. Empty where nothing was validated."""
    if not results:
        return ""
    errors = [
        result["errors"][trace][MEASURE][statistic]
        for result in results
        for trace in result["errors"]
        for statistic in STATISTICS
    ]
    within = [ok for result in results for ok in result["within"].values()]
    waits = [result["live"][trace]["wait_share"] for result in results for trace in result["live"]]
    queued = sum(share >= NO_QUEUE_WAIT_SHARE for share in waits)
    answer = (
        f"{sum(within)} of {len(within)} runs on the live engine are met within 15 % in mean and"
        f" p95 of the time per token; the largest error is {100 * max(map(abs, errors)):.0f} %. In"
        f" {queued} of them calls waited in the live engine's queue for more than"
        f" {100 * NO_QUEUE_WAIT_SHARE:.0f} % of their time."
    )
    remark = (
        "The same programs, arrivals, policy and settings, once on the real CPU engine with the"
        " tiny model (8 slots, two cores) and once simulated. Step times are measured on that"
        " engine just before and after, nothing is fitted to the runs. Load is of the capacity that"
        " the simulator reckons; programs are so few that most runs have hardly a queue, even above"
        " 1. Those validate the time that steps take, and not the order of calls, of which the runs"
        " with a queue say something, and preemption next to nothing. What this cannot show is"
        " whether the presets of GPUs are right: they come from data sheets."
    )
    return report.section(
        "First: is the simulator right?",
        "validation",
        f'<p class="answer">{escape(answer)}</p>'
        + report.legend([("p0", "live"), ("p1", "simulated")])
        + _chart("mean", results)
        + report.table(HEADER, [row for result in results for row in _rows(result)])
        + report.caption(escape(remark)),
    )


def _chart(statistic: str, results: Sequence[Mapping[str, Any]]) -> str:
    runs = [(result, trace) for result in results for trace in result["errors"]]
    return charts.bars(
        f"{statistic.capitalize()} program token latency, by trace and load",
        [f"{_short(trace)} {result['load']:g}" for result, trace in runs],
        [
            Series(
                side,
                css,
                [(i, r[side][trace][MEASURE][statistic]) for i, (r, trace) in enumerate(runs)],
            )
            for side, css in (("live", "p0"), ("simulated", "p1"))
        ],
        "ms per token",
        width=960,
    )


def _short(trace: str) -> str:
    return trace.split("_")[0]


def _rows(result: Mapping[str, Any]) -> list[list[object]]:
    return [
        [
            trace,
            f"{result['load']:g}",
            *(
                cell
                for statistic in STATISTICS
                for cell in (
                    result["live"][trace][MEASURE][statistic],
                    result["simulated"][trace][MEASURE][statistic],
                    f"{100 * result['errors'][trace][MEASURE][statistic]:+.0f} %",
                )
            ),
            "yes" if result["within"][trace] else "no",
            *(
                result[side][trace][key]
                for key in ("wait_share", "preemptions")
                for side in ("live", "simulated")
            ),
        ]
        for trace in result["errors"]
    ]
