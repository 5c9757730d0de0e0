"""Requests through router and workers on real sockets: what arrives, and what trouble does."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time

import httpx
import pytest

pytest.importorskip("zmq")

import zmq

from autellix_sglang.engine import worker
from autellix_sglang.errors import ConfigError
from autellix_sglang.router import app
from autellix_sglang.router.__main__ import listen
from autellix_sglang.router.channel import HELLO, NUMBERS, REFUSED, AwakeClock, Codec, make_keys
from autellix_sglang.router.config import RouterConfig
from autellix_sglang.router.messages import FROM_ROUTER, Register, Report
from tests.router.conftest import FAST, Replica, streaming

# -- what arrives --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_request_arrives_unchanged(rig, method):
    """Method, path, query, headers and body reach the app as the client sent them."""
    client = await rig.route()
    await rig.join("a")
    body = bytes(range(256)) * 300 if method != "GET" else b""
    headers = {"x-mine": "gr\u00fcn".encode("latin-1"), "authorization": "Bearer k"}
    answer = await client.request(
        method, "/some/p%20ath?q=1&q=%C3%A4", content=body, headers=headers
    )
    told = answer.json()
    assert answer.status_code == 418
    assert answer.headers["x-app"] == "a"
    assert answer.headers["x-router-worker"] == "a"
    assert (told["method"], told["path"], told["query"]) == (method, "/some/p ath", "q=1&q=%C3%A4")
    assert rig.replicas["a"].bodies == [body]
    assert ["x-mine", "gr\u00fcn"] in told["headers"]
    assert ["authorization", "Bearer k"] in told["headers"]
    assert rig.replicas["a"].seen[0].client.host == "127.0.0.1"
    await rig.until(lambda: rig.num_streams == 0)


async def test_stream_arrives_as_it_is_made(rig):
    """Events are passed on before the answer is whole, none missing and none twice."""
    client = await rig.route()
    await rig.join("a")
    async with streaming(client, n=500, hold_at=100) as response:
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(200)][::2] == [f"data: {i}" for i in range(100)]
        rig.replicas["a"].hold.set()
        rest = [line async for line in lines if line]
    assert rest == [f"data: {i}" for i in range(100, 500)]
    await rig.until(lambda: rig.num_streams == 0)


async def test_many_calls_at_once_are_not_mixed_up(rig):
    """Three hundred calls over three workers each get their own whole answer.

    All of them begin in one tick of the one event loop, which takes longer than the usual timeout
    on a slow machine.
    """
    client = await rig.route(timeout_s=60.0)
    await rig.join("a", "b", "c")
    answers = await asyncio.gather(
        *(client.post("/generate", json={"n": i % 40}) for i in range(300))
    )
    assert [a.json()["tokens"] for a in answers] == [list(range(i % 40)) for i in range(300)]
    assert len({a.headers["x-router-worker"] for a in answers}) == 3
    await rig.until(lambda: rig.num_streams == 0)


async def test_large_bodies_pass_both_ways(rig):
    """A body larger than a batch and an answer larger than the credit arrive whole."""
    client = await rig.route()
    await rig.join("a")
    body = os.urandom(5_000_000)
    assert (await client.post("/x", content=body)).json()["num_bytes"] == len(body)
    assert rig.replicas["a"].bodies == [body]
    assert len((await client.get("/flood")).content) == 160 * 65_536


async def test_program_stays_on_its_worker(rig):
    """Calls of a program go where its first call went, by header or by body."""
    client = await rig.route()
    await rig.join("a", "b", "c")
    workers = {}
    for i in range(12):
        by_header = await client.post("/generate", json={}, headers={"x-program-id": f"p{i}"})
        body = {"custom_params": {"program_id": f"p{i}"}}
        by_body = await client.post("/v1/chat/completions", json=body)
        found = {r.headers["x-router-worker"] for r in (by_header, by_body)}
        assert len(found) == 1
        workers[i] = found.pop()
    assert len(set(workers.values())) > 1


async def test_opening_and_listing_programs_does_not_count_as_calls(rig):
    """A worker's mean time per call is of calls that had a slot."""
    client = await rig.route()
    await rig.join("a")
    await client.post("/v1/programs", json={"id": "p"})
    await client.get("/v1/programs", headers={"x-router-worker": "a"})
    await rig.until(lambda: rig.num_streams == 0)
    assert rig.agents["a"].call_s == 0
    await client.post("/generate", json={})
    await rig.until(lambda: rig.agents["a"].call_s > 0)


async def test_tenants_do_not_share_a_program(rig):
    """The same id under two API keys is two programs."""
    client = await rig.route()
    await rig.join("a")
    for key in ("one", "two", "one"):
        headers = {"x-program-id": "p", "authorization": f"Bearer {key}"}
        await client.post("/generate", json={}, headers=headers)
    assert len(rig.hub.programs) == 2


# -- flow ----------------------------------------------------------------------------------------


async def test_client_that_leaves_cancels_its_call(rig):
    """A client that disconnects, streaming or not, ends the call in the app."""
    client = await rig.route()
    await rig.join("a")
    async with streaming(client, n=5, hold_at=1) as response:
        assert await anext(response.aiter_lines()) == "data: 0"
    await rig.until(lambda: rig.replicas["a"].num_cancelled == 1)
    with pytest.raises(httpx.ReadTimeout):
        await client.post("/generate", json={"hold_at": 0}, timeout=0.2)
    await rig.until(lambda: rig.replicas["a"].num_cancelled == 2)
    await rig.until(lambda: rig.num_streams == 0)


async def test_slow_reader_holds_back_its_own_answer_only(rig):
    """What a client does not read is not made; others are served meanwhile."""
    client = await rig.route(credit_bytes=100_000)
    await rig.join("a")
    reader = socket.create_connection(("127.0.0.1", rig.port))
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
    replica = rig.replicas["a"]
    await asyncio.sleep(0.3)
    stalled_at = replica.num_sent_bytes
    assert (await client.post("/generate", json={"n": 3})).json()["tokens"] == [0, 1, 2]
    await asyncio.sleep(0.2)
    assert replica.num_sent_bytes == stalled_at < 1_000_000
    reader.close()
    await rig.until(lambda: rig.num_streams == 0)


async def test_deadline_ends_a_call(rig):
    """A call past its deadline is an HTTP 504, or an error event in a stream; the app is told."""
    client = await rig.route()
    await rig.join("a")
    headers = {"x-request-timeout-s": "0.2"}
    late = await client.post("/generate", json={"hold_at": 0}, headers=headers)
    assert late.status_code == 504
    asked = {"stream": True, "n": 2, "hold_at": 1}
    cut = await client.post("/generate", json=asked, headers=headers)
    assert cut.text.startswith("data: 0\n\n")
    assert json.loads(cut.text.split("data: ")[2])["error"]["code"] == 504
    await rig.until(lambda: rig.replicas["a"].num_cancelled == 2)
    await rig.until(lambda: rig.num_streams == 0)


async def test_no_worker_is_503_with_retry_after(rig):
    """Without a worker a call waits a little, then is asked to come back."""
    client = await rig.route(worker_wait_s=0.05)
    answer = await client.post("/generate", json={})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "overloaded_error"
    assert (await client.get("/health")).status_code == 503


async def test_call_waits_for_a_worker_that_is_about_to_join(rig):
    """A call that comes before the first worker is served by it."""
    client = await rig.route(worker_wait_s=5.0)
    call = asyncio.create_task(client.post("/generate", json={}))
    await asyncio.sleep(0.1)
    await rig.join("a")
    assert (await call).json()["worker"] == "a"


async def test_overload_is_refused_and_bounded(rig):
    """More calls, or larger bodies, than the router may hold are refused at once."""
    client = await rig.route(max_calls=2, max_body_bytes=1000, max_buffer_bytes=1500)
    await rig.join("a")
    held = [asyncio.create_task(client.post("/generate", json={"hold_at": 0})) for _ in range(2)]
    await rig.until(lambda: rig.hub.num_open == 2)
    assert (await client.post("/generate", json={})).status_code == 503
    rig.replicas["a"].hold.set()
    assert [(await call).status_code for call in held] == [200, 200]
    assert (await client.post("/generate", content=bytes(2000))).status_code == 413
    await rig.until(lambda: rig.num_streams == rig.hub.num_buffered_bytes == 0)


async def test_body_that_never_ends_is_given_up(rig):
    """A client that stops in the middle of its request is told so, and nothing of it is held."""
    await rig.route(request_timeout_s=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    assert b" 408 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()
    await rig.until(lambda: rig.num_streams == rig.hub.num_buffered_bytes == 0)


async def test_client_that_reads_nothing_is_given_up(rig, monkeypatch):
    """A little after its deadline a call is over, though its client is still connected."""
    monkeypatch.setattr(app, "END_S", 0.2)
    await rig.route(credit_bytes=100_000)
    await rig.join("a")
    reader = socket.create_connection(("127.0.0.1", rig.port))
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\nx-request-timeout-s: 0.5\r\n\r\n")
    await rig.until(lambda: rig.replicas["a"].num_sent_bytes > 0)
    await rig.until(lambda: rig.num_streams == 0)
    reader.close()


async def test_body_is_held_until_the_answer_begins(rig):
    """While a stream runs, its request counts no more against what the router may hold."""
    client = await rig.route()
    await rig.join("a")
    async with streaming(client, n=2, hold_at=1):
        assert (rig.hub.num_open, rig.hub.num_buffered_bytes) == (1, 0)
        (stream,) = rig.hub.workers["a"].streams.values()
        assert stream.request.body == b""


# -- failures ------------------------------------------------------------------------------------


async def test_worker_lost_before_the_first_byte_is_replaced(rig):
    """The call is served by another worker, and answered once."""
    client = await rig.route()
    await rig.join("a", "b")
    headers = {"x-program-id": "p"}
    home = (await client.post("/generate", json={}, headers=headers)).json()["worker"]
    asked = {"hold_at": 0, "n": 2}
    call = asyncio.create_task(client.post("/generate", json=asked, headers=headers))
    await rig.until(lambda: len(rig.replicas[home].bodies) == 2)
    other = {"a": "b", "b": "a"}[home]
    rig.replicas[other].hold.set()
    await rig.kill(home)
    answer = await call
    assert (answer.status_code, answer.json()) == (200, {"worker": other, "tokens": [0, 1]})
    assert rig.hub.num_retries == 1
    again = await client.post("/generate", json={}, headers=headers)
    assert again.json()["worker"] == other


async def test_call_lost_in_a_short_break_of_the_link_is_sent_again(rig, monkeypatch):
    """A worker that was unreachable for a moment sees that frames are missing, and joins anew."""
    client = await rig.route(worker_wait_s=10.0, timeout_s=60.0)
    await rig.join("a")
    send = rig.hub.channel._send

    def break_off(address, frames):
        if b"/generate" in frames[-1]:
            monkeypatch.setattr(rig.hub.channel, "_send", send)
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        send(address, frames)

    monkeypatch.setattr(rig.hub.channel, "_send", break_off)
    assert (await client.post("/generate", json={})).json()["worker"] == "a"
    assert rig.hub.num_retries == 1


async def test_call_that_kills_every_worker_is_given_up(rig):
    """A call is tried `retries` times more, also where the only worker comes back each time."""
    client = await rig.route(retries=2, worker_wait_s=10.0, timeout_s=60.0)
    await rig.join("a")
    call = asyncio.create_task(client.post("/generate", json={"hold_at": 0}))
    for num_tries in range(1, 4):
        await rig.until(lambda n=num_tries: len(rig.replicas["a"].bodies) == n)
        rig.hub._lose(rig.hub.workers["a"], "poison")
    assert (await call).status_code == 502
    assert rig.hub.num_retries == 2


async def test_session_that_ends_counts_less_than_a_worker_that_does(rig):
    """Breaks of the link are no call's doing: it outlives more of them, and they are no retries."""
    client = await rig.route(retries=1, worker_wait_s=10.0, timeout_s=60.0)
    await rig.join("a")
    call = asyncio.create_task(client.post("/generate", json={"hold_at": 0}))
    for num_tries, breaks in enumerate((True, False, True, True), 1):
        await rig.until(lambda n=num_tries: len(rig.replicas["a"].bodies) == n)
        (link,) = rig.agents["a"]._links
        if breaks:
            link._join()  # as after the router's silence
        else:
            rig.hub._lose(rig.hub.workers["a"], "gone")
    await rig.until(lambda: len(rig.replicas["a"].bodies) == 5)
    rig.replicas["a"].hold.set()
    assert (await call).json() == {"worker": "a", "tokens": [0, 1, 2]}
    assert rig.hub.num_retries == 4


async def test_worker_lost_in_mid_stream_is_an_error_event(rig):
    """After the first byte nothing is repeated: the stream ends with an explicit error."""
    client = await rig.route()
    await rig.join("a", "b")
    async with streaming(client, n=3, hold_at=2) as response:
        lines = response.aiter_lines()
        assert [await anext(lines) for _ in range(4)] == ["data: 0", "", "data: 1", ""]
        await rig.kill(response.headers["x-router-worker"])
        rest = [line async for line in lines if line]
    error = json.loads(rest[0].removeprefix("data: "))["error"]
    assert (len(rest), error["code"]) == (1, 502)
    assert "was lost" in error["message"]
    assert rig.hub.num_retries == 0


async def test_anthropic_stream_gets_its_own_kind_of_error_event(rig):
    """On /v1/messages the event is named and shaped as Anthropic's clients expect."""
    client = await rig.route()
    await rig.join("a")
    async with streaming(client, "/v1/messages", n=2, hold_at=1) as response:
        lines = response.aiter_lines()
        await anext(lines)
        await rig.kill("a")
        rest = [line async for line in lines if line]
    assert rest[0] == "event: error"
    assert json.loads(rest[1].removeprefix("data: "))["type"] == "error"


async def test_answer_that_is_no_event_stream_breaks_off(rig):
    """A body that cannot be finished ends with a broken connection, not as if it were whole."""
    client = await rig.route(credit_bytes=50_000)
    await rig.join("a")
    with pytest.raises(httpx.RemoteProtocolError):
        await _read_and_kill(rig, client)
    await rig.until(lambda: rig.hub.num_open == 0)


async def _read_and_kill(rig, client):
    async with client.stream("GET", "/flood") as response:
        async for _ in response.aiter_raw(chunk_size=1000):
            await rig.kill("a")


async def test_bug_in_the_app_is_an_error_and_not_retried(rig):
    """An app that raises answers as it does on its own server; trying elsewhere is no use."""
    client = await rig.route()
    await rig.join("a", "b")
    assert (await client.get("/broken")).status_code in (500, 502)
    assert rig.hub.num_retries == 0


async def test_worker_that_returns_is_used_again(rig):
    """A worker that was lost and comes back serves calls, and its old ones are not resumed."""
    client = await rig.route()
    await rig.join("a")
    await rig.kill("a")
    await rig.until(lambda: not rig.hub.workers)
    await rig.join("a")
    assert (await client.post("/generate", json={})).json()["worker"] == "a"


async def test_paused_worker_starts_over(rig):
    """After a silence the router gave up on, a worker's calls are cancelled and it joins anew."""
    client = await rig.route()
    await rig.join("a")
    link = rig.agents["a"]._links[0]
    call = asyncio.create_task(client.post("/generate", json={"hold_at": 0}))
    await rig.until(lambda: rig.replicas["a"].bodies)
    link._beating.cancel()  # silent, and yet it reads and runs
    await rig.until(lambda: not rig.hub.workers)
    link._beating = asyncio.create_task(link._beat())
    await rig.until(lambda: rig.replicas["a"].num_cancelled == 1)
    rig.replicas["a"].hold.set()
    assert (await call).json() == {"worker": "a", "tokens": [0, 1, 2]}  # sent to it once more
    await rig.until(lambda: rig.num_streams == 0)


async def test_pause_of_the_whole_process_is_no_silence(rig):
    """Who was stopped for longer than the timeout finds its peers' words in the socket."""
    client = await rig.route()
    await rig.join("a", "b")
    sessions = {name: found.outbox.session for name, found in rig.hub.workers.items()}
    call = asyncio.create_task(client.post("/generate", json={"hold_at": 0}))
    await rig.until(lambda: rig.num_streams == 3)
    for _ in range(3):
        time.sleep(1.5 * FAST["timeout_s"])
        await asyncio.sleep(3 * FAST["heartbeat_s"])
    (served,) = [replica for replica in rig.replicas.values() if replica.seen]
    served.hold.set()
    assert (await call).json()["worker"] == served.name
    assert rig.hub.num_retries == 0
    assert {name: w.outbox.session for name, w in rig.hub.workers.items()} == sessions


def test_awake_clock_leaves_pauses_out():
    """Time between two calls counts as one period at most."""
    now_s = 100.0
    awake = AwakeClock(lambda: now_s, 0.5)
    for step_s, expected_s in [(0.0, 0.0), (0.25, 0.25), (0.5, 0.75), (60.0, 1.25), (0.25, 1.5)]:
        now_s += step_s
        assert awake() == expected_s


async def test_worker_joins_once_however_long_the_router_was_away(rig, caplog, monkeypatch):
    """Attempts to join that nobody heard do not all arrive when somebody listens."""
    monkeypatch.setattr(worker, "JOIN_S", 0.05)
    caplog.set_level(logging.INFO)
    rig.replicas["a"] = Replica("a")
    await rig.work("a", (rig.endpoint,))
    await asyncio.sleep(0.5)
    await rig.route()
    await rig.until(lambda: rig.is_ready("a"))
    assert len([r for r in caplog.records if "joined with" in r.getMessage()]) <= 2


async def test_worker_that_cannot_dial_for_a_while_tries_again(rig, caplog, monkeypatch):
    """Keys that are gone for a moment, or no descriptors, do not end a worker's attempts."""
    monkeypatch.setattr(worker, "JOIN_S", 0.05)
    rig.replicas["a"] = Replica("a")
    await rig.work("a", (rig.endpoint,))
    (link,) = rig.agents["a"]._links
    redial = link._redial

    def fail():
        raise ConfigError("keys", "worker.key_secret: no such file")

    link._redial = fail
    await rig.until(lambda: any("no such file" in r.message for r in caplog.records))
    link._redial = redial
    await rig.route()
    await rig.until(lambda: rig.is_ready("a"))


async def test_restart_of_the_router_loses_no_worker_and_no_home(rig):
    """Workers find a new router by themselves and tell it where programs were last."""
    client = await rig.route()
    await rig.join("a", "b", "c")
    programs = [{"x-program-id": f"p{i}"} for i in range(30)]
    before = [
        (await client.post("/generate", json={}, headers=h)).json()["worker"] for h in programs
    ]
    await rig.stop_router()
    client = await rig.route()
    await rig.until(lambda: rig.hub.num_ready == 3)
    after = [
        (await client.post("/generate", json={}, headers=h)).json()["worker"] for h in programs
    ]
    assert after == before
    assert len(set(before)) == 3


async def test_two_routers_learn_from_the_workers(rig, tmp_path):
    """A program that one router homed is found there by the other."""
    first = await rig.route()
    hub, other_endpoint = rig.hub, f"ipc://{tmp_path}/other.sock"
    second = await rig.route(endpoint=other_endpoint)
    other_hub = rig.hub
    await rig.join("a", "b", "c", endpoints=(rig.endpoint, other_endpoint))
    await rig.until(lambda: hub.num_ready == 3)
    programs = [{"x-program-id": f"p{i}"} for i in range(20)]
    before = [
        (await first.post("/generate", json={}, headers=h)).json()["worker"] for h in programs
    ]
    await rig.until(lambda: len(other_hub.programs) == 20)
    after = [
        (await second.post("/generate", json={}, headers=h)).json()["worker"] for h in programs
    ]
    assert after == before


async def test_drained_worker_finishes_and_takes_no_more(rig):
    """Draining leaves running calls alone, outlives the router, and can be taken back."""
    client = await rig.route()
    await rig.join("a", "b")
    call = asyncio.create_task(
        client.post("/generate", json={"hold_at": 0}, headers={"x-router-worker": "a"})
    )
    await rig.until(lambda: rig.replicas["a"].bodies)
    assert (await client.post("/workers/a/drain")).status_code == 200
    workers = {(await client.post("/generate", json={})).json()["worker"] for _ in range(8)}
    assert workers == {"b"}
    rig.replicas["a"].hold.set()
    assert (await call).json()["worker"] == "a"
    await rig.stop_router()
    client = await rig.route()
    await rig.until(lambda: len(rig.hub.workers) == 2)
    states = {w["id"]: w["state"] for w in (await client.get("/workers")).json()["workers"]}
    assert states["a"] == "draining"
    await client.post("/workers/a/undrain")
    await rig.until(lambda: rig.is_ready("a"))


async def test_worker_that_stops_finishes_its_calls(rig):
    """A stopping worker says so, ends what it has, and is not sent more."""
    client = await rig.route()
    await rig.join("a", "b")
    to_a = {"x-router-worker": "a"}
    call = asyncio.create_task(client.post("/generate", json={"hold_at": 0}, headers=to_a))
    await rig.until(lambda: rig.replicas["a"].bodies)
    stopping = asyncio.create_task(rig.agents["a"].stop(grace_s=5.0))
    await rig.until(lambda: rig.hub.workers["a"].is_leaving)
    assert (await client.post("/generate", json={})).json()["worker"] == "b"
    rig.replicas["a"].hold.set()
    assert (await call).json()["worker"] == "a"
    await stopping


async def test_later_process_of_the_same_name_wins(rig, caplog):
    """Two workers of one name do not fight: the later one stays, the earlier one is refused."""
    client = await rig.route()
    await rig.join("a")
    earlier = rig.replicas["a"]
    await rig.join("a")
    await asyncio.sleep(0.5)
    for _ in range(3):
        assert (await client.post("/generate", json={})).status_code == 200
    assert (len(earlier.bodies), len(rig.replicas["a"].bodies)) == (0, 3)
    assert sum("another process joined as 'a'" in r.message for r in caplog.records) == 1


async def test_earlier_process_of_the_same_name_may_return_when_the_later_is_gone(
    rig, caplog, monkeypatch
):
    """It asks again and again, and displaces nobody; the name is free when its holder is lost."""
    monkeypatch.setattr(worker, "REFUSED_S", 0.1)
    caplog.set_level(logging.INFO)
    await rig.route()
    await rig.join("a")
    earlier = rig.agents["a"]
    await rig.join("a")
    await asyncio.sleep(1.0)
    assert sum("joined with" in r.getMessage() for r in caplog.records) == 2
    await rig.kill("a")
    await rig.until(lambda: earlier._links[0]._welcome is not None)


async def test_what_a_replaced_connection_still_says_displaces_nobody(rig):
    """A worker that dials anew is not thrown out by its own earlier attempt to join."""
    await rig.route()
    await rig.join("a")
    address = rig.hub.workers["a"].address
    late = Codec(FROM_ROUTER).encode(9, 0, [Register(worker="a")])
    rig.hub._take_frames(b"\0\0\0\0\1", late)
    assert rig.hub.workers["a"].address == address


# -- strangers -----------------------------------------------------------------------------------


@pytest.fixture
def stranger(rig):
    """A socket that is no worker of ours."""
    context = zmq.Context()
    made = context.socket(zmq.DEALER)
    made.connect(rig.endpoint)
    yield made
    context.destroy(linger=0)


async def test_garbage_is_ignored_and_logged_once(rig, stranger, caplog):
    """Ten thousand random frames disturb nothing and take one line of the log."""
    client = await rig.route()
    await rig.join("a")
    valid = Codec(FROM_ROUTER).encode(1, 0, [Report(is_ready=True)])
    for i in range(10_000):
        frames = [os.urandom(i % 40), os.urandom(16), os.urandom(i % 90)][: 1 + i % 3]
        if i % 4 == 0:  # with a proper beginning
            frames = [HELLO, NUMBERS.pack(i, 0), os.urandom(i % 60)]
        if i % 100 == 0:  # messages of a session that never began
            frames = valid
        stranger.send_multipart(frames)
        if i % 500 == 0:
            assert (await client.post("/generate", json={})).status_code == 200
    await asyncio.sleep(0.2)
    assert (await client.post("/generate", json={})).status_code == 200
    assert list(rig.hub.workers) == ["a"]
    assert sum("ignored" in record.message for record in caplog.records) == 1


async def test_other_version_is_refused_with_a_reason(rig, stranger, caplog):
    """A worker of another version is told so and does not join."""
    await rig.route()
    frames = Codec(FROM_ROUTER).encode(7, 0, [Register(worker="future")])
    for _ in range(3):
        stranger.send_multipart([b"autellix-router/9", *frames[1:]])
        while not stranger.poll(0):
            await asyncio.sleep(0.01)
        refusal = stranger.recv_multipart()
        assert refusal == [REFUSED, b"this router speaks version 1, not 9"]
    assert not rig.hub.workers
    assert sum("another version" in record.message for record in caplog.records) == 1


async def test_worker_told_of_another_version_says_so_and_waits(rig, caplog):
    """A refused worker logs the router's reason once and does not hammer it."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(rig.endpoint)
    rig.replicas["a"] = Replica("a")
    await rig.work("a", (rig.endpoint,))
    while not router.poll(0):
        await asyncio.sleep(0.01)
    address = router.recv_multipart()[0]
    router.send_multipart([address, REFUSED, b"this router speaks version 9, not 1"])
    await rig.until(lambda: any("speaks version 9" in r.message for r in caplog.records))
    await asyncio.sleep(1.2)
    assert not router.poll(0)
    context.destroy(linger=0)


async def test_curve_keys_let_in_who_is_allowed_and_nobody_else(rig, tmp_path, caplog):
    """With keys a worker on the list joins; a wrong key is refused and logged once."""
    caplog.set_level(logging.WARNING)
    good, bad = tmp_path / "good", tmp_path / "bad"
    make_keys(str(good))
    make_keys(str(bad))
    (bad / "router.key").write_bytes((good / "router.key").read_bytes())
    endpoint = "tcp://127.0.0.1:*"
    client = await rig.route(endpoint=endpoint, keys=str(good))
    await rig.join("a", endpoints=(rig.hub.endpoint,), keys=str(good))
    rig.replicas["b"] = rig.replicas["a"]
    await rig.work("b", (rig.hub.endpoint,), keys=str(bad))
    await asyncio.sleep(1.0)
    assert list(rig.hub.workers) == ["a"]
    assert (await client.post("/generate", json={})).json()["worker"] == "a"
    assert sum("key is not in the allow list" in r.message for r in caplog.records) == 1


def test_fast_settings_are_sane():
    """The settings of these tests keep the ratio of heartbeat to timeout that is required."""
    assert FAST["timeout_s"] >= 3 * FAST["heartbeat_s"]


async def test_worker_without_a_rate_is_taken_for_a_typical_one(rig):
    """A replica that has not measured its prefill is compared as if it were like the others."""
    await rig.route(prefill_tokens_per_s=123)
    await rig.join("new", report=Report(is_ready=True))
    assert rig.hub.workers["new"].load().prefill_tokens_per_s == 123
    await rig.join("old", report=Report(is_ready=True, prefill_tokens_per_s=7000))
    await rig.until(lambda: rig.hub.typical_prefill_rate == 7000)
    assert rig.hub.workers["new"].load().prefill_tokens_per_s == 7000


def test_taken_port_is_refused_by_name():
    """A port that another server has is a `ConfigError` before anything else is started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: 127.0.0.1:{port}: .*in use"):
            listen(RouterConfig(port=port))
