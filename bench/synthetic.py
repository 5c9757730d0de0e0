"""Built-in workloads, calibrated to what is published.

The first four are the Autellix paper's (Fig. 11):

| name | models | calls per program, mean (max) | prefill / decode tokens per call | shape |
|---|---|---|---|---|
| `chat` | ShareGPT | 6.66 (80) | 256 / 277 | one thread, append-only history |
| `react` | BFCL ReAct | 10.75 (70) | 735 / 34 | one thread, tool list in front |
| `tree` | LATS | 159.7 (400) | 467 / 73 | fan-out of five with barriers |
| `mixed` | | | | equal parts of the three |
| `map_reduce` | nothing published | see `_map_reduce` | | wide fan-out of unequal branches |
| `coding` | mini-SWE-agent | 20.4 (58) | 397 / 243 | one thread, shell commands between calls |
| `chat_people` | ShareGPT | as `chat` | as `chat` | people read and type between calls |
| `react_tools` | BFCL ReAct | as `react` | as `react` | tools run between calls |
| `agents` | | | | equal parts of `coding`, `react_tools` and `tree` |
| `office` | | | | the same with `chat_people` |

The paper publishes means and maxima only; numbers of calls and tokens are drawn from clipped
lognormal distributions whose means are solved to be exactly those. "Prefill" is read as the tokens
a call adds (`new_tokens`): with 277 decoded tokens per call a whole chat prompt cannot average 256.
The paper models neither tool nor human time, so the gaps of its workloads are null.

`coding` has the statistics of 171 recorded runs of mini-SWE-agent with Claude Sonnet 4 on
Terminal-Bench (laude-institute/terminal-bench-leaderboard, run 20250825): calls per program mean
20.4, median 18, at most 58; new tokens per call mean 397, median 89; generated tokens mean 243,
median 82. Gaps are lognormal (`Seconds`), from a published mean and median or deviation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

from bench.trace import TraceCall, TraceProgram

WINDOW_TOKENS = 8192
FAN_OUT = 5

# --- distributions ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """Whole numbers 1..`largest`: a rounded, clipped lognormal with exactly this mean.

    `sigma` is the standard deviation of the logarithm before clipping, the weight of the tail.
    """

    mean: float
    sigma: float
    largest: int

    def draw(self, rng: random.Random) -> int:
        value = math.exp(_solve_mu(self) + self.sigma * rng.gauss(0.0, 1.0))
        return min(max(round(value), 1), self.largest)


@lru_cache(maxsize=64)
def _solve_mu(counts: Counts) -> float:
    """The lognormal's location that gives `counts.mean` after rounding and clipping."""
    low, high = -5.0, math.log(counts.largest) + 5.0
    for _ in range(60):
        middle = (low + high) / 2
        if _clipped_mean(middle, counts) < counts.mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _clipped_mean(mu: float, counts: Counts) -> float:
    # E[X] of a whole-numbered X >= 1 is 1 + the sum of P(X >= k) over k = 2..largest.
    normal = NormalDist(mu, counts.sigma)
    return 1 + sum(1 - normal.cdf(math.log(k - 0.5)) for k in range(2, counts.largest + 1))


@dataclass(frozen=True, slots=True)
class Seconds:
    """Times from a lognormal distribution with this mean; `sigma` as for `Counts`."""

    mean: float
    sigma: float

    @classmethod
    def with_median(cls, mean: float, median: float) -> Seconds:
        return cls(mean, math.sqrt(2 * math.log(mean / median)))

    @classmethod
    def with_deviation(cls, mean: float, deviation: float) -> Seconds:
        return cls(mean, math.sqrt(math.log(1 + (deviation / mean) ** 2)))

    def draw(self, rng: random.Random) -> float:
        location = math.log(self.mean) - self.sigma**2 / 2
        return round(math.exp(location + self.sigma * rng.gauss(0.0, 1.0)), 3)


# Shell commands of the recorded runs that `coding` models; their 95th percentile is 35.2 s.
TERMINAL_S = Seconds.with_median(8.8, 3.6)
# Tools of BFCL v4: 1,923 ms on average with a deviation of 2,133 (Continuum, arXiv 2511.02230).
BFCL_S = Seconds.with_deviation(1.923, 2.133)
# People between the turns of Mooncake's conversation trace; their 95th percentile is 611 s.
PEOPLE_S = Seconds.with_median(210.0, 117.0)

# --- single-thread programs ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dialogue:
    """How chat and ReAct programs are drawn: turns, first prompt, later additions, answers.

    `shared_prefixes` are the lengths of the system prompts or tool lists in use, one per group;
    `gap` is the time between an answer and the next call.
    """

    calls: Counts
    shared_prefixes: tuple[int, ...]
    first: Counts
    added: Counts
    answer: Counts
    gap: Seconds | None = None
    window_tokens: int = WINDOW_TOKENS


CHAT = Dialogue(
    calls=Counts(6.66, 1.0, 80),
    shared_prefixes=(0,),
    first=Counts(255.65, 1.4, 2048),
    added=Counts(255.65, 1.4, 2048),
    answer=Counts(276.81, 0.6, 1024),
)

# The tool list and the task average 2,000 tokens; the later calls make up the rest of the mean.
_REACT_FIRST = 2000.0
REACT = Dialogue(
    calls=Counts(10.75, 0.6, 70),
    shared_prefixes=(1200, 1400, 1600, 1800, 1800, 2000, 2200, 2400),
    first=Counts(_REACT_FIRST - 1800, 0.5, 1024),
    added=Counts((735.06 * 10.75 - _REACT_FIRST) / (10.75 - 1), 0.8, 3000),
    answer=Counts(34.14, 0.8, 256),
)

# The recorded prompts average 8,736 tokens, which leaves about 700 for the first one. That 512 of
# them are instructions which all programs share is an assumption.
_CODING_FIRST = 700.0
CODING = Dialogue(
    calls=Counts(20.4, 0.5, 58),
    shared_prefixes=(512,),
    first=Counts(_CODING_FIRST - 512, 0.8, 2048),
    added=Counts((397 * 20.4 - _CODING_FIRST) / (20.4 - 1), 1.73, 8192),
    answer=Counts(243.0, 1.47, 4096),
    gap=TERMINAL_S,
    window_tokens=4 * WINDOW_TOKENS,
)
CHAT_PEOPLE = replace(CHAT, gap=PEOPLE_S)
REACT_TOOLS = replace(REACT, gap=BFCL_S)


def _dialogue(kind: str, shape: Dialogue, index: int, rng: random.Random) -> TraceProgram:
    group = rng.randrange(len(shape.shared_prefixes))
    shared = shape.shared_prefixes[group]
    first = shared + shape.first.draw(rng)
    calls = [TraceCall("0", first, first, shape.answer.draw(rng), shared_prefix_tokens=shared)]
    for _ in range(shape.calls.draw(rng) - 1):
        calls.append(_next_turn(calls[-1], first, shape, rng))
    return TraceProgram(
        f"{kind}-{index}", f"synthetic-{kind}", kind, tuple(calls), None, str(group)
    )


def _next_turn(last: TraceCall, first: int, shape: Dialogue, rng: random.Random) -> TraceCall:
    new, output = shape.added.draw(rng), shape.answer.draw(rng)
    history = last.prompt_tokens + last.output_tokens
    gap_s = None if shape.gap is None else shape.gap.draw(rng)
    if history + new + output > shape.window_tokens:
        # What chat and agent front ends do when the context is full: keep the first prompt.
        history = first
    return TraceCall(str(int(last.id) + 1), history + new, new, output, (last.id,), gap_s=gap_s)


# --- tree searches ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of call in a tree search: its fresh prompt and its answer."""

    op: str
    shared_prefix_tokens: int
    prompt: Counts
    answer: Counts


TREE_CALLS = Counts(159.71, 0.45, 400)
# A round is five proposals, five valuations and one reflection; the reflection's means are what
# remains of the paper's 467.24 prefill and 72.64 decode tokens per call.
PROPOSE = Step("propose", 300, Counts(480.0, 0.2, 1500), Counts(90.0, 0.5, 400))
VALUE = Step("value", 260, Counts(440.0, 0.2, 1500), Counts(50.0, 0.5, 300))
REFLECT = Step(
    "reflect",
    280,
    Counts(11 * 467.24 - 5 * 480.0 - 5 * 440.0, 0.2, 1500),
    Counts(11 * 72.64 - 5 * 90.0 - 5 * 50.0, 0.5, 400),
)


def _tree(index: int, rng: random.Random) -> TraceProgram:
    count = TREE_CALLS.draw(rng)
    calls = tuple(call for _, call in zip(range(count), _tree_calls(rng), strict=False))
    return TraceProgram(f"tree-{index}", "synthetic-tree", "tree", calls)


def _tree_calls(rng: random.Random) -> Iterator[TraceCall]:
    """Rounds without end: propose (samples of one prompt), value each, reflect on all."""
    next_id = 0
    parents: tuple[str, ...] = ()
    while True:
        for fan_out in (_samples(rng, next_id, parents), _values(rng, next_id + FAN_OUT)):
            yield from fan_out
            parents = tuple(call.id for call in fan_out)
        next_id += 2 * FAN_OUT
        reflection = _fresh(REFLECT, next_id, 0, parents, rng)
        yield reflection
        next_id, parents = next_id + 1, (reflection.id,)


def _samples(rng: random.Random, first_id: int, parents: tuple[str, ...]) -> list[TraceCall]:
    prompt = PROPOSE.prompt.draw(rng)
    return [
        TraceCall(
            id=str(first_id + i),
            prompt_tokens=prompt,
            new_tokens=prompt,
            output_tokens=PROPOSE.answer.draw(rng),
            parents=parents,
            thread=str(i),
            shared_prefix_tokens=min(prompt, PROPOSE.shared_prefix_tokens),
            op=PROPOSE.op,
            same_prompt_as=str(first_id) if i else None,
        )
        for i in range(FAN_OUT)
    ]


def _values(rng: random.Random, first_id: int) -> list[TraceCall]:
    barrier = tuple(str(first_id - FAN_OUT + i) for i in range(FAN_OUT))
    return [_fresh(VALUE, first_id + i, i, barrier, rng) for i in range(FAN_OUT)]


def _fresh(
    step: Step, call_id: int, thread: int, parents: tuple[str, ...], rng: random.Random
) -> TraceCall:
    prompt = step.prompt.draw(rng)
    return TraceCall(
        id=str(call_id),
        prompt_tokens=prompt,
        new_tokens=prompt,
        output_tokens=step.answer.draw(rng),
        parents=parents,
        thread=str(thread),
        shared_prefix_tokens=min(prompt, step.shared_prefix_tokens),
        op=step.op,
    )


# --- map-reduce ---------------------------------------------------------------------------------

BRANCHES = Counts(12.0, 0.7, 64)
REVISIONS = Counts(1.6, 0.7, 6)  # calls of a branch: a summary, and revisions of it
SPLIT = Step("split", 200, Counts(1500.0, 0.5, 6000), Counts(80.0, 0.5, 400))
SUMMARISE = Step("summarise", 150, Counts(1200.0, 0.4, 4000), Counts(120.0, 0.8, 1000))
REDUCE = Step("reduce", 150, Counts(1200.0, 0.3, 4000), Counts(250.0, 0.5, 1000))


def _map_reduce(index: int, rng: random.Random) -> TraceProgram:
    """A split, branches of one to six calls side by side, and a reduction that waits for all.

    Its sizes are our choice, for want of a published source: a wide program whose critical path is
    a small and varying part of its work.
    """
    calls = [_fresh(SPLIT, 0, 0, (), rng)]
    ends = []
    for branch in range(1, BRANCHES.draw(rng) + 1):
        parent = calls[0]
        for revision in range(REVISIONS.draw(rng)):
            call = _fresh(SUMMARISE, len(calls), branch, (parent.id,), rng)
            if revision:
                history = parent.prompt_tokens + parent.output_tokens
                new = min(call.prompt_tokens, 100)
                call = replace(
                    call, prompt_tokens=history + new, new_tokens=new, shared_prefix_tokens=0
                )
            calls.append(call)
            parent = call
        ends.append(parent.id)
    calls.append(_fresh(REDUCE, len(calls), 0, tuple(ends), rng))
    return TraceProgram(f"map_reduce-{index}", "synthetic-map-reduce", "map_reduce", tuple(calls))


# --- workloads ----------------------------------------------------------------------------------


def _chat(index: int, rng: random.Random) -> TraceProgram:
    return _dialogue("chat", CHAT, index, rng)


def _react(index: int, rng: random.Random) -> TraceProgram:
    return _dialogue("react", REACT, index, rng)


def _coding(index: int, rng: random.Random) -> TraceProgram:
    return _dialogue("coding", CODING, index, rng)


def _chat_people(index: int, rng: random.Random) -> TraceProgram:
    return _dialogue("chat", CHAT_PEOPLE, index, rng)


def _react_tools(index: int, rng: random.Random) -> TraceProgram:
    return _dialogue("react", REACT_TOOLS, index, rng)


_KINDS: dict[str, Callable[[int, random.Random], TraceProgram]] = {
    "chat": _chat,
    "react": _react,
    "tree": _tree,
    "map_reduce": _map_reduce,
    "coding": _coding,
    "chat_people": _chat_people,
    "react_tools": _react_tools,
}
WORKLOADS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in _KINDS},
    "mixed": ("chat", "react", "tree"),
    "agents": ("coding", "react_tools", "tree"),
    "office": ("chat_people", "coding", "react_tools", "tree"),
}


def generate(kind: str, num_programs: int, seed: int) -> tuple[TraceProgram, ...]:
    """`num_programs` programs of one kind; the same seed gives the same programs.

    Program i does not depend on how many are asked for, so a larger sample extends a smaller one.
    """
    return tuple(_KINDS[kind](i, random.Random(f"{seed}/{kind}/{i}")) for i in range(num_programs))


def corpora(workload: str, num_programs: int, seed: int) -> list[tuple[TraceProgram, ...]]:
    """The sources of a workload, one per kind, each large enough to give every program."""
    return [generate(kind, num_programs, seed) for kind in WORKLOADS[workload]]
