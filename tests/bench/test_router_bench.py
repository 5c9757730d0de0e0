"""The routing benchmark: what its simulation conserves, and what it prints."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("zmq")

from autellix_sglang.router.testing import BLOCK_TOKENS, Job, StepEngine, Timing
from bench import router, routing_overhead, synthetic
from bench.replay import poisson_arrivals
from bench.routing import POLICY_NAMES, Simulation

SMALL = Timing(num_slots=4, kv_tokens=20_000)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_simulation_runs_every_call_once(policy):
    """Every call of every program ends, on replicas that a policy spreads them over."""
    programs = synthetic.generate("chat", 12, seed=3)
    result = Simulation(policy, 3, SMALL).run(programs, poisson_arrivals(12, 5.0, seed=3))
    assert result["replicas"] == 3
    assert 0 <= result["prefix_hit_rate"] < 1
    assert 1 <= result["balance"] <= 3
    assert result["program_token_latency_ms"]["mean"] > 0


def test_engine_takes_the_time_of_its_model():
    """A prompt is computed once, its repetition is a hit, and steps cost what they should."""
    engine = StepEngine(SMALL)
    prompt = list(range(10 * BLOCK_TOKENS))
    first, again = Job(prompt, 2), Job(prompt, 1)
    engine.submit(first)
    assert engine.step() == (pytest.approx(len(prompt) / 12_000 + 0.012), [first])
    engine.submit(again)
    assert engine.step() == (pytest.approx(1 / 12_000 + 0.0123), [first, again])
    assert (again.num_cached, engine.num_live) == (len(prompt), 0)


def test_engine_evicts_the_oldest_prefix():
    """What does not fit the cache is computed again."""
    engine = StepEngine(Timing(kv_tokens=8 * BLOCK_TOKENS))
    prompts = [[i] * (6 * BLOCK_TOKENS) for i in range(2)]
    for prompt in (*prompts, prompts[0]):
        engine.submit(job := Job(prompt, 1))
        engine.step()
    assert job.num_cached == 0
    assert engine.kv_used_tokens == 8 * BLOCK_TOKENS


def test_placement_ends_in_a_table_and_one_line_of_json(capsys):
    """The last line is the contract's JSON object, with a row per workload, size and policy."""
    assert router.main(["--programs", "6", "--replicas", "2", "--only", "placement"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert len(result["results"]) == len(router.KINDS) * len(POLICY_NAMES) == len(table) - 2
    assert {"command", "commit", "hardware", "versions", "seconds"} <= result.keys()
    assert result["results"][0]["autellix_over_this"] == 1


def test_overhead_is_measured_on_real_processes(monkeypatch):
    """Router and replica are started, and calls and streams pass through them."""
    monkeypatch.setattr(routing_overhead, "CALLERS", 2)
    monkeypatch.setattr(routing_overhead, "OPEN_STREAMS", 3)
    monkeypatch.setattr(routing_overhead.importlib.util, "find_spec", lambda name: None)
    result = routing_overhead.measure(0.2)
    assert result["peer"] is None
    assert {"ttft_p50_ms", "ttft_p99_ms", "calls_per_s", "frames_per_s"} <= result[
        "overhead"
    ].keys()
    assert result["overhead"]["calls_per_s"] > 0
    assert result["overhead"]["frames_per_s"] > 0
