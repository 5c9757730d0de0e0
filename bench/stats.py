"""What a replay measured, and the numbers we make of it. Pure functions, standard library only.

Times are seconds since the start of the run. Definitions:

- response time of a program: arrival to last completion.
- token latency of a program: response time over the tokens it generated, all threads together (the
  paper's metric), in milliseconds.
- wait share of a program: the part of its LLM time (sum over calls, issue to finish) that its
  calls spent in the engine's queue. Known only where the server reports queueing time.
- A program of which any call failed has no response time; its calls count as lost.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

Distribution = dict[str, float | None]


class Outcome(Enum):
    """How a call ended. Every call of a trace ends as one of these."""

    OK = "ok"
    ERROR = "error"
    NOT_ISSUED = "not issued"


@dataclass(frozen=True, slots=True)
class ServerProgramInfo:
    """`meta_info["program"]` of one call; None where the server did not say."""

    queue_steps: float | None = None
    service_steps: float | None = None
    level: int | None = None
    preemptions: int | None = None
    promotions: int | None = None


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call of a run. `queue_s` is the engine's own account of queueing; None if not given."""

    call_id: str
    outcome: Outcome
    error: str | None = None
    issue_s: float | None = None
    first_token_s: float | None = None
    finish_s: float | None = None
    num_output: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    e2e_s: float | None = None
    queue_s: float | None = None
    retractions: int | None = None
    server: ServerProgramInfo | None = None
    output_hash: str | None = None

    @property
    def is_ok(self) -> bool:
        return self.outcome is Outcome.OK

    @property
    def preemptions(self) -> int | None:
        """Times the call was taken off the running batch, by our policy or by SGLang's own."""
        if self.server is not None and self.server.preemptions is not None:
            return self.server.preemptions
        return self.retractions

    @property
    def span(self) -> tuple[float, float]:
        """Issue and finish of a completed call."""
        assert self.issue_s is not None
        assert self.finish_s is not None
        return self.issue_s, self.finish_s

    @property
    def latency_s(self) -> float:
        issue, finish = self.span
        return finish - issue


@dataclass(frozen=True, slots=True)
class ProgramRecord:
    """One program of a run; `start_s` is when the client really began it (see `lateness_s`)."""

    program_id: str
    kind: str
    arrival_s: float
    start_s: float
    calls: tuple[CallRecord, ...]

    @property
    def is_complete(self) -> bool:
        return all(call.is_ok for call in self.calls)

    @property
    def generated_tokens(self) -> int:
        return sum(call.num_output for call in self.calls)

    @property
    def response_s(self) -> float:
        return max(call.span[1] for call in self.calls) - self.arrival_s

    @property
    def token_latency_ms(self) -> float:
        return 1e3 * self.response_s / max(1, self.generated_tokens)

    @property
    def wait_share(self) -> float | None:
        waits = [call.queue_s for call in self.calls if call.queue_s is not None]
        total = sum(call.latency_s for call in self.calls)
        if len(waits) < len(self.calls) or total <= 0:
            return None
        return sum(waits) / total


@dataclass(frozen=True, slots=True)
class Run:
    """One replay of a workload against one server, programs in the order of the workload.

    `foreign_cores` is how many cores other processes used meanwhile; None if not measured.
    """

    policy: str
    programs: tuple[ProgramRecord, ...]
    output_hash: str
    foreign_cores: float | None = None

    @property
    def calls(self) -> list[CallRecord]:
        return [call for program in self.programs for call in program.calls]

    @property
    def complete(self) -> list[ProgramRecord]:
        return [program for program in self.programs if program.is_complete]


# --- distributions ------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(values: Iterable[float]) -> Distribution:
    """Mean and percentiles; all None where there are no values."""
    known = list(values)
    if not known:
        return {"mean": None, "p50": None, "p95": None, "p99": None}
    return {
        "mean": statistics.fmean(known),
        "p50": percentile(known, 0.50),
        "p95": percentile(known, 0.95),
        "p99": percentile(known, 0.99),
    }


def ratio(value: float | None, baseline: float | None) -> float | None:
    """`value / baseline`, None where either is unknown or the baseline is 0."""
    return value / baseline if value is not None and baseline else None


def median(values: Iterable[float | None]) -> float | None:
    """The median of the known values; None where none is known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# --- throughput ---------------------------------------------------------------------------------


def completed_spans(run: Run) -> list[tuple[float, float]]:
    return [call.span for call in run.calls if call.is_ok]


def covered_s(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of time spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def tokens_per_s(run: Run) -> float | None:
    """Generated tokens over the time from the first issue to the last completion."""
    spans = completed_spans(run)
    if not spans:
        return None
    wall = max(stop for _, stop in spans) - min(start for start, _ in spans)
    return ratio(sum(call.num_output for call in run.calls), wall)


def busy_tokens_per_s(run: Run) -> float | None:
    """Generated tokens over the time in which at least one call was queued or running."""
    generated = sum(call.num_output for call in run.calls)
    return ratio(generated, covered_s(completed_spans(run)))


def steady_tokens_per_s(run: Run) -> float | None:
    """Tokens per second while programs were still arriving (first to last arrival).

    The ramp-down after the last arrival, when the batch runs empty, is left out. A call's tokens
    are spread evenly over its time on the engine, as a non-streaming client cannot see more.
    """
    arrivals = [program.arrival_s for program in run.programs]
    begin, end = min(arrivals, default=0.0), max(arrivals, default=0.0)
    produced = sum(_tokens_within(call, begin, end) for call in run.calls if call.is_ok)
    return ratio(produced, end - begin)


def _tokens_within(call: CallRecord, begin: float, end: float) -> float:
    issue, finish = call.span
    start = min(issue + (call.queue_s or 0.0), finish)
    if finish <= start:
        return call.num_output if begin <= finish <= end else 0.0
    overlap = max(0.0, min(finish, end) - max(start, begin))
    return call.num_output * overlap / (finish - start)


# --- cache, waiting, losses ---------------------------------------------------------------------


def prefix_hit_rate(run: Run) -> float | None:
    """Cached prompt tokens over prompt tokens of completed calls."""
    done = [call for call in run.calls if call.is_ok]
    return ratio(sum(c.cached_tokens for c in done), sum(c.prompt_tokens for c in done))


def wait_share(run: Run) -> float | None:
    """Mean over programs of their wait share; None unless the server reports queueing time."""
    shares = [program.wait_share for program in run.complete]
    known = [share for share in shares if share is not None]
    return statistics.fmean(known) if known and len(known) == len(shares) else None


def preemptions(run: Run) -> int | None:
    """Times any call was taken off the running batch; None where no call reports it."""
    known = [call.preemptions for call in run.calls if call.preemptions is not None]
    return sum(known) if known else None


def promotions(run: Run) -> int | None:
    """Starvation promotions; None where no call reports them."""
    known = [c.server.promotions for c in run.calls if c.server is not None]
    told = [count for count in known if count is not None]
    return sum(told) if told else None


def errors(run: Run) -> dict[str, int]:
    """How often each error text occurred."""
    counts: dict[str, int] = {}
    for call in run.calls:
        if call.error is not None:
            counts[call.error] = counts.get(call.error, 0) + 1
    return counts


def lateness_s(run: Run) -> float:
    """How far the client itself fell behind the arrival times, at worst."""
    return max((p.start_s - p.arrival_s for p in run.programs), default=0.0)


# --- one run, many runs -------------------------------------------------------------------------


def summarize(run: Run) -> dict[str, object]:
    """The numbers of one run, with the keys that every benchmark shares and a few more."""
    calls = run.calls
    done = [call for call in calls if call.is_ok]
    first = [c.first_token_s - c.span[0] for c in done if c.first_token_s is not None]
    return {
        "policy": run.policy,
        "program_token_latency_ms": distribution(p.token_latency_ms for p in run.complete),
        "program_response_s": distribution(p.response_s for p in run.complete),
        "call_latency_s": distribution(call.latency_s for call in done),
        "time_to_first_token_s": distribution(first) if first else None,
        "engine_tokens_per_s": tokens_per_s(run),
        "busy_tokens_per_s": busy_tokens_per_s(run),
        "steady_tokens_per_s": steady_tokens_per_s(run),
        "preemptions": preemptions(run),
        "promotions": promotions(run),
        "prefix_hit_rate": prefix_hit_rate(run),
        "wait_share": wait_share(run),
        "programs": len(run.programs),
        "calls": len(calls),
        "generated_tokens": sum(call.num_output for call in calls),
        "lost": len(calls) - len(done),
        "errors": errors(run),
        "output_hash": run.output_hash,
        "client_late_s": lateness_s(run),
        "foreign_cores": run.foreign_cores,
    }


def combine(summaries: Sequence[dict[str, object]]) -> dict[str, object]:
    """One summary of several repeats: medians of measurements, sums of losses and errors."""
    first = summaries[0]
    merged = {key: _merge(key, [s[key] for s in summaries]) for key in first}
    hashes = {str(summary["output_hash"]) for summary in summaries}
    merged["output_hash"] = first["output_hash"] if len(hashes) == 1 else None
    merged["repeats"] = len(summaries)
    return merged


def _merge(key: str, values: list[object]) -> object:
    if key == "lost":
        return sum(value for value in values if isinstance(value, int))
    if key == "errors":
        return _sum_counts([value for value in values if isinstance(value, dict)])
    dicts = [value for value in values if isinstance(value, dict)]
    if dicts:
        return {name: median(d.get(name) for d in dicts) for name in dicts[0]}
    if all(value is None or isinstance(value, int | float) for value in values):
        return median(value for value in values if isinstance(value, int | float))
    return values[0]


def _sum_counts(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


# --- who gains, who pays ------------------------------------------------------------------------

Measure = Callable[[ProgramRecord], float]


def _response(program: ProgramRecord) -> float:
    return program.response_s


def by_size(
    runs: Sequence[Run], baselines: Sequence[Run], groups: int = 10, measure: Measure = _response
) -> list[float | None]:
    """Mean of `measure` against the baseline's, for groups of programs from small to large.

    Programs are ranked by generated tokens in the baseline and cut into `groups` of equal size
    (fewer where there are fewer programs). Only programs complete in every run count. The ratio is
    of group means over all repeats, so that one very short program cannot decide it.
    """
    indices = _complete_everywhere([*runs, *baselines])
    indices.sort(key=lambda i: (baselines[0].programs[i].generated_tokens, i))
    groups = min(groups, len(indices))
    bounds = [round(k * len(indices) / groups) for k in range(groups + 1)] if groups else []
    parts = [indices[a:b] for a, b in pairwise(bounds)]
    return [
        ratio(_group_mean(runs, part, measure), _group_mean(baselines, part, measure))
        for part in parts
    ]


def _complete_everywhere(runs: Sequence[Run]) -> list[int]:
    count = min(len(run.programs) for run in runs)
    return [i for i in range(count) if all(run.programs[i].is_complete for run in runs)]


def _group_mean(runs: Sequence[Run], indices: list[int], measure: Measure) -> float:
    return statistics.fmean(measure(run.programs[i]) for run in runs for i in indices)


def longest_decile_ratio(runs: Sequence[Run], baselines: Sequence[Run]) -> float | None:
    """Who pays: mean response of the tenth of programs with most tokens, against the baseline."""
    ratios = by_size(runs, baselines)
    return ratios[-1] if ratios else None


RATIO_KEYS = ("program_token_latency_ms", "program_response_s")


def ratios(summary: dict[str, object], baseline: dict[str, object]) -> dict[str, object]:
    """A policy's distributions and throughput over the baseline's."""
    out: dict[str, object] = {}
    for key in RATIO_KEYS:
        mine, theirs = summary[key], baseline[key]
        assert isinstance(mine, dict)
        assert isinstance(theirs, dict)
        out[key] = {name: ratio(mine[name], theirs[name]) for name in mine}
    for key in ("engine_tokens_per_s", "busy_tokens_per_s"):
        out[key] = ratio(_number(summary[key]), _number(baseline[key]))
    return out


def ratio_range(
    summaries: Sequence[dict[str, object]], baselines: Sequence[dict[str, object]]
) -> list[float] | None:
    """Smallest and largest ratio of mean program token latency over the repeats, pair by pair."""
    means = [
        (_mean_latency(a), _mean_latency(b)) for a, b in zip(summaries, baselines, strict=True)
    ]
    known = [r for r in (ratio(mine, theirs) for mine, theirs in means) if r is not None]
    return [min(known), max(known)] if known else None


def _mean_latency(summary: dict[str, object]) -> float | None:
    latency = summary["program_token_latency_ms"]
    assert isinstance(latency, dict)
    return _number(latency["mean"])


# --- what a reader has to know ------------------------------------------------------------------

NO_QUEUE_WAIT_SHARE = 0.05
FOREIGN_CORES = 0.2
LATE_S = 0.5


def has_queue(summaries: Iterable[dict[str, object]]) -> bool | None:
    """Whether calls waited at all in any run; None where no server reports queueing."""
    shares = [_number(summary["wait_share"]) for summary in summaries]
    known = [share for share in shares if share is not None]
    return max(known) >= NO_QUEUE_WAIT_SHARE if known else None


def caveats(summaries: Sequence[dict[str, object]]) -> list[str]:
    """Plain sentences about what makes these runs less than they seem; empty if nothing does."""
    found = []
    if has_queue(summaries) is False:
        found.append(
            "Calls hardly waited in the engine's queue. With no queue there is nothing to"
            " schedule, and differences between policies are noise."
        )
    foreign = max(_number(s["foreign_cores"]) or 0.0 for s in summaries)
    if foreign >= FOREIGN_CORES:
        found.append(f"Other processes used up to {foreign:.1f} cores during the runs.")
    lost = sum(int(_number(s["lost"]) or 0) for s in summaries)
    if lost:
        found.append(f"{lost} calls were lost; programs with a lost call have no latency.")
    if len({str(s["output_hash"]) for s in summaries}) > 1:
        found.append("Outputs differ between runs, so the work was not the same in each.")
    late = max(_number(s["client_late_s"]) or 0.0 for s in summaries)
    if late >= LATE_S:
        found.append(f"The client started programs up to {late:.1f} s late.")
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
