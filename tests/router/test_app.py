"""The front door: its own routes, requests about programs, and answers of many workers as one."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from urllib.parse import quote, urlencode

import pytest
from prometheus_client.parser import text_string_to_metric_families

pytest.importorskip("zmq")

import uvicorn

from autellix_sglang.errors import ConfigError
from autellix_sglang.router import everywhere
from autellix_sglang.router.__main__ import serve
from autellix_sglang.router.app import RouterApp, _beginnings, _num_tokens, _program_id
from autellix_sglang.router.config import (
    RouterConfig,
    WorkerConfig,
    add_arguments,
    check_endpoint,
    from_arguments,
)
from autellix_sglang.router.everywhere import Reply
from autellix_sglang.router.hub import Hub
from autellix_sglang.router.metrics import OF_ROUTER, OF_WORKER, PREFIX, exposition

# -- own routes ----------------------------------------------------------------------------------


async def test_overview_shows_every_worker(rig):
    """GET /workers tells state, load, programs and cache use; /health how many are ready."""
    client = await rig.route()
    await rig.join("a", "b")
    for i in range(3):
        await client.post("/generate", json={}, headers={"x-program-id": f"p{i}"})
    overview = (await client.get("/workers")).json()
    assert (overview["policy"], overview["programs"], overview["retries"]) == ("autellix", 3, 0)
    assert {w["id"] for w in overview["workers"]} == {"a", "b"}
    assert sum(w["programs"] for w in overview["workers"]) == 3
    assert all(w["state"] == "ready" and w["slots"] == 4 for w in overview["workers"])
    health = await client.get("/health")
    assert (health.status_code, health.json()) == (200, {"ready_workers": 2})


async def test_router_metrics_are_the_overview_and_need_no_worker(rig):
    """Prometheus reads the router when no replica is there, and each of them when they are."""
    client = await rig.route()
    assert (await client.get("/metrics")).status_code == 503
    alone = (await client.get("/router_metrics")).text
    assert _samples(alone)[f"{PREFIX}open_calls", ""] == 0
    await rig.join("a", "b")
    for i in range(3):
        await client.post("/generate", json={}, headers={"x-program-id": f"p{i}"})
    samples = _samples((await client.get("/router_metrics")).text)
    overview = (await client.get("/workers")).json()
    for key in OF_ROUTER:
        suffix = "_total" if OF_ROUTER[key][0] == "counter" else ""
        assert samples[f"{PREFIX}{key}{suffix}", ""] == overview[key]
    for worker in overview["workers"]:
        name = worker["id"]
        assert samples[f"{PREFIX}worker_ready", name] == 1
        assert samples[f"{PREFIX}worker_ended_calls_total", name] == worker["ended_calls"]
        assert samples[f"{PREFIX}worker_programs", name] == worker["programs"]


def _samples(text: str) -> dict[tuple[str, str], float]:
    """Value by name and worker, as Prometheus reads them."""
    return {
        (sample.name, sample.labels.get("worker", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_labels_are_escaped():
    """A worker's name may hold anything."""
    worker = dict.fromkeys(OF_WORKER, 0) | {"id": 'a "b"\\c', "state": "draining"}
    text = exposition(dict.fromkeys(OF_ROUTER, 0) | {"workers": [worker]}).decode()
    assert _samples(text)[f"{PREFIX}worker_ready", 'a "b"\\c'] == 0


@pytest.mark.parametrize("path", ["/workers/nobody/drain", "/workers/a/explode", "/workers/a"])
async def test_unknown_worker_or_verb_is_404(rig, path):
    """The router does not pass on what looks like one of its own routes."""
    client = await rig.route()
    assert (await client.post(path)).status_code == 404


async def test_draining_needs_the_admin_key(rig):
    """With a key only its holder drains; without one only this machine does."""
    client = await rig.route(admin_key="k")
    await rig.join("a")
    assert (await client.post("/workers/a/drain")).status_code == 403
    wrong = {"authorization": "Bearer j"}
    assert (await client.post("/workers/a/drain", headers=wrong)).status_code == 403
    right = {"authorization": "Bearer k"}
    assert (await client.post("/workers/a/drain", headers=right)).status_code == 200
    far = RouterApp(Hub(RouterConfig()))
    assert not far._is_admin({"client": ("10.0.0.1", 5), "headers": []})
    assert far._is_admin({"client": ("::1", 5), "headers": []})


@pytest.mark.parametrize("header", ["origin", "forwarded", "x-forwarded-for", "x-forwarded-host"])
async def test_draining_without_a_key_is_not_for_those_behind_a_proxy(rig, header):
    """A request that a proxy or a browser on this machine passes on is not this machine's."""
    client = await rig.route()
    await rig.join("a")
    answer = await client.post("/workers/a/drain", headers={header: "127.0.0.1"})
    assert answer.status_code == 403
    assert not rig.hub.workers["a"].is_draining


def test_no_header_says_where_a_client_is(monkeypatch):
    """The server takes a client's address from its connection only."""
    seen = []

    class Server:
        started = True

        def __init__(self, config):
            seen.append(config)

        def run(self, sockets):
            sockets[0].close()

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert serve(Hub(RouterConfig(port=0))) == 0
    assert not seen[0].proxy_headers


# -- programs ------------------------------------------------------------------------------------


async def test_new_program_is_found_by_its_calls(rig):
    """POST /v1/programs without an id gets one on the way, and the program's calls follow it."""
    client = await rig.route()
    await rig.join("a", "b", "c")
    opened = await client.post("/v1/programs")
    headers = dict(opened.json()["headers"])
    home = opened.headers["x-router-worker"]
    given = {"x-program-id": headers["x-program-id"]}
    assert (await client.post("/generate", json={}, headers=given)).json()["worker"] == home


async def test_program_is_asked_for_and_ended_where_it_is(rig):
    """GET and DELETE on a program reach its worker; ended, nothing is remembered of it."""
    client = await rig.route()
    await rig.join("a", "b", "c")
    given = {"x-program-id": "some/p"}
    home = (await client.post("/generate", json={}, headers=given)).json()["worker"]
    assert (await client.get("/v1/programs/some/p")).json()["worker"] == home
    assert (await client.delete("/v1/programs/some/p")).json()["worker"] == home
    assert len(rig.hub.programs) == 0


async def test_unknown_program_is_looked_for_everywhere(rig):
    """A program that the router has not seen is asked for on every worker."""
    client = await rig.route()
    await rig.join("a", "b")
    await client.get("/v1/programs/unheard-of")
    assert [len(replica.seen) for replica in rig.replicas.values()] == [1, 1]


def body_of(**fields) -> bytes:
    return json.dumps({"text": "hello", **fields}).encode()


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ([], b"", None),
        ([], b"not json custom_params", None),
        ([], b'["custom_params"]', None),
        ([(b"x-program-id", b"h")], body_of(session_id="s"), "h"),
        ([(b"x-session-id", b"agent")], body_of(session_id="s"), "agent"),
        ([(b"x-session-id", b"agent")], body_of(custom_params={"program_id": "b"}), "b"),
        ([], body_of(session_id="s"), "s"),
        ([], body_of(session_id=7), None),
        ([(b"x-program-id", b"")], body_of(session_id="s"), None),
        ([], body_of(session_id="s" * 257), None),
        ([], body_of(session_id="line\nbreak"), None),
        ([], body_of(custom_params={"program_id": "b" * 257}), None),
    ],
)
def test_program_of_a_request_follows_the_order_of_identity(headers, body, expected):
    """The router finds the id that the replica will find; a malformed one is the replica's."""
    assert _program_id("/generate", headers, body) == expected


async def test_malformed_id_enters_no_table(rig):
    """However long an id in a body is, router and worker remember nothing of it."""
    client = await rig.route()
    await rig.join("a")
    long = "x" * 100_000
    for path, body in (
        ("/generate", {"session_id": long}),
        ("/generate", {"custom_params": {"program_id": long}}),
        ("/v1/programs", {"id": long}),
    ):
        await client.post(path, json=body)
    keys = [*rig.hub.programs._programs, *rig.agents["a"]._programs]
    assert max(map(len, keys), default=0) < 100


def test_length_is_the_callers_or_from_the_body():
    """A tokenised length comes from the header if it is a number, else from the body's size."""
    body = bytes(4000)
    assert _num_tokens({b"x-prompt-tokens": b"77"}, body) == 77
    assert _num_tokens({b"x-prompt-tokens": b"many"}, body) == 1000
    assert _num_tokens({}, b"") == 1


def test_requests_that_begin_alike_share_names():
    """Names are of the first 1, 4 and 16 KiB, as far as the body goes, and of all before."""
    one, other = _beginnings(b"a" * 5000 + b"b"), _beginnings(b"a" * 4096 + b"c" * 20_000)
    assert [tokens for _, tokens in other] == [256, 1024, 4096]
    assert one == other[:2]
    assert _beginnings(b"b" * 4096)[1] != other[1]
    assert _beginnings(b"short") == ()


# -- everywhere ----------------------------------------------------------------------------------


def reply(worker: str, value: object, status: int = 200) -> Reply:
    body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    return Reply(worker, status, [], body)


def test_lists_of_programs_become_one():
    """Each program says whose it is; a failing worker is not passed over in silence."""
    found = [
        reply("a", {"programs": [{"id": 1}], "next": None}),
        reply("b", {"programs": [{"id": 2}], "next": None}),
    ]
    assert json.loads(everywhere.merge_programs(found).body) == {
        "programs": [{"id": 1, "worker": "a"}, {"id": 2, "worker": "b"}],
        "next": None,
    }
    failed = reply("c", {"error": 1}, 503)
    assert everywhere.merge_programs([*found, failed]) == failed
    assert everywhere.merge_by_worker([*found, failed]) == failed


def test_pages_of_programs_go_on_where_each_worker_stopped():
    """The cursor names the workers that have more; without one, all are asked."""
    pages = [
        reply("a,b:c", {"programs": [], "next": 7}),
        reply("d", {"programs": [], "next": None}),
        reply("e", {"programs": [], "next": 12}),
    ]
    cursor = json.loads(everywhere.merge_programs(pages).body)["next"]
    query = f"state=idle&after={cursor}".encode()
    assert everywhere.next_pages(query) == {
        "a,b:c": b"state=idle&after=7",
        "e": b"state=idle&after=12",
    }
    assert everywhere.next_pages(b"limit=5") is None
    for bad in ("", "a", "a:", "a:x", "a:1,", "12"):
        with pytest.raises(ValueError, match="'after' must be the 'next'"):
            everywhere.next_pages(f"after={bad}".encode())


async def test_a_bad_cursor_is_a_400(rig):
    """A cursor that no page gave is refused by name, and no worker is asked."""
    client = await rig.route()
    await rig.join("a")
    answer = await client.get("/v1/programs?after=p")
    assert answer.status_code == 400 and "'after'" in answer.text
    assert rig.replicas["a"].seen == []


def test_metrics_are_labelled_and_each_family_is_in_one_piece():
    """Samples carry their worker, comments are not repeated, values stay as they are."""
    text = (
        '# HELP x text here\n# TYPE x counter\nx{m="a b"} 1\nx_total 2.5\n# TYPE y gauge\ny{} 3\n'
    )
    merged = everywhere.merge_metrics([reply("w1", text), reply('w"2', text)]).body.decode()
    assert merged.splitlines() == [
        "# HELP x text here",
        "# TYPE x counter",
        'x{worker="w1",m="a b"} 1',
        'x_total{worker="w1"} 2.5',
        'x{worker="w\\"2",m="a b"} 1',
        'x_total{worker="w\\"2"} 2.5',
        "# TYPE y gauge",
        'y{worker="w1"} 3',
        'y{worker="w\\"2"} 3',
    ]


async def test_metrics_are_merged_for_a_client_that_takes_gzip(rig):
    """What is merged is asked for uncompressed, whatever the client can read."""
    client = await rig.route()
    await rig.join("a", "b")
    answer = await client.get("/metrics", headers={"accept-encoding": "gzip"})
    assert answer.status_code == 200
    assert _samples(answer.text) == {("x", "a"): 1, ("x", "b"): 1}


async def test_lost_worker_is_left_out_of_what_is_only_read(rig, caplog):
    """Metrics come from those who are there, and the log says who is missing."""
    client = await rig.route()
    await rig.join("a", "b")
    call = asyncio.create_task(client.get("/metrics?hold"))
    await rig.until(lambda: all(replica.seen for replica in rig.replicas.values()))
    rig.hub._lose(rig.hub.workers["b"], "it is gone")
    rig.replicas["a"].hold.set()
    assert _samples((await call).text) == {("x", "a"): 1}
    assert any("leaves out worker 'b'" in record.getMessage() for record in caplog.records)


def test_best_and_worst():
    """One success is enough to find something, one failure enough to have failed."""
    found = [reply("a", "", 404), reply("b", "", 200), reply("c", "", 500)]
    assert (everywhere.best(found).worker, everywhere.worst(found).worker) == ("b", "c")


async def test_settings_reach_every_worker(rig):
    """A change of settings is sent to all; with a worker named, to that one."""
    client = await rig.route()
    await rig.join("a", "b")
    await client.patch("/program_config", json={"policy": "fcfs"})
    await client.patch("/program_config", json={}, headers={"x-router-worker": "b"})
    assert [len(replica.seen) for replica in rig.replicas.values()] == [1, 2]


# -- settings ------------------------------------------------------------------------------------


def test_flags_are_read_from_the_fields():
    """No arguments give the defaults, each flag sets its field, --help shows the default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert from_arguments(parser.parse_args([])) == RouterConfig()
    argv = ["--policy", "sticky", "--retries", "0", "--insecure"]
    expected = RouterConfig(policy="sticky", retries=0, insecure=True)
    assert from_arguments(parser.parse_args(argv)) == expected
    assert f"(default: {RouterConfig().endpoint})" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    "changes", [{"policy": "best"}, {"heartbeat_s": 0.0}, {"retries": -1}, {"timeout_s": 1.0}]
)
def test_setting_that_cannot_work_is_refused(changes):
    """The error names the flag."""
    with pytest.raises(ConfigError, match="--" + next(iter(changes)).replace("_", "-")):
        RouterConfig(**changes)


def test_worker_settings_survive_the_environment():
    """What `launch` leaves for the HTTP process is what it reads there."""
    config = WorkerConfig(endpoints=("ipc:///a", "tcp://127.0.0.1:1"), name="n", keys="/k")
    environ = {"AUTELLIX_SGLANG_WORKER": config.to_json()}
    assert WorkerConfig.from_env(environ) == config
    assert WorkerConfig.from_env({}) is None


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.1:5", "tcp://0.0.0.0:5", "tcp://*:5"])
def test_plain_tcp_off_the_loopback_is_refused(endpoint):
    """Without keys or force, prompts do not go over a network."""
    with pytest.raises(ConfigError, match="loopback"):
        check_endpoint("--endpoint", endpoint, is_safe=False)
    check_endpoint("--endpoint", endpoint, is_safe=True)


@pytest.mark.parametrize("endpoint", ["ipc:///a", "tcp://127.0.0.1:5", "tcp://localhost:5"])
def test_local_endpoints_are_fine(endpoint):
    """On one machine nothing is needed."""
    check_endpoint("--endpoint", endpoint, is_safe=False)


@pytest.mark.parametrize("endpoint", ["", "http://x:1", "tcp://host", "ipc://", "tcp://:5"])
def test_malformed_endpoint_is_named(endpoint):
    """What is neither ipc nor tcp is refused."""
    with pytest.raises(ConfigError, match="neither"):
        check_endpoint("--endpoint", endpoint, is_safe=True)


# -- hostile and unlucky requests ----------------------------------------------------------------


@pytest.mark.parametrize(
    "cursor", ["a:1," * 5000 + "!", "a:1," * 5000, "a:1\n", "a:1,b", ":1", "a:" + "1" * 5000]
)
def test_cursor_that_is_none_is_refused_in_no_time(cursor):
    """A pattern over all of it took twice as long with every item: a client could hang us."""
    started = time.perf_counter()
    with pytest.raises(ValueError, match="'after' must be the 'next'"):
        everywhere.next_pages(urlencode({"after": cursor}).encode())
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/pause_generation"),
        ("POST", "/continue_generation"),
        ("POST", "/abort_request"),
        ("POST", "/update_weights_from_disk"),
        ("GET", "/flush_cache"),
    ],
)
async def test_commands_to_the_engine_reach_every_replica(rig, method, path):
    """A pause that one replica hears, and its end that another does, would swallow calls."""
    client = await rig.route()
    await rig.join("a", "b")
    await client.request(method, path)
    assert [len(replica.seen) for replica in rig.replicas.values()] == [1, 1]


async def test_an_answer_that_one_replica_stored_is_found(rig):
    """GET /v1/responses/{id} asks all; whoever has it answers."""
    client = await rig.route()
    await rig.join("a", "b")
    await client.get("/v1/responses/resp_1")
    assert [len(replica.seen) for replica in rig.replicas.values()] == [1, 1]


async def test_what_one_replica_keeps_to_itself_needs_its_name(rig):
    """A session is where it was opened, and nowhere else."""
    client = await rig.route()
    await rig.join("a", "b")
    answer = await client.post("/open_session", json={"capacity_of_str_len": 9})
    assert answer.status_code == 400 and "x-router-worker" in answer.text
    answer = await client.post("/open_session", json={}, headers={"x-router-worker": "b"})
    assert answer.headers["x-router-worker"] == "b"


async def test_a_session_of_the_only_replica_needs_no_name(rig):
    """With one replica there is no question which."""
    client = await rig.route()
    await rig.join("a")
    await client.post("/open_session", json={})
    assert len(rig.replicas["a"].seen) == 1


async def test_page_of_a_program_that_moved_is_its_homes(rig):
    """Its latest calls are there."""
    client = await rig.route()
    await rig.join("a", "b")
    for name in ("a", "b", "a"):
        for _ in range(2):
            headers = {"x-program-id": "p", "x-router-worker": name}
            await client.post("/generate", json={}, headers=headers)
    (known,) = rig.hub.programs._programs.values()
    assert (await client.get("/v1/programs/p")).json()["worker"] == known.home == "a"


async def test_deeply_nested_body_is_the_replicas_to_answer(rig):
    """It names no program that we can read, and is passed on like any other."""
    client = await rig.route()
    await rig.join("a")
    body = b'{"x": ' + b"[" * 3000 + b"]" * 3000 + b', "custom_params": {}}'
    assert (await client.post("/generate", content=body)).headers["x-router-worker"] == "a"


@pytest.mark.parametrize("name", ["réplica", "rack1/gpu0"])
async def test_worker_of_any_name_can_be_asked_and_drained(rig, name):
    """By the header as an answer has it, and by its name in a path, quoted."""
    client = await rig.route()
    await rig.join(name)
    sent = dict((await client.post("/generate", json={})).headers.raw)[b"x-router-worker"]
    again = await client.post("/generate", json={}, headers=[(b"x-router-worker", sent)])
    assert again.status_code == 200
    drained = await client.post(f"/workers/{quote(name, safe='')}/drain")
    assert (drained.status_code, drained.json()) == (200, {"id": name, "known": True})


async def test_503_says_what_is_missing(rig):
    """Of any worker, or of the one that was named."""
    client = await rig.route(worker_wait_s=0.05)
    assert "no worker is ready" in (await client.post("/generate", json={})).text
    named = await client.post("/generate", json={}, headers={"x-router-worker": "a"})
    assert "worker 'a' is not ready" in named.text
