"""The paper's figures at a tiny size: every one simulates, draws and says something."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from bench import charts, paper, paper_validation, synthetic
from bench.charts import Series
from bench.paper import FIGURES, Store, render, run_cells
from bench.paper_base import VERDICTS, Size, Sweep
from bench.paper_engine import PAPER_WAITS, _fig2_srpt, _fig2_timeline
from bench.paper_runs import cell, load_run, offline, placement, starvation, swap, without_cache

TINY = Size(
    minutes=0.5,
    loads=(0.5, 2.0),
    large_minutes=0.5,
    large_loads=(0.5, 2.0),
    wait_loads=(0.5, 0.9),
    steady_minutes=0.5,
    size_minutes=0.5,
    hit_programs=10,
    offline=(20,),
    swap_minutes=0.5,
    swap_loads=(1.5,),
    starvation_minutes=2.0,
    passes=1,
    replica_minutes=0.5,
    replicas=(1, 2),
    replica_loads=(0.5, 3.0),
    slots=8,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("paper") / "runs.jsonl", "v", is_resumed=False)


@pytest.mark.parametrize("number", FIGURES)
def test_a_figure_simulates_draws_and_says_whether_it_agrees(number, store):
    """Each has a chart, a table with the paper's and SRPT's columns, and a verdict."""
    figure = FIGURES[number]

    [(_, found)] = paper.reproduce([number], TINY, store, num_processes=1)

    assert found.verdict in VERDICTS
    assert any(found.charts)
    assert all(len(row) == len(found.header) for row in found.rows) and found.rows
    table = " ".join(str(cell) for row in (found.header, *found.rows) for cell in row)
    assert "paper" in table and "srpt" in table.lower()
    assert re.search(r"\d", found.answer) and "nan" not in found.answer
    json.dumps(found.data, allow_nan=False)
    html = render([(figure, found)], {"size": {}})
    ElementTree.fromstring(html[html.index("<main>") : html.index("</body>")])
    assert "<script" not in html


def test_fig_2_waits_what_the_paper_counts_where_bounds_allow():
    """Stock order and plas wait 18 and 12 units, and no order less than clairvoyance."""
    waits = {policy: _fig2_timeline(policy)[1] for policy in PAPER_WAITS}
    steps, least = _fig2_srpt()

    assert (waits["fcfs"], waits["plas"]) == (PAPER_WAITS["fcfs"], PAPER_WAITS["plas"])
    assert least == 7 and least <= min(waits.values())
    assert all(len(ran) <= 2 for ran in steps)
    assert sum(map(len, steps)) == sum(len(ran) for ran in _fig2_timeline("fcfs")[0])


def test_without_a_cache_a_program_does_the_same_in_the_same_order():
    """Only what is found in the cache differs: calls, outputs and dependencies stay."""
    (program,) = synthetic.generate("tree", 1, 3)
    uncached = without_cache(program)

    for before, after in zip(program.calls, uncached.calls, strict=True):
        assert (after.prompt_tokens, after.output_tokens) == (
            before.prompt_tokens,
            before.output_tokens,
        )
        assert set(uncached.waits_for(after)) == set(program.waits_for(before))
        assert (after.reused_tokens, after.shared_prefix_tokens) == (0, 0)


def test_a_prefix_cache_makes_the_same_load_faster():
    """The `vllm` baseline recomputes what `fcfs` finds, so it is slower at the same rate."""
    size = {"load": 1.0, "minutes": 1.0, "slots": 8, "device": "a100-8b", "largest": 1.0}
    cached, uncached = (load_run("chat", policy, **size) for policy in ("fcfs", "vllm"))

    assert uncached["rate"] == cached["rate"]
    assert uncached["latency_ms"]["mean"] > cached["latency_ms"]["mean"]


def test_all_programs_at_once_take_as_long_as_the_work_does():
    """No order can end much later or sooner than another when the batch is full throughout."""
    fcfs, plas = (offline(policy, 40, 8)["makespan_s"] for policy in ("fcfs", "plas"))

    assert plas == pytest.approx(fcfs, rel=0.25)


def test_swapping_moves_what_was_preempted_and_nothing_else():
    """Stock order preempts nobody and copies nothing; attained service does both."""
    stock, plas = (swap(policy, 2.0, 1.0, 8) for policy in ("fcfs", "plas"))

    assert (stock["transfers"], stock["blocks"]) == (0, 0.0)
    assert plas["transfers"] > 0 and plas["blocks"] > 0


def test_rates_at_equal_latency_are_bounded_where_a_curve_does_not_cross():
    """A ratio is exact where both curves cross the level, a bound where only the baseline does."""

    def points(*latencies):
        loads = (1.0, 2.0, 4.0)
        return {
            load: {"rate": 3 * load, "latency_ms": {"mean": ms}}
            for load, ms in zip(loads, latencies, strict=True)
        }

    sweep = Sweep(
        "chat", {"fcfs": points(10, 20, 80), "a": points(10, 10, 20), "b": points(9, 9, 9)}
    )

    assert sweep.capacity == 3.0
    assert sweep.levels_ms() == {"2x": 20.0, "4x": 40.0, "300 ms": 300.0, "500 ms": 500.0,
                                 "1000 ms": 1000.0}  # fmt: skip
    largest = sweep.best("a", "fcfs")
    assert largest == (pytest.approx(2.0), False, pytest.approx(20.0, rel=0.01))
    assert str(sweep.best("b", "fcfs")) == "> 2.52"
    assert sweep.ratios("fcfs", "b") == []
    assert sweep.at_paper_level("a", "fcfs") is None
    assert sweep.best("fcfs", "fcfs").value == pytest.approx(1.0)


class Curves(dict):
    """Results of cells that were never run: a latency by what the cell asks for."""

    def __init__(self, latency_ms):
        super().__init__()
        self.latency_ms = latency_ms

    def __missing__(self, wanted):
        asked = dict(wanted.arguments)
        ms = self.latency_ms(**asked)
        rate = asked["load"] * asked.get("replicas", 1)
        return {"rate": rate, "latency_ms": dict.fromkeys(("mean", "p95", "p99"), ms)}


@pytest.mark.parametrize(
    ("at_3", "num_better", "verdict"), [(10.0, 8, "agrees"), (200.0, 0, "partly")]
)
def test_tails_are_judged_at_every_load(at_3, num_better, verdict):
    """To be far ahead at one level is not enough where another load is worse."""
    theirs = {0.5: 10.0, 1.0: 30.0, 2.0: 60.0, 3.0: 110.0}
    ours = {0.5: 10.0, 1.0: 10.0, 2.0: 10.0, 3.0: at_3}

    def latency_ms(policy, load, **_):
        return (theirs if policy in ("fcfs", "mlfq", "vllm") else ours)[load]

    size = Size(loads=tuple(theirs), slots=8)
    found = FIGURES["13"].find(size, Curves(latency_ms))

    assert found.verdict == verdict
    assert f"in {num_better} of 8 scenarios" in found.answer
    assert re.search(r"[\d.]+ to [\d.]+ times their rate", found.answer)


@pytest.mark.parametrize("number", ["14", "15"])
def test_replicas_that_never_queue_are_nothing_to_compare(number):
    """Where no curve crosses the level there is no rate, and no agreement."""
    found = FIGURES[number].find(TINY, Curves(lambda **_: 10.0))

    assert found.verdict == "nothing to compare"


def test_many_replicas_have_to_sustain_as_many_times_the_rate():
    """Linear where all curves cross the level at one load, not where many cross it sooner."""

    def verdict(crossing):
        size = Size(replicas=(1, 8), replica_loads=(0.5, 1.0, 2.0))
        found = FIGURES["15"].find(
            size, Curves(lambda replicas, load, **_: 50.0 if load >= crossing[replicas] else 10.0)
        )
        return found.verdict

    assert verdict({1: 1.0, 8: 1.0}) == "agrees"
    assert verdict({1: 2.0, 8: 1.0}) == "disagrees"


def test_replicas_are_loaded_for_minutes():
    """So many programs come to two replicas at twice the load of one that calls have to wait."""
    size = {"minutes": 1.0, "slots": 8, "largest": 4.0, "policy": "plas", "workload": "chat"}
    low, high = (placement("autellix", replicas=2, load=load, **size) for load in (0.5, 4.0))

    assert high["rate"] == pytest.approx(8 * low["rate"])
    assert low["wait_share"] < 0.05 < 0.5 < high["wait_share"]


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path):
    """Finished simulations of the same version are read back; others are done again."""
    cells = [cell("hits", workload="chat", programs=n) for n in (2, 3)]
    path = tmp_path / "runs.jsonl"
    first = run_cells(cells[:1], Store(path, "v", is_resumed=False), 1)
    resumed = Store(path, "v", is_resumed=True)

    assert list(resumed.known) == [cells[0].key]
    assert run_cells(cells, resumed, 1)[cells[0]] == first[cells[0]]
    assert len(path.read_text().splitlines()) == 2
    assert not Store(path, "another", is_resumed=True).known


def test_two_processes_give_the_same_results(tmp_path):
    """Cells are computed anywhere alike."""
    cells = [cell("hits", workload=w, programs=3) for w in ("chat", "react")]
    one, two = (
        run_cells(cells, Store(tmp_path / str(n), "v", is_resumed=False), n) for n in (1, 2)
    )

    assert one == two


def test_an_unknown_figure_is_refused_by_name(capsys):
    """The message lists the figures there are."""
    with pytest.raises(SystemExit):
        paper.parser().parse_args(["--figures", "2,99"])

    assert "unknown figure 99" in capsys.readouterr().err


def test_promotion_keeps_its_promise_and_nothing_else_does():
    """On four slots in a stable run: with beta no program is owed more, without it one is."""
    size = {"workload": "react", "load": 0.9, "minutes": 20.0, "slots": 4}
    on, off = (starvation(beta=beta, **size) for beta in (8.0, 0.0))

    assert on["worst"] <= 1.0 < off["worst"]
    assert on["promotions"] > 0 == off["promotions"]
    assert all(waited > 0 for _, waited in on["points"])


def test_the_page_says_how_far_the_simulator_is_from_the_live_engine():
    """One row per trace and load, with the errors as they were saved."""
    summary = {
        "program_token_latency_ms": {"mean": 10.0, "p95": 20.0},
        "wait_share": 0.0012,
        "preemptions": 7,
    }
    result = {
        "load": 0.8,
        "live": {"chat": summary},
        "simulated": {"chat": summary},
        "errors": {"chat": {"program_token_latency_ms": {"mean": -0.04, "p95": 0.2}}},
        "within": {"chat": False},
    }
    html = paper_validation.section([result])

    assert "0 of 1 runs" in html and "largest error is 20 %" in html
    assert "-4 %" in html and "+20 %" in html
    assert "In 0 of them calls waited" in html
    assert html.count("0.0012") == 2 and html.count(">7<") == 2
    assert paper_validation.section([]) == ""


def test_charts_leave_out_what_cannot_be_drawn():
    """No points, no chart; zero has no place on a logarithmic axis."""
    assert charts.lines("t", [Series("s", "p0", [])], "x", "y") == ""
    assert charts.bars("t", ["g"], [Series("s", "p0", [(0, 0.0)])], "y", is_log_y=True) == ""
    drawn = charts.lines("t", [Series("s", "p0", [(1, 0.0), (2, 5.0)])], "x", "y", is_log_y=True)
    assert drawn.count("<circle") == 1
