"""The numbers of a run, against values worked out by hand."""

import pytest

from bench import stats
from bench.stats import CallRecord, Outcome, ProgramRecord, Run, ServerProgramInfo


def done(issue: float, finish: float, tokens: int, **more: object) -> CallRecord:
    return CallRecord(
        "0", Outcome.OK, issue_s=issue, finish_s=finish, num_output=tokens, output_hash="h", **more
    )


def program(arrival: float, *calls: CallRecord) -> ProgramRecord:
    return ProgramRecord("p", "chat", arrival, arrival, calls)


def run(*programs: ProgramRecord, policy: str = "off") -> Run:
    return Run(policy, programs, "hash")


# Two programs: the first waits 1 s of its 4 s of calls, the second not at all.
FIRST = program(0.0, done(0.0, 2.0, 10, queue_s=1.0), done(3.0, 5.0, 15, queue_s=0.0))
SECOND = program(4.0, done(4.0, 6.0, 5, queue_s=0.0))
FAILED = program(1.0, CallRecord("0", Outcome.ERROR, "HTTP 500: x", issue_s=1.0, finish_s=2.0))


def test_response_and_token_latency_run_from_arrival_to_last_completion():
    """A program's response ends with its last call, and is shared among all its tokens."""
    assert FIRST.response_s == 5.0
    assert FIRST.token_latency_ms == pytest.approx(200.0)
    assert SECOND.token_latency_ms == pytest.approx(400.0)


def test_percentiles_interpolate_between_neighbours():
    """The percentile of a position between two values lies between them in proportion."""
    assert stats.percentile([40.0, 10.0, 20.0, 30.0], 0.5) == 25.0
    assert stats.percentile([7.0], 0.99) == 7.0
    assert stats.distribution([1.0, 2.0, 3.0]) == {
        "mean": 2.0,
        "p50": 2.0,
        "p95": pytest.approx(2.9),
        "p99": pytest.approx(2.98),
    }


def test_a_distribution_of_nothing_is_unknown():
    """Where nothing was measured the numbers are None, not zero."""
    assert set(stats.distribution([]).values()) == {None}


def test_throughput_over_the_run_its_busy_time_and_its_arrival_window():
    """30 tokens: over 6 s of run, over 5 s with a call in flight, and by share while arriving."""
    gap = run(FIRST, SECOND)
    idle = run(program(0.0, done(0.0, 2.0, 10)), program(4.0, done(4.0, 6.0, 5)))

    assert stats.tokens_per_s(gap) == 30 / 6
    assert stats.busy_tokens_per_s(gap) == 30 / 5
    # From 0 to 4 s: all 10 tokens of the first call, half the 15 of the one running 3..5 s.
    assert stats.steady_tokens_per_s(gap) == pytest.approx((10 + 7.5) / 4)
    assert stats.busy_tokens_per_s(idle) == 15 / 4


def test_covered_time_counts_overlaps_once():
    """The union of overlapping, nested and separate spans has the length one would draw."""
    assert stats.covered_s([(0, 2), (1, 3), (1.5, 1.6), (5, 6)]) == 4.0
    assert stats.covered_s([]) == 0.0


def test_wait_share_is_the_mean_of_programs_and_unknown_if_any_is():
    """A program's share is queueing over call time; one unknown queueing time makes it None."""
    assert FIRST.wait_share == 0.25
    assert stats.wait_share(run(FIRST, SECOND)) == 0.125
    assert stats.wait_share(run(FIRST, program(0.0, done(0.0, 1.0, 1)))) is None


def test_hit_rate_is_cached_over_prompt_tokens():
    """Cached and prompt tokens are summed before they are divided."""
    calls = (
        done(0, 1, 1, prompt_tokens=100, cached_tokens=50),
        done(0, 1, 1, prompt_tokens=300, cached_tokens=250),
    )

    assert stats.prefix_hit_rate(run(program(0.0, *calls))) == 0.75


def test_preemptions_are_ours_or_else_sglangs_retractions():
    """The program's own account wins over SGLang's, and silence is None."""
    ours = done(0, 1, 1, retractions=9, server=ServerProgramInfo(preemptions=2, promotions=1))
    stock = done(0, 1, 1, retractions=3)

    assert stats.preemptions(run(program(0.0, ours, stock))) == 5
    assert stats.promotions(run(program(0.0, ours, stock))) == 1
    assert stats.preemptions(run(program(0.0, done(0, 1, 1)))) is None


def test_a_failed_call_is_lost_and_its_program_has_no_latency():
    """Errors are counted by text, and latencies are of complete programs only."""
    summary = stats.summarize(run(FIRST, FAILED))

    assert summary["lost"] == 1
    assert summary["errors"] == {"HTTP 500: x": 1}
    assert summary["program_response_s"]["mean"] == 5.0
    assert (summary["programs"], summary["calls"], summary["generated_tokens"]) == (2, 3, 25)


def test_repeats_combine_to_medians_but_losses_add_up():
    """Measurements of repeats give their median, losses their sum; other outputs leave no hash."""
    summaries = [stats.summarize(run(SECOND)) for _ in range(3)]
    for summary, p50, lost in zip(summaries, (1.0, 9.0, 2.0), (1, 0, 2), strict=True):
        summary["program_response_s"] = {**summary["program_response_s"], "p50": p50}
        summary["lost"] = lost
        summary["errors"] = {"x": lost}
    summaries[2]["output_hash"] = "other"

    combined = stats.combine(summaries)

    assert combined["program_response_s"]["p50"] == 2.0
    assert (combined["lost"], combined["errors"], combined["repeats"]) == (3, {"x": 3}, 3)
    assert combined["output_hash"] is None
    assert combined["policy"] == "off"


def sized(*responses: float) -> Run:
    """Program i generates i + 1 tokens and takes `responses[i]` seconds."""
    return run(*(program(0.0, done(0.0, r, i + 1)) for i, r in enumerate(responses)))


def test_who_pays_compares_programs_of_like_size():
    """Groups run from few to many tokens, and each ratio is of the groups' mean response."""
    baseline, policy = sized(1, 3, 10, 10), sized(1, 1, 10, 20)

    assert stats.by_size([policy], [baseline], groups=2) == [0.5, 1.5]
    assert stats.longest_decile_ratio([policy], [baseline]) == 2.0


def test_who_pays_leaves_out_programs_that_failed_anywhere():
    """Only programs complete in every run are compared; without any there is no answer."""
    baseline = run(SECOND, FAILED)
    policy = run(SECOND, SECOND)

    assert stats.by_size([policy], [baseline]) == [1.0]
    assert stats.longest_decile_ratio([run(FAILED)], [run(FAILED)]) is None


def test_ratios_divide_distributions_and_throughput_by_the_baseline():
    """A ratio below 1 in latency and above 1 in throughput are both gains."""
    slow = stats.summarize(run(program(0.0, done(0.0, 4.0, 10))))
    fast = stats.summarize(run(program(0.0, done(0.0, 2.0, 10))))

    ratios = stats.ratios(fast, slow)

    assert ratios["program_token_latency_ms"]["mean"] == 0.5
    assert ratios["engine_tokens_per_s"] == 2.0
    assert stats.ratio_range([fast, slow], [slow, slow]) == [0.5, 1.0]


@pytest.mark.parametrize(("wait_share", "expected"), [(0.3, True), (0.01, False), (None, None)])
def test_a_run_without_a_queue_says_so(wait_share, expected):
    """Where calls hardly waited there was nothing to schedule, and a caveat says it."""
    summary = {**stats.summarize(run(SECOND)), "wait_share": wait_share}

    assert stats.has_queue([summary]) is expected
    assert any("nothing to schedule" in c for c in stats.caveats([summary])) == (expected is False)


def test_caveats_name_what_spoils_a_comparison():
    """Losses, foreign load, a late client and differing outputs each get their sentence."""
    good = {**stats.summarize(run(FIRST)), "wait_share": 0.5}
    bad = {**good, "lost": 2, "foreign_cores": 1.5, "client_late_s": 3.0, "output_hash": "x"}

    text = " ".join(stats.caveats([good, bad]))

    assert stats.caveats([good]) == []
    for words in ("2 calls were lost", "1.5 cores", "3.0 s late", "Outputs differ"):
        assert words in text
