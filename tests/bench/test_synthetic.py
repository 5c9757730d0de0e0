"""The built-in workloads against the numbers of the paper's Fig. 11."""

from collections import Counter
from statistics import fmean

import pytest

from bench.synthetic import FAN_OUT, WINDOW_TOKENS, WORKLOADS, corpora, generate
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
