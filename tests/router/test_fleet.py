"""Replicas as real processes: started, watched, killed, paused, started again, and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("zmq")

from autellix_sglang import launch
from autellix_sglang.errors import ConfigError
from autellix_sglang.router import fleet
from autellix_sglang.router.config import RouterConfig
from autellix_sglang.router.testing import output_of
from tests.router.conftest import FAST, Rig

FAKE = [sys.executable, "-m", "autellix_sglang.router.testing", "--speed", "20"]


def commands(*argv: str) -> list[list[str]]:
    """What `launch` would run for each replica, from the flags that set it apart on."""
    namespace, rest = launch.parse(argv)
    made = fleet.replica_commands(namespace, rest, argv, RouterConfig(endpoint="ipc:///x"))
    assert all(command[1:3] == ["-m", "autellix_sglang.launch"] for command in made)
    return [command[3:] for command in made]


def test_each_replica_gets_its_own_gpus_port_and_name():
    """Replicas differ in GPUs, port and name, and share all other flags of the user."""
    argv = (
        "--replicas",
        "3",
        "--port",
        "1234",
        "--tp",
        "2",
        "--base-gpu-id=4",
        "--program-beta",
        "2",
    )
    found = commands(*argv)
    shared = ["--tp", "2", "--program-beta", "2", "--host", "127.0.0.1", "--port"]
    assert [command[:7] for command in found] == [shared] * 3
    assert len({command[7] for command in found} | {"1234"}) == 4
    assert [command[9] for command in found] == ["4", "6", "8"]
    assert [command[-1] for command in found] == ["replica-0", "replica-1", "replica-2"]
    assert all(command[-4:-2] == ["--router-endpoint", "ipc:///x"] for command in found)


def test_the_step_between_gpus_counts():
    """With two ranks two GPUs apart the next replica begins four further on."""
    found = commands("--replicas", "2", "--tp", "2", "--gpu-id-step", "2")
    assert [command[command.index("--base-gpu-id") + 1] for command in found] == ["0", "4"]


@pytest.mark.parametrize(
    "given",
    [["--ssl-keyfile", "k"], ["--ssl-certfile=c"], ["--nccl-port", "1"], ["--dist-init-addr=a:1"]],
)
def test_what_replicas_cannot_share_is_refused(given):
    """Behind a router in clear text TLS would be a promise that nobody keeps."""
    with pytest.raises(ConfigError, match=f"{given[0].partition('=')[0]}: not supported"):
        commands("--replicas", "2", *given)


def test_no_replica_is_given_the_port_of_the_router(monkeypatch):
    """The router binds its own only when the replicas have theirs."""
    other, routers = fleet.free_ports(2)
    drawn = iter([routers, other])
    monkeypatch.setattr(fleet.random, "randrange", lambda *_: next(drawn))
    assert fleet.free_ports(1, besides=routers) == [other]


@pytest.mark.parametrize(
    ("first", "num_ranks", "node"), [(0, 1, 0), (3, 1, 1), (4, 2, 0), (1, 2, 0)]
)
def test_replicas_on_a_cpu_share_its_groups_of_cores(monkeypatch, first, num_ranks, node):
    """SGLang takes a GPU's number for a group of cores; every replica is given one that exists."""
    pytest.importorskip("sglang")
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    asked = SimpleNamespace(base_gpu_id=first, tp_size=num_ranks, pp_size=1)
    assert launch._first_cpu_node(asked) == node


def test_number_that_is_none_is_named():
    """A size that is not a number is refused before anything is started."""
    with pytest.raises(ConfigError, match="--tp"):
        commands("--replicas", "2", "--tp", "two")


class Fakes:
    """A fleet of fake replicas behind the rig's router."""

    def __init__(self, rig, names, first_pause_s=0.05):
        self.rig = rig
        self.log: list[str] = []
        self.given_up = 0
        replicas = [fleet.Replica(name, self.command(name), dict(os.environ)) for name in names]
        self.fleet = fleet.Fleet(
            replicas,
            lambda: rig.hub.num_ready,
            rig.hub.expect_end,
            self.give_up,
            self.log.append,
            first_pause_s=first_pause_s,
        )

    def command(self, name):
        return [*FAKE, "--router-endpoint", self.rig.endpoint, "--worker-name", name]

    def give_up(self):
        self.given_up += 1

    async def wait_ready(self, count):
        await self.rig.until(lambda: self.rig.hub.num_ready == count, 30)


@pytest.fixture
async def fakes(rig):
    client = await rig.route(worker_wait_s=20)
    made = Fakes(rig, ["w0", "w1"])
    made.client = client
    await made.fleet.start()
    yield made
    await made.fleet.stop()
    assert all(replica.pid is None for replica in made.fleet.replicas)


def prompt_of(i: int) -> list[int]:
    return [i % 251] * (i % 90 + 10)


async def ask(client, i: int, stream: bool) -> list[int] | str:
    """The output of call i, or how it failed; anything else is a lost call."""
    params = {"max_new_tokens": 12}
    body = {"input_ids": prompt_of(i), "sampling_params": params, "stream": stream}
    answer = await client.post("/generate", json=body, headers={"x-program-id": f"p{i // 4}"})
    if not stream:
        return answer.json()["output_ids"] if answer.status_code == 200 else "error"
    events = [e.removeprefix("data: ") for e in answer.text.split("\n\n") if e]
    if events[-1] != "[DONE]":
        assert '"error"' in events[-1], events[-1]
        return "error"
    output_ids: list[int] = json.loads(events[-2])["output_ids"]
    return output_ids


async def test_chaos_loses_no_call(fakes):
    """Under kill -9 and SIGSTOP every call ends once: in its result, or in an explicit error.

    Calls that do not stream are retried, so of those none fails, though the router is away now and
    then for longer than its workers wait; results are those of an undisturbed run.
    """
    await fakes.wait_ready(2)
    limit = asyncio.Semaphore(40)

    async def one(i: int) -> list[int] | str:
        async with limit:
            return await ask(fakes.client, i, stream=i % 2 == 0)

    calls = [asyncio.create_task(one(i)) for i in range(1200)]
    for round_ in range(4):
        await asyncio.sleep(0.4)
        victim = fakes.fleet.replicas[round_ % 2]
        if victim.pid is None:
            continue
        os.kill(victim.pid, signal.SIGKILL if round_ < 2 else signal.SIGSTOP)
        if round_ >= 2:
            await asyncio.sleep(3 * FAST["timeout_s"])
            os.kill(victim.pid, signal.SIGCONT)
        else:
            time.sleep(1.5 * FAST["timeout_s"])
        await fakes.wait_ready(2)
    answers = await asyncio.gather(*calls)
    expected = [output_of(prompt_of(i), 12) for i in range(1200)]
    wrong = [a for a, e in zip(answers, expected, strict=True) if a not in (e, "error")]
    assert wrong == []
    assert "error" not in answers[1::2]
    assert answers.count("error") < 200
    await fakes.rig.until(lambda: fakes.rig.num_streams == 0)


async def test_end_of_a_local_replica_is_known_at_once(rig):
    """Its calls run elsewhere without waiting for its silence to last."""
    client = await rig.route(timeout_s=60.0, worker_wait_s=20)
    made = Fakes(rig, ["w0"], first_pause_s=60.0)
    await made.fleet.start()
    await made.wait_ready(1)
    body = {"input_ids": prompt_of(1), "sampling_params": {"max_new_tokens": 2000}}
    call = asyncio.create_task(client.post("/generate", json=body))
    await rig.until(lambda: rig.num_streams == 2)
    os.kill(made.fleet.replicas[0].pid, signal.SIGKILL)
    await rig.join("b")
    async with asyncio.timeout(5):
        assert (await call).json() == {"worker": "b", "tokens": [0, 1, 2]}
    await made.fleet.stop()


async def test_killed_replica_is_started_again(fakes):
    """A replica that dies comes back under its name, and its log lines carry it."""
    await fakes.wait_ready(2)
    victim = fakes.fleet.replicas[0]
    os.kill(victim.pid, signal.SIGKILL)
    await fakes.rig.until(lambda: victim.num_starts == 2 and victim.pid is not None, 20)
    await fakes.wait_ready(2)
    assert {line[:5] for line in fakes.log} == {"[w0] ", "[w1] "}


async def keep(command, condition, write=lambda line: None):
    """Run a fleet of one until the condition holds of (replica, times it gave up)."""
    given_up = []
    replica = fleet.Replica("w", command, dict(os.environ))
    made = fleet.Fleet(
        [replica],
        lambda: 1,
        lambda name: None,
        lambda: given_up.append(1),
        write,
        first_pause_s=0.01,
    )
    await made.start()
    try:
        await Rig.until(lambda: condition(replica, len(given_up)), 20)
    finally:
        await made.stop()
    return replica


def script(text, *argv):
    return [sys.executable, "-c", text, *argv]


async def test_replica_that_ran_is_started_again_whatever_its_status(tmp_path):
    """Status 2 of a restart stops nothing, and each restart has a port of its own."""
    log = tmp_path / "ports"
    text = (
        "import sys; ports = open(sys.argv[3], 'a+'); ports.write(sys.argv[2] + '\\n'); "
        "ports.flush(); ports.seek(0); sys.exit(2 if len(ports.readlines()) > 1 else 1)"
    )
    command = script(text, "--port", "1", str(log))
    await keep(command, lambda replica, given_up: given_up or replica.num_starts >= 4)
    ports = log.read_text().split()
    assert len(ports) >= 3 and len(set(ports)) == len(ports)


async def test_replica_is_watched_on_where_no_process_or_log_is_to_be_had(caplog):
    """A program that cannot be executed is tried again; a log that nobody reads ends nothing."""
    missing = ["/nowhere/python"]
    count = "could not be started"
    await keep(missing, lambda *_: sum(count in r.getMessage() for r in caplog.records) > 1)

    def write(line):
        lines.append(line)
        if len(lines) % 2:
            raise BrokenPipeError
        line.encode("ascii")

    lines = []
    text = "import time\nfor i in range(4): print('\u00fc', flush=True)\ntime.sleep(60)"
    replica = await keep(script(text), lambda *_: len(lines) == 4, write)
    assert replica.num_starts == 1


async def test_a_replica_whose_port_is_taken_is_started_again_on_another():
    """Ports were free a moment before; a collision at the first start ends no fleet."""
    ended = f"import sys; sys.exit({os.EX_TEMPFAIL})"
    replica = await keep(script(ended), lambda r, given_up: given_up or r.num_starts >= 2)
    assert replica.num_starts >= 2


async def test_end_of_a_replica_is_noticed_while_its_child_holds_the_log():
    """What a dead replica left behind, in its process group or out of it, does not hide its end."""
    text = (
        "import subprocess, sys; print('last words', flush=True); "
        "subprocess.Popen(['sleep', '30'], start_new_session=sys.argv[1] == 'out')"
    )
    for where in ("in", "out"):
        lines = []
        began_s = asyncio.get_running_loop().time()
        await keep(script(text, where), lambda r, _: r.num_starts >= 2, lines.append)
        assert asyncio.get_running_loop().time() - began_s < 25
        assert lines[0] == "[w] last words"


async def test_refused_arguments_are_not_tried_again(rig):
    """A replica that ends with status 2 is not restarted; the fleet gives up."""
    await rig.route()
    made = Fakes(rig, ["w0"])
    made.fleet.replicas[0]._command.append("--no-such-flag")
    await made.fleet.start()
    await rig.until(lambda: made.given_up == 1, 30)
    assert made.fleet.replicas[0].num_starts == 1
    assert any("--no-such-flag" in line for line in made.log)
    await made.fleet.stop()
