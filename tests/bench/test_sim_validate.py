"""Validation of the simulator: what counts as an error, and the setup it simulates with."""

import pytest

from bench.server import ServerError
from bench.sim_device import PRESETS
from bench.sim_validate import (
    Trial,
    corpora_of,
    is_within,
    median_errors,
    parser,
    queue_rows,
    require_complete,
    setup_of,
)
from bench.stats import CallRecord, Outcome, ProgramRecord, Run


def summary(mean, p95):
    return {
        key: {"mean": mean, "p95": p95}
        for key in ("program_token_latency_ms", "program_response_s")
    }


def trial(mean, p95):
    """A trial whose live numbers are 100 and 200."""
    return Trial(summary(100.0, 200.0), summary(mean, p95), PRESETS["a100-8b"], [], 0.0)


def test_an_error_is_simulated_over_live_less_one():
    """110 for 100 is 0.1; the bar is on mean and p95 of the token latency."""
    near, far = trial(110.0, 180.0), trial(110.0, 240.0)

    assert near.errors["program_token_latency_ms"] == {
        "mean": pytest.approx(0.1),
        "p95": pytest.approx(-0.1),
    }
    assert (is_within(near.errors), is_within(far.errors)) == (True, False)


def test_of_repeated_trials_the_median_error_counts():
    """One trial in a bad moment of the machine neither fails the bar nor hides the others."""
    trials = [trial(180.0, 180.0), trial(90.0, 190.0), trial(96.0, 240.0)]

    errors = median_errors(trials)

    assert errors["program_token_latency_ms"] == {
        "mean": pytest.approx(-0.04),
        "p95": pytest.approx(-0.05),
    }
    assert is_within(errors)


def test_beside_a_verdict_stands_how_much_there_was_to_schedule():
    """To be within the bar says little of the order of calls where none waited."""
    live, simulated = {"wait_share": 0.001, "preemptions": 0}, {"wait_share": 0.3, "preemptions": 2}

    [row] = queue_rows({"chat": live}, {"chat": simulated}, {"chat": True})

    assert row == ["chat", "yes", 0.001, 0.3, 0, 2]


def test_the_setup_is_the_servers():
    """Slots come from the options, chunks from the server; clients answer at once."""
    options = parser().parse_args(["--slots", "5", "--policy", "mlfq"])
    setup = setup_of(PRESETS["a100-8b"], options, {"chunked_prefill_size": 2048})

    assert (setup.num_slots, setup.chunk_tokens, setup.gap_scale) == (5, 2048, 0.0)
    assert setup.config.policy == "mlfq"


def test_built_in_workloads_stand_in_for_traces():
    """Without files each built-in workload is validated by itself."""
    assert list(corpora_of(parser().parse_args([]))) == ["chat", "react", "tree"]


def test_a_lost_call_is_no_result():
    """A replay that lost a call cannot be compared."""
    lost = CallRecord(call_id="0", outcome=Outcome.ERROR)
    with pytest.raises(ServerError, match="1 calls were lost"):
        require_complete(Run("plas", (ProgramRecord("a", "chat", 0.0, 0.0, (lost,)),), ""))
