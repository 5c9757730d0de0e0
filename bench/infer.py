"""How often does `--program-infer` find the right program?

    python -m bench.infer --quick
    python -m bench.infer --trace chats.jsonl.gz agents.jsonl.gz

Recorded programs (without `--trace`: the built-in workloads) are played with no ids: each prompt
is looked up in the server's own index (`autellix_sglang.core.infer`) when it is issued, and goes in
with its output when it is done. No engine runs: programs arrive in a Poisson process, a call takes
`--token-ms` per output token, and recorded gaps are kept.

- a *join* is a call that was found a program; it is right if the call that it was attached to is of
  the same run of the same program. Precision: right joins of all joins.
- recall: right joins of all calls that follow another one of their program. Beside it `findable`,
  the share of those calls that begin with an earlier call's whole prompt and output, which is the
  most that any prefix can tell, and the recall on these alone.

Tokens are made from the counts of the trace (`bench.prompts`): prefixes that the trace says are
shared between programs are, all else is a program's own. So it shows what shared prompts, branches,
shortened histories and the bound on memory do. It cannot show what real text does: outputs that
are tokenised differently when they are sent back, or templates that rewrite them, cost recall.
People who ask the same and are answered the same could cost precision; `--twins` runs a share of
the programs twice at the same time, with the same tokens, to show that.

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from autellix_sglang.core.infer import MAX_HISTORIES, History, HistoryIndex, Origin
from bench.common import format_table, new_parser, run_benchmark, say
from bench.prompts import ProgramPrompts, Vocabulary
from bench.replay import poisson_arrivals
from bench.synthetic import WORKLOADS, generate
from bench.trace import TraceCall, TraceError, TraceProgram, load, sample

SEED: Final = 1
BAR: Final = 0.99  # least precision
VOCABULARY: Final = Vocabulary(0, 32_000)
QUICK_PROGRAMS: Final = 150
TWINS_APART_S: Final = 1.0  # at most


@dataclass(frozen=True, slots=True)
class Setup:
    """What stays the same for all traces."""

    num_programs: int
    rate: float  # programs per second
    token_s: float
    twins: float  # share of the programs that run twice
    max_histories: int
    seed: int = SEED


@dataclass(slots=True, eq=False)
class RunningProgram:
    """One run of a program; twins have the same tokens and are two."""

    number: int
    trace: TraceProgram
    prompts: ProgramPrompts
    num_waits: dict[str, int]

    def output(self, call: TraceCall) -> list[int]:
        name = ("output", self.trace.corpus, self.trace.id, call.id)
        return VOCABULARY.stream(max(1, call.output_tokens), *name)

    def followers(self, call: TraceCall) -> Iterator[TraceCall]:
        """Calls that have waited for this one last."""
        for other in self.trace.calls:
            if call.id in self.trace.waits_for(other):
                self.num_waits[other.id] -= 1
                if not self.num_waits[other.id]:
                    yield other


class Playback:
    """Plays programs against an index and counts what it answers."""

    def __init__(self, setup: Setup) -> None:
        self.counts: Counter[str] = Counter()
        self._setup = setup
        # A server's programs stay open for their time to live, which is longer than a run here.
        self._index = HistoryIndex(lambda origin: True, setup.max_histories)
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()

    def play(self, programs: Sequence[TraceProgram]) -> None:
        rng = random.Random(self._setup.seed)
        numbers = itertools.count()
        arrivals = poisson_arrivals(len(programs), self._setup.rate, self._setup.seed)
        for trace, at_s in zip(programs, arrivals, strict=True):
            self._at(at_s, partial(self._start, next(numbers), trace))
            if rng.random() < self._setup.twins:
                later_s = at_s + rng.random() * TWINS_APART_S
                self._at(later_s, partial(self._start, next(numbers), trace))
        while self._agenda:
            at_s, _, event = heapq.heappop(self._agenda)
            event(at_s)

    def _at(self, at_s: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._agenda, (at_s, next(self._order), event))

    def _start(self, number: int, trace: TraceProgram, now_s: float) -> None:
        num_waits = {call.id: len(trace.waits_for(call)) for call in trace.calls}
        prompts = ProgramPrompts(trace, vocabulary=VOCABULARY)
        run = RunningProgram(number, trace, prompts, num_waits)
        self.counts["programs"] += 1
        for i, call in enumerate(trace.calls):
            self.counts["calls"] += 1
            self.counts["following"] += i > 0
            self.counts["findable"] += _continues_whole(trace, call)
            if not num_waits[call.id]:
                self._plan_issue(now_s, run, call)

    def _plan_issue(self, now_s: float, run: RunningProgram, call: TraceCall) -> None:
        self._at(now_s + max(0.0, call.gap_s or 0.0), partial(self._issue, run, call))

    def _issue(self, run: RunningProgram, call: TraceCall, now_s: float) -> None:
        tokens = run.prompts.prompt(call)
        history = History("", tokens)
        origin = self._index.find(history, tokens)
        call_id = f"{run.number}/{call.id}"
        if origin is not None:
            is_right = origin.call_id.startswith(f"{run.number}/")
            self.counts["joins"] += 1
            self.counts["right"] += is_right
            self.counts["found"] += is_right and _continues_whole(run.trace, call)
        # Without an answer the server makes the call a program of its own.
        program_id = call_id if origin is None else origin.program_id
        end_s = now_s + call.output_tokens * self._setup.token_s
        self._at(end_s, partial(self._end, run, call, history, Origin("", program_id, call_id)))

    def _end(
        self, run: RunningProgram, call: TraceCall, history: History, own: Origin, now_s: float
    ) -> None:
        output = run.output(call)
        run.prompts.complete(call, output)
        history.extend(output)
        self._index.add(history, own)
        for follower in run.followers(call):
            self._plan_issue(now_s, run, follower)


def _continues_whole(trace: TraceProgram, call: TraceCall) -> bool:
    """Whether a prompt begins with all of an earlier call's prompt and output."""
    leader = trace.prompt_leader(call)
    base = trace.base(leader)
    return base is not None and leader.reused_tokens >= base.prompt_tokens + base.output_tokens


# -- what is printed -----------------------------------------------------------------------------


def rates(counts: Mapping[str, int]) -> dict[str, Any]:
    """Precision and recall; null where there is nothing to divide by."""
    return {
        **{key: counts[key] for key in ("programs", "calls", "joins", "right")},
        "precision": _share(counts["right"], counts["joins"]),
        "recall": _share(counts["right"], counts["following"]),
        "findable": _share(counts["findable"], counts["following"]),
        "recall_of_findable": _share(counts["found"], counts["findable"]),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def benchmark(sources: Mapping[str, Sequence[TraceProgram]], setup: Setup) -> dict[str, Any]:
    """The result without its provenance."""
    total: Counter[str] = Counter()
    traces = {}
    for name, programs in sources.items():
        mix = sample([programs], min(setup.num_programs, len(programs)), setup.seed)
        say(f"{name}: {len(mix.programs)} programs")
        playback = Playback(setup)
        playback.play(mix.programs)
        traces[name] = rates(playback.counts)
        total += playback.counts
    overall = rates(total)
    return {
        **overall,
        "within_bar": overall["precision"] is not None and overall["precision"] >= BAR,
        "twins": setup.twins,
        "max_histories": setup.max_histories,
        "traces": traces,
    }


def table(result: Mapping[str, Any]) -> str:
    keys = ["programs", "calls", "joins", "precision", "recall", "findable", "recall_of_findable"]
    rows = [[name, *(row[key] for key in keys)] for name, row in result["traces"].items()]
    return format_table(["trace", *keys], [*rows, ["all", *(result[key] for key in keys)]])


def sources_of(options: argparse.Namespace) -> dict[str, Sequence[TraceProgram]]:
    if options.trace:
        return {path.name.partition(".")[0]: load(path) for path in options.trace}
    return {kind: generate(kind, options.programs, SEED) for kind in WORKLOADS["mixed"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = new_parser("bench.infer", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help=f"at most {QUICK_PROGRAMS} programs of each trace")
    add("--trace", nargs="+", type=Path, default=[], help="recorded programs (default: built-in)")
    add("--programs", type=int, default=1000, help="of each trace, at most (%(default)s)")
    add("--rate", type=float, default=2.0, help="programs per second (%(default)s)")
    add("--token-ms", type=float, default=25.0, help="time of an output token (%(default)s)")
    add("--twins", type=float, default=0.0, help="share that runs twice, with the same tokens")
    add("--histories", type=int, default=MAX_HISTORIES, help="remembered (%(default)s)")

    def run(options: argparse.Namespace) -> dict[str, Any]:
        if options.quick:
            options.programs = min(options.programs, QUICK_PROGRAMS)
        setup = Setup(
            num_programs=options.programs,
            rate=options.rate,
            token_s=options.token_ms / 1e3,
            twins=options.twins,
            max_histories=options.histories,
        )
        try:
            return benchmark(sources_of(options), setup)
        except (TraceError, OSError) as error:
            parser.error(str(error))

    return run_benchmark(parser, argv, run, table)


if __name__ == "__main__":
    sys.exit(main())
