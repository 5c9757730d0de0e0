"""The routing benchmark: what its simulation conserves, and what it prints."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("zmq")

from autellix_sglang.router.testing import BLOCK_TOKENS, Job, StepEngine, Timing
from bench import router, router_chaos, routing_live, routing_overhead
from bench.sim_fleet import POLICY_NAMES

SMALL = Timing(num_slots=4, kv_tokens=20_000)


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


def run(arguments, capsys):
    """The result of a run, whose exit status says whether a bar was missed."""
    status = router.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == ("missed" in [verdict for *_, verdict in result["bars"]])
    return result


def test_placement_ends_in_tables_and_one_line_of_json(capsys):
    """The last line is the contract's JSON object, with a row per workload, size and policy."""
    asked = ["--quick", "--minutes", "0.1", "--replicas", "2", "--only", "placement", "scaling"]
    result = run(asked, capsys)
    assert len(result["results"]) == len(router.QUICK_KINDS) * len(POLICY_NAMES)
    assert {"command", "commit", "hardware", "versions", "seconds"} <= result.keys()
    assert result["results"][0]["autellix_over_this"] == 1
    assert result["sustained_rate"].keys() == {"1", "8"}


def test_mix_is_one_workload_of_equal_parts(tmp_path, capsys):
    """With `--mix` all sources come together, as often each, and `--out` keeps the result."""
    programs = router.programs_of(("react", "chat"), 10, 1, 8192)
    assert Counter(program.kind for program in programs) == {"react": 5, "chat": 5}
    asked = ["--quick", "--minutes", "0.1", "--replicas", "2", "--policies", "sticky"]
    out = tmp_path / "mix.json"
    result = run([*asked, "--only", "placement", "--mix", "--out", str(out)], capsys)
    assert result == json.loads(out.read_text())
    assert [(row["workload"], row["policy"]) for row in result["results"]] == [
        ("mix", "autellix"),
        ("mix", "sticky"),
    ]


def test_pooled_replicas_bound_what_placement_wins(capsys):
    """One engine of their width is the quickest; with one replica it is that replica."""
    asked = ["--quick", "--minutes", "0.5", "--replicas", "4", "1", "--only", "placement"]
    rows = run([*asked, "--policies", "least-used", "pooled"], capsys)["results"]
    mean = {
        (r["workload"], r["replicas"], r["policy"]): r["program_token_latency_ms"]["mean"]
        for r in rows
    }
    for kind in router.QUICK_KINDS:
        assert mean[kind, 4, "pooled"] < mean[kind, 4, "autellix"]
        assert mean[kind, 4, "pooled"] < mean[kind, 4, "least-used"]
        assert mean[kind, 1, "pooled"] == pytest.approx(mean[kind, 1, "autellix"])


def test_sustained_rate_is_where_latency_has_doubled():
    """The level is twice the latency of one replica at its lowest rate, for every size."""

    def row(size, rate, mean):
        return {"replicas": size, "rate": rate, "program_token_latency_ms": {"mean": mean}}

    rows = [
        *(row(1, 1.0, 10), row(1, 2.0, 40), row(2, 2.0, 10), row(2, 4.0, 20), row(2, 5.0, 30)),
        *(row(4, 4.0, 10), row(4, 8.0, 19), row(8, 8.0, 21)),
    ]
    found = {1: pytest.approx(1.5), 2: pytest.approx(4.0), 4: 8.0, 8: None}
    assert router.sustained(rows) == found


def scaling_rows(doubles_at):
    """One replica whose latency doubles at a load, or never; eight that are twice as slow."""
    return [
        {
            "replicas": size,
            "rate": size * load,
            "program_token_latency_ms": {"mean": ms * (3 if load >= doubles_at else 1)},
        }
        for size, ms in ((1, 10), (8, 19))
        for load in router.SCALING_LOADS
    ]


def test_rates_that_were_merely_tried_are_not_sustained():
    """Where one replica never doubles its latency the bar is open, not met by what was tried."""
    rates = router.sustained(scaling_rows(math.inf))
    assert rates == {1: None, 8: None}
    [(_, value, _, verdict)] = router.bars([], rates, None, [])
    assert (value, verdict) == (None, "open")
    [(_, value, _, verdict)] = router.bars([], router.sustained(scaling_rows(1.1)), None, [])
    assert (value < 0.95, verdict) == (True, "missed")


@pytest.mark.parametrize(
    ("doubles_at", "more"), [(1.0, []), (2.0, [{1.5}, {2.0}]), (9.0, [{1.5}, {2.0}, {3.0}])]
)
def test_higher_loads_are_tried_until_one_replica_is_too_slow(doubles_at, more, monkeypatch):
    """Load by load, as many as it takes, and no more than there are."""
    asked = []

    def run_all(tasks):
        asked.append({task.load for task in tasks})
        return [
            {
                "replicas": task.num_replicas,
                "rate": task.num_replicas * task.load,
                "program_token_latency_ms": {"mean": 10 if task.load < doubles_at else 40},
            }
            for task in tasks
        ]

    monkeypatch.setattr(router, "run_all", run_all)
    router.measure_scaling(router.parser().parse_args(["--quick"]), ("react",))
    assert asked == [set(router.SCALING_LOADS), *more]


def test_overhead_is_measured_on_real_processes(monkeypatch):
    """Router and replica are started, and calls, streams and slow readers pass through them."""
    monkeypatch.setattr(routing_overhead, "CALLERS", 2)
    monkeypatch.setattr(routing_overhead, "OPEN_STREAMS", 3)
    monkeypatch.setattr(routing_overhead, "SLOW_READERS", 2)
    monkeypatch.setattr(routing_overhead, "FAST_READERS", 2)
    monkeypatch.setattr(routing_live, "_is_installed", lambda python: False)
    overhead = routing_overhead.Overhead.measure(0.2)
    assert overhead.over_direct("peer") is None
    ours = overhead.over_direct("router")
    assert {"ttft_p50_ms", "ttft_p99_ms", "calls_per_s", "frames_per_s"} <= ours.keys()
    assert ours["calls_per_s"] > 0
    assert ours["frames_per_s"] > 0
    assert ours["slow_readers_ratio"] > 0
    assert len(overhead.rows) == len(ours)


def test_live_runs_are_of_real_processes(monkeypatch, capsys):
    """Without sglang-router ours is measured alone: no call is lost, and placement is worth it."""
    monkeypatch.setattr(routing_live, "_is_installed", lambda python: False)
    asked = ["--only", "live", "--minutes", "0.05", "--repeats", "1", "--replicas", "2"]
    ours, in_turn = run(asked, capsys)["live"]
    assert (ours["policy"], in_turn["policy"]) == ("autellix", "round-robin")
    assert ours["lost"] == in_turn["lost"] == 0
    assert ours["prefix_hit_rate"] > in_turn["prefix_hit_rate"]


def test_chaos_loses_nothing(capsys):
    """A few programs while a replica dies, pauses, loses its link, and the router dies."""
    asked = ["--programs", "60", "--replicas", "2", "--pause", "1.5", "--every", "0.2"]
    assert router_chaos.main(asked) == 0, capsys.readouterr().out
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"kill", "pause"} <= result["troubles"].keys()


def test_link_takes_its_namespace_along(tmp_path):
    """When the link is given up, namespace and devices are gone."""
    link = router_chaos.make_link(tmp_path)
    if link is None:
        pytest.skip("network namespaces cannot be made here")
    name = f"chaos{os.getpid()}"
    assert (Path("/sys/class/net") / name).exists()
    link.stop()
    deadline_s = time.monotonic() + 5
    while (Path("/sys/class/net") / name).exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not (Path("/sys/class/net") / name).exists()
