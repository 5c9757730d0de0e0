"""The command line of the live benchmark, and how it makes its result."""

import json
import os
import shlex
from contextlib import contextmanager

import pytest

from bench import serve, synthetic
from bench.replay import ReplayOptions, replay
from bench.server import Endpoint, ServerError
from bench.stats import CallRecord, Outcome, ProgramRecord, Run
from bench.testing import FakeServer
from bench.trace import sample


def test_defaults_come_from_the_options_class():
    """An empty command line gives exactly the defaults written in `ServeOptions`."""
    assert serve.parse_options([]) == serve.ServeOptions()


def test_options_are_read_from_the_command_line():
    """Repeated, comma separated and quoted options arrive as tuples."""
    line = (
        "--policies off,mlfq,plas --trace a.jsonl --trace b.jsonl.gz --rate 2.5 --no-identify "
        "--base-url off=http://h:1/ --repeat 3 --html x.html --server-args '--dtype float32'"
    )

    options = serve.parse_options(shlex.split(line))

    assert options.policies == ("off", "mlfq", "plas")
    assert options.trace == ("a.jsonl", "b.jsonl.gz")
    assert options.trace_name == "a + b"
    assert (options.rate, options.repeat, options.identify) == (2.5, 3, False)
    assert options.base_url == (("off", "http://h:1"),)
    assert options.server_flags[-2:] == ("--dtype", "float32")


@pytest.mark.parametrize("preset", ["quick", "demo"])
def test_presets_change_defaults_and_yield_to_explicit_options(preset):
    """A preset fills in what is not given; what is given wins, wherever it stands."""
    values = {"quick": serve.QUICK, "demo": serve.DEMO}[preset]

    plain = serve.parse_options([f"--{preset}"])
    given = serve.parse_options(["--programs", "5", f"--{preset}"])

    assert {name: getattr(plain, name) for name in values} == dict(values)
    assert (given.programs, given.scale) == (5, values["scale"])


@pytest.mark.parametrize(
    "line",
    ["--programs 0", "--rate -1", "--base-url off", "--workload x", "--policies off,off", "--nope"],
)
def test_options_that_make_no_sense_end_with_a_message(line, capsys):
    """A wrong value is refused before any server is started."""
    with pytest.raises(SystemExit) as exit_:
        serve.parse_options(line.split())

    assert exit_.value.code == 2
    assert line.split()[0].removeprefix("--") in capsys.readouterr().err


def finished(start: float, finish: float, tokens: int) -> ProgramRecord:
    call = CallRecord("0", Outcome.OK, issue_s=start, finish_s=finish, num_output=tokens)
    return ProgramRecord("p", "chat", 0.0, start, (call,))


def test_capacity_counts_what_finished_while_the_engine_was_full():
    """Tokens in the last two thirds count, up to the last start if programs ran out before."""
    waiting = ProgramRecord("p", "chat", 0.0, 0.0, (CallRecord("0", Outcome.NOT_ISSUED),))
    busy = [finished(0.0, 2.0, 100), finished(0.0, 4.0, 10), finished(2.0, 8.0, 20)]

    endless = Run("c", (*busy, waiting), "")
    ran_out = Run("c", (*busy, finished(6.0, 11.0, 50)), "")

    assert serve.saturated_tokens_per_s(endless, deadline_s=9.0) == 30 / 6
    assert serve.saturated_tokens_per_s(ran_out, deadline_s=9.0) == 10 / 4


def test_a_burst_in_which_nothing_finished_is_an_error():
    """Capacity is not guessed: the message says what to change."""
    waiting = ProgramRecord("p", "chat", 0.0, 0.0, (CallRecord("0", Outcome.NOT_ISSUED),))

    with pytest.raises(ServerError, match="longer --calibration-s"):
        serve.saturated_tokens_per_s(Run("c", (waiting,), ""), 5.0)


@pytest.mark.parametrize("load", [0.5, 2.0])
def test_load_is_relative_to_measured_capacity(load, monkeypatch):
    """The rate times the mean tokens of a program is the load times the capacity."""
    monkeypatch.setattr(serve, "measure_capacity", lambda *_: 400.0)
    mix = sample(synthetic.corpora("react", 6, 0), 6, 0, factor=0.1)
    options = serve.parse_options(["--load", str(load)])

    offered = serve.offered_load("http://x", mix, options, serve.Limits(4, None))

    tokens = sum(program.output_tokens for program in mix.programs) / 6
    assert offered.rate * tokens == pytest.approx(load * 400.0)
    assert offered.load == load


async def test_the_result_has_the_keys_of_the_contract(capsys):
    """A result made of real runs is JSON with the keys of every benchmark, one entry per policy."""
    mix = sample(synthetic.corpora("react", 4, 0), 4, 0, factor=0.05, max_calls=3)
    options = serve.parse_options(["--policies", "off,plas", "--repeat", "2"])
    runs: dict[str, list[Run]] = {}
    for policy, slots in (("off", 1), ("plas", 4)):
        async with FakeServer(slots=slots, token_s=0.002).listen() as url:
            replay_options = ReplayOptions(base_url=url)
            runs[policy] = [
                await replay(policy, mix.programs, [0.0] * 4, replay_options) for _ in range(2)
            ]

    result = json.loads(
        json.dumps(serve.make_result(runs, mix, options, serve.Offered(1.0, 0.9, 100.0)))
    )

    contract = {
        "policy", "program_token_latency_ms", "program_response_s", "engine_tokens_per_s",
        "preemptions", "prefix_hit_rate", "wait_share", "lost",
    }  # fmt: skip
    assert {"trace", "load", "results"} <= set(result)
    assert [entry["policy"] for entry in result["results"]] == ["off", "plas"]
    assert all(contract <= set(entry) for entry in result["results"])
    assert len(result["runs"]) == 4
    assert result["identical_outputs"] is True
    assert len(serve.result_table(result).splitlines()) == 5


def test_policies_on_one_server_are_selected_before_each_of_their_runs():
    """Runs alternate, each selects its policy, and no program id comes twice."""
    mix = sample(synthetic.corpora("react", 2, 0), 2, 0, factor=0.05, max_calls=2)
    options = serve.parse_options(["--policies", "mlfq,plas", "--repeat", "2"])
    fake = FakeServer()

    with fake.listen_in_thread() as url:
        endpoints = {p: Endpoint(p, url, is_shared=True) for p in options.policies}
        runs = serve.run_all(endpoints, mix, options, rate=1000.0)

    assert [change["policy"] for change in fake.config_changes] == ["mlfq", "plas"] * 2
    assert {policy: len(repeats) for policy, repeats in runs.items()} == {"mlfq": 2, "plas": 2}
    assert len({call.headers["x-program-id"] for call in fake.calls}) == 2 * 2 * 2


def test_a_policy_that_learns_begins_each_run_with_nothing_learned():
    """Its server is started anew, or it would know the programs from the runs before."""

    class Started:
        pid = os.getpid()
        num_restarts = 0

        def restart(self) -> None:
            self.num_restarts += 1

        def check_alive(self) -> None:
            pass

    mix = sample(synthetic.corpora("react", 2, 0), 2, 0, factor=0.05, max_calls=2)
    options = serve.parse_options(["--policies", "off,plas,gittins", "--repeat", "2"])
    fake, servers = FakeServer(), {policy: Started() for policy in options.policies}
    with fake.listen_in_thread() as url:
        endpoints = {p: Endpoint(p, url, servers[p], p != "off") for p in options.policies}
        serve.run_all(endpoints, mix, options, rate=1000.0)

    assert {p: s.num_restarts for p, s in servers.items()} == {"off": 0, "plas": 0, "gittins": 2}


def test_a_missing_trace_ends_before_servers_are_started(monkeypatch, capsys):
    """What can be known to be wrong at once costs no server start."""

    @contextmanager
    def never(*_):
        pytest.fail("a server was started")
        yield

    monkeypatch.setattr(serve, "policy_servers", never)

    assert serve.main(["--trace", "/nowhere/t.jsonl"]) == 1
    assert "/nowhere/t.jsonl" in capsys.readouterr().err
