"""The bars of the learning policy: how workloads shift, how verdicts are made, one small run."""

import argparse
import json
from collections import Counter

from bench.gittins import ALIKE, Limit, Verdict, cases, cut, grown, main, swapped
from bench.sim import Setup
from bench.sim_device import PRESETS
from bench.sim_engine import Kinds, blueprint
from bench.synthetic import corpora, generate
from bench.trace import sample, save


def plans_of(workload, count=30, kinds=Kinds.NAME):
    mix = sample(corpora(workload, count, 0), count, 0)
    return [blueprint(program, kinds) for program in mix.programs]


def kind_of(plan):
    """The corpus that the policy is told."""
    return plan.ladder[-1][-1]


def test_swapped_kinds_arrive_under_the_next_name_from_the_middle_on():
    """The first half is what it says; then every corpus goes by the name of another."""
    drawn = swapped(plans_of("mixed"))(40)

    assert all(kind_of(plan) == plan.trace.corpus for plan in drawn[:20])
    pairs = Counter((kind_of(plan), plan.trace.corpus) for plan in drawn[20:])
    assert len(pairs) == len(ALIKE)
    assert all(name != corpus for name, corpus in pairs)


def test_grown_programs_look_like_the_small_ones():
    """All arrive under one name; those of the second half are another corpus's."""
    drawn = grown(plans_of("chat"), plans_of("tree"))(20)

    assert {kind_of(plan) for plan in drawn} == {"synthetic-chat"}
    assert {plan.trace.kind for plan in drawn[10:]} == {"tree"}


def test_programs_that_are_cut_look_the_same_and_are_over_sooner():
    """From the middle on a tree has the calls of its first two steps; chats stay as they are."""
    plans = [*plans_of("tree", 3), *plans_of("chat", 3)]
    drawn = cut(plans)(12)

    assert drawn[:6] == plans
    assert drawn[9:] == plans[3:]
    for before, after in zip(plans[:3], drawn[6:9], strict=True):
        assert after.ladder == before.ladder
        calls = after.trace.calls
        assert calls == before.trace.calls[: len(calls)]
        assert 1 < len(calls) < len(before.trace.calls)


def test_the_wide_mix_is_the_recorded_one_and_more(tmp_path):
    """It holds the programs of all files, and both mixes are judged and swapped."""
    chat, react = tmp_path / "chat.jsonl", tmp_path / "react.jsonl"
    save(generate("chat", 5, 0), chat)
    save(generate("react", 5, 0), react)
    options = argparse.Namespace(traces=[chat], wide=[react], scale=1.0, max_calls=None)
    setup = Setup(device=PRESETS["a100-8b"], window_s=1.0)
    found = {case.name: case for case in cases(options, setup, 1.0)}

    assert {p.trace.kind for p in found["recorded"].reference} == {"chat"}
    assert {p.trace.kind for p in found["wide"].reference} == {"chat", "react"}
    assert {"recorded swap", "wide swap"} < set(found)


def test_a_verdict_is_of_the_median_over_seeds():
    """One bad seed of three does not miss a bar, two do; the worst is told in either case."""
    limit = Limit(("program_response_s", "p99"), "fcfs", 1.0)
    once, twice = (
        Verdict("mixed", 1.0, limit, values, 0.5) for values in [(0.8, 1.5, 0.9), (1.1, 0.9, 1.2)]
    )

    assert (once.value, once.worst, once.is_met) == (0.9, 1.5, True)
    assert (twice.value, twice.worst, twice.is_met) == (1.1, 1.2, False)
    assert once.row()[-1] == "met"


def test_a_cell_without_a_queue_is_marked():
    """Where stock order hardly makes a call wait, to be met says little, and the row says that."""
    limit = Limit(("program_response_s", "p99"), "fcfs", 1.0)
    idle = Verdict("chat", 0.8, limit, (1.0,), 0.002)

    assert idle.row()[-2:] == [0.002, "met, no queue"]
    assert idle.as_json()["verdict"] == "met" and idle.as_json()["has_queue"] is False


def test_the_command_judges_every_bar(capsys):
    """A short run says value and verdict of each bar, and counts the missed ones."""
    argv = ["--minutes", "0.3", "--loads", "1.5", "--seeds", "1", "--slots", "4"]
    status = main(argv)

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == (result["num_missed"] > 0)
    named = Counter(bar["case"] for bar in result["bars"])
    assert named == {"mixed": 2, "chat": 1, "react": 1, "tree": 1, "swap": 1, "grow": 1}
    assert result["num_missed"] == sum(bar["verdict"] == "missed" for bar in result["bars"])
    assert all(bar["value"] > 0 for bar in result["bars"])
    assert result["num_without_queue"] == sum(not bar["has_queue"] for bar in result["bars"])
