"""The built-in workloads against the numbers of the paper's Fig. 11."""

import random
from collections import Counter
from statistics import fmean, median, stdev

import pytest

from bench.stats import percentile
from bench.synthetic import (
    BFCL_S,
    CODING,
    FAN_OUT,
    PEOPLE_S,
    TERMINAL_S,
    WINDOW_TOKENS,
    WORKLOADS,
    corpora,
    generate,
)
from bench.trace import TraceProgram

# kind: (calls per program, largest, prefill per call, decode per call), from Fig. 11.
PAPER = {
    "chat": (6.66, 80, 255.65, 276.81),
    "react": (10.75, 70, 735.06, 34.14),
    "tree": (159.71, 400, 467.24, 72.64),
}
NUM_PROGRAMS = {"chat": 6000, "react": 3000, "tree": 500}


@pytest.fixture(scope="module")
def samples() -> dict[str, tuple[TraceProgram, ...]]:
    return {kind: generate(kind, count, seed=1) for kind, count in NUM_PROGRAMS.items()}


@pytest.mark.parametrize("kind", PAPER)
def test_sample_means_are_the_papers(samples, kind):
    """Calls per program, prefill and decode tokens per call average what the paper publishes."""
    calls_mean, _, prefill_mean, decode_mean = PAPER[kind]
    calls = [call for program in samples[kind] for call in program.calls]

    assert len(calls) / len(samples[kind]) == pytest.approx(calls_mean, rel=0.05)
    assert fmean(call.new_tokens for call in calls) == pytest.approx(prefill_mean, rel=0.04)
    assert fmean(call.output_tokens for call in calls) == pytest.approx(decode_mean, rel=0.03)


@pytest.mark.parametrize("kind", PAPER)
def test_call_counts_have_a_tail_up_to_the_papers_maximum(samples, kind):
    """Some programs are several times the mean, and none exceeds the published maximum."""
    mean, largest, _, _ = PAPER[kind]
    counts = [len(program.calls) for program in samples[kind]]

    assert max(counts) <= largest
    assert max(counts) > 2 * mean


@pytest.mark.parametrize("kind", ["chat", "react"])
def test_dialogues_are_chains_that_continue_themselves_within_the_window(samples, kind):
    """Each turn extends the last one's prompt and output, or restarts from the first prompt."""
    for program in samples[kind][:500]:
        first = program.calls[0]
        assert program.max_context_tokens <= WINDOW_TOKENS
        for last, call in zip(program.calls, program.calls[1:], strict=False):
            assert call.parents == (last.id,)
            whole = last.prompt_tokens + last.output_tokens
            assert call.reused_tokens in (whole, first.prompt_tokens)


def test_tree_searches_fan_out_behind_barriers(samples):
    """Proposals are samples of one prompt, and every valuation waits for all proposals."""
    program = samples["tree"][0]
    proposals, values = program.calls[:FAN_OUT], program.calls[FAN_OUT : 2 * FAN_OUT]

    assert {c.same_prompt_as for c in proposals[1:]} == {proposals[0].id}
    assert len({c.thread for c in proposals}) == FAN_OUT
    assert all(c.parents == tuple(p.id for p in proposals) for c in values)
    assert program.calls[2 * FAN_OUT].parents == tuple(c.id for c in values)


def test_map_reduce_is_wide_and_its_branches_are_unequal():
    """A split, chains of one to six calls that each wait for it, and a reduction of their ends."""
    for program in generate("map_reduce", 50, seed=1):
        split, *branches, reduction = program.calls
        ends = {call.thread: call.id for call in branches}
        assert reduction.parents == tuple(ends.values())
        by_id = {call.id: call for call in branches}
        for call in branches:
            if call.reused_tokens:
                parent = by_id[call.parents[0]]
                assert call.thread == parent.thread
                assert call.reused_tokens == parent.prompt_tokens + parent.output_tokens
            else:
                assert call.parents == (split.id,)
        lengths = Counter(call.thread for call in branches)
        assert 1 <= len(lengths) <= 64
        assert max(lengths.values()) <= 6


def test_a_seed_gives_the_same_programs_however_many_are_asked_for():
    """A larger sample begins with the smaller one, and another seed gives other programs."""
    assert generate("react", 5, seed=3)[:2] == generate("react", 2, seed=3)
    assert generate("react", 2, seed=3) != generate("react", 2, seed=4)


def test_the_mixed_workload_has_every_kind():
    """`mixed` is made of one source per kind."""
    sources = corpora("mixed", 2, seed=0)

    assert [source[0].kind for source in sources] == list(WORKLOADS["mixed"])


def test_coding_agents_have_the_statistics_of_the_recorded_runs():
    """Calls, new and generated tokens, and prompts are near mini-SWE-agent's on Terminal-Bench."""
    programs = generate("coding", 1500, seed=1)
    calls = [call for program in programs for call in program.calls]
    counts = sorted(len(program.calls) for program in programs)

    assert (fmean(counts), median(counts)) == (
        pytest.approx(20.4, rel=0.04),
        pytest.approx(18, 0.1),
    )
    assert counts[-1] <= 58 and percentile(counts, 0.95) == pytest.approx(42, rel=0.1)
    assert fmean(call.new_tokens for call in calls) == pytest.approx(397, rel=0.05)
    assert fmean(call.output_tokens for call in calls) == pytest.approx(243, rel=0.05)
    assert fmean(call.prompt_tokens for call in calls) == pytest.approx(8736, rel=0.15)
    assert max(program.max_context_tokens for program in programs) <= CODING.window_tokens


@pytest.mark.parametrize(
    ("gaps", "mean", "middle", "p95"),
    [(TERMINAL_S, 8.8, 3.6, 35.2), (PEOPLE_S, 210.0, 117.0, 611.0)],
)
def test_gaps_fit_a_recorded_mean_median_and_tail(gaps, mean, middle, p95):
    """Two numbers make the distribution; the recorded 95th percentile was not used and is near."""
    rng = random.Random(1)
    drawn = [gaps.draw(rng) for _ in range(40_000)]

    assert fmean(drawn) == pytest.approx(mean, rel=0.05)
    assert median(drawn) == pytest.approx(middle, rel=0.05)
    assert percentile(drawn, 0.95) == pytest.approx(p95, rel=0.15)


def test_gaps_fit_a_published_deviation():
    """BFCL's tools have Continuum's mean and deviation."""
    rng = random.Random(1)
    drawn = [BFCL_S.draw(rng) for _ in range(40_000)]

    assert (fmean(drawn), stdev(drawn)) == (
        pytest.approx(1.923, rel=0.03),
        pytest.approx(2.133, rel=0.15),
    )


@pytest.mark.parametrize("kind", ["coding", "chat_people", "react_tools"])
def test_programs_with_gaps_have_one_before_every_call_but_the_first(kind):
    """Tools and people take time between calls, never before the first."""
    for program in generate(kind, 20, seed=2):
        first, *later = program.calls
        assert first.gap_s is None
        assert all(call.gap_s is not None and call.gap_s >= 0 for call in later)


def test_gaps_change_nothing_but_gaps():
    """The paper's workloads have none, and with them calls and tokens average the same."""
    plain, tools = generate("react", 800, seed=1), generate("react_tools", 800, seed=1)

    assert all(call.gap_s is None for program in plain for call in program.calls)
    sizes = [fmean(len(p.calls) for p in programs) for programs in (plain, tools)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_workload_has_its_sources(workload):
    """A mix has one source per kind, in its order, each with as many programs as asked for."""
    sources = corpora(workload, 2, seed=0)

    assert [len(source) for source in sources] == [2] * len(WORKLOADS[workload])
    assert len({source[0].id for source in sources}) == len(sources)
