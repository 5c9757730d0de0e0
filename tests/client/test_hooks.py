"""Each HTTP library is annotated towards registered servers, and towards nobody else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import aiohttp
import anthropic
import httpx
import openai
import pytest
import requests

from autellix_sglang.client import current_program, program, register
from autellix_sglang.client.program import registry
from autellix_sglang.errors import ConfigError
from tests.client.conftest import IDENTITY, OURS, THIRD, Recorder

MESSAGES: Any = [{"role": "user", "content": "hi"}]
BODY: Any = {"model": "m", "messages": MESSAGES}
CHAT = "/v1/chat/completions"


def with_httpx(base: str, proxy: str) -> None:
    with httpx.Client(proxy=proxy, follow_redirects=True) as client:
        client.post(base + CHAT, json=BODY)


async def with_httpx_async(base: str, proxy: str) -> None:
    async with httpx.AsyncClient(proxy=proxy, follow_redirects=True) as client:
        await client.post(base + CHAT, json=BODY)


def with_requests(base: str, proxy: str) -> None:
    with requests.Session() as session:
        session.post(base + CHAT, json=BODY, proxies={"http": proxy})


async def with_aiohttp(base: str, proxy: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(base + CHAT, json=BODY, proxy=proxy) as response,
    ):
        await response.json()


def with_openai(base: str, proxy: str) -> None:
    http = httpx.Client(proxy=proxy, follow_redirects=True)
    with openai.OpenAI(base_url=base + "/v1", api_key="none", http_client=http) as client:
        client.chat.completions.create(**BODY)


async def with_openai_async(base: str, proxy: str) -> None:
    http = httpx.AsyncClient(proxy=proxy, follow_redirects=True)
    async with openai.AsyncOpenAI(base_url=base + "/v1", api_key="none", http_client=http) as made:
        await made.chat.completions.create(**BODY)


def with_anthropic(base: str, proxy: str) -> None:
    http = anthropic.DefaultHttpxClient(proxy=proxy, follow_redirects=True)
    with anthropic.Anthropic(base_url=base, api_key="none", http_client=http) as client:
        client.messages.create(model="m", max_tokens=3, messages=MESSAGES)


async def with_anthropic_async(base: str, proxy: str) -> None:
    http = anthropic.DefaultAsyncHttpxClient(proxy=proxy, follow_redirects=True)
    async with anthropic.AsyncAnthropic(base_url=base, api_key="none", http_client=http) as client:
        await client.messages.create(model="m", max_tokens=3, messages=MESSAGES)


LIBRARIES = [
    with_httpx, with_httpx_async, with_requests, with_aiohttp,
    with_openai, with_openai_async, with_anthropic, with_anthropic_async,
]  # fmt: skip
each_library = pytest.mark.parametrize("send", LIBRARIES, ids=lambda send: send.__name__[5:])


async def run(send: Callable[[str, str], Any], base: str, proxy: str) -> None:
    done = send(base, proxy)
    if done is not None:
        await done


@each_library
async def test_calls_to_a_registered_server_are_annotated(send, recorder: Recorder, ours) -> None:
    """Two calls in a row: one program, one thread, and the first is the second's parent."""
    with program("agent") as running:
        await run(send, ours, recorder.url)
        await run(send, ours, recorder.url)
    first, second = (seen.ids for seen in recorder.calls)
    names = {"x-program-id": running.id, "x-thread-id": "0"}
    assert first == {**names, "x-call-id": first["x-call-id"], "x-parent-call-ids": ""}
    assert second == {
        **names,
        "x-call-id": second["x-call-id"],
        "x-parent-call-ids": first["x-call-id"],
    }


@each_library
async def test_nothing_goes_to_an_unregistered_host(send, recorder: Recorder, ours) -> None:
    """A recording proxy sees the same request inside a program as outside of any."""
    await run(send, THIRD, recorder.url)
    with program("agent"):
        await run(send, ours, recorder.url)
        await run(send, THIRD, recorder.url)
        await run(send, ours.replace("ours.test", "ours.test:8080"), recorder.url)
        await run(send, ours.replace("ours.test", "ours.test.evil.test"), recorder.url)
    outside, inside, *strangers = recorder.calls
    assert inside.ids
    assert [stranger.ids for stranger in strangers] == [{}, {}, {}]
    assert (strangers[0].url, strangers[0].body) == (outside.url, outside.body)
    assert strangers[0].headers == outside.headers


@each_library
async def test_a_redirect_does_not_carry_ids_away(send, recorder: Recorder, ours) -> None:
    """A registered server that redirects elsewhere does not take our headers along."""
    path = "/v1/messages" if "anthropic" in send.__name__ else CHAT
    recorder.redirects[ours + path] = THIRD + path
    with program("agent") as running:
        await run(send, ours, recorder.url)
        assert running.root.frontier == ()
    first, second = recorder.calls
    assert first.ids["x-program-id"] == running.id
    assert (second.url, second.ids) == (THIRD + path, {})


@each_library
async def test_nothing_is_annotated_outside_of_programs(send, recorder: Recorder, ours) -> None:
    """Importing the library changes no request of its own."""
    await run(send, ours, recorder.url)
    assert [seen.ids for seen in recorder.calls] == [{}]


def test_only_endpoints_that_generate_are_calls(registered: Recorder) -> None:
    """Listing models, tokenizing, and whatever is not a POST goes out as it is."""
    with program("agent"), httpx.Client() as client:
        client.get(registered.url + "/v1/models")
        client.get(registered.url + CHAT)
        client.post(registered.url + "/tokenize", json=BODY)
        client.post(registered.url + "/v1/messages/count_tokens", json=BODY)
    others = [seen for seen in registered.seen if "programs" not in seen.url]
    assert [seen.ids for seen in others] == [{}, {}, {}, {}]


def test_ids_that_the_caller_sets_are_left_alone(registered: Recorder) -> None:
    """A request that names its program itself keeps its own headers."""
    with program("agent"):
        requests.post(registered.url + "/generate", json={}, headers={"X-Program-Id": "mine"})
    assert [seen.ids for seen in registered.calls] == [{"x-program-id": "mine"}]


def post_httpx(url: str, timeout_s: float = 9.0, **kwargs: Any) -> None:
    httpx.post(url, json={}, timeout=timeout_s, **kwargs)


async def post_httpx_async(url: str, timeout_s: float = 9.0, **kwargs: Any) -> None:
    async with httpx.AsyncClient() as client, asyncio.timeout(timeout_s):
        await client.post(url, json={}, **kwargs)


def post_requests(url: str, timeout_s: float = 9.0, **kwargs: Any) -> None:
    requests.post(url, json={}, timeout=timeout_s, **kwargs)


async def post_aiohttp(url: str, timeout_s: float = 9.0, **kwargs: Any) -> None:
    async with (
        aiohttp.ClientSession() as session,
        asyncio.timeout(timeout_s),
        session.post(url, json={}, **kwargs) as response,
    ):
        await response.read()


each_post = pytest.mark.parametrize(
    "post", [post_httpx, post_httpx_async, post_requests, post_aiohttp]
)


async def done(posted: Any) -> None:
    if posted is not None:
        await posted


@each_post
async def test_a_single_id_that_the_caller_sets_is_kept(post, registered: Recorder) -> None:
    """Beside a thread's name of the caller's go our ids, and no second name."""
    with program("agent") as running:
        await done(post(registered.url + "/generate", headers={"X-Thread-Id": "critic"}))
    (seen,) = registered.calls
    assert seen.ids.keys() == set(IDENTITY)
    assert (seen.ids["x-program-id"], seen.ids["x-thread-id"]) == (running.id, "critic")


@each_post
@pytest.mark.parametrize("stall_s", [0.0, 0.6], ids=["broken", "late"])
async def test_half_an_answer_completes_no_call(post, stall_s, registered: Recorder) -> None:
    """A call that breaks off or takes too long while its answer is read is nobody's parent."""
    registered.num_broken, registered.stall_s = 1, stall_s
    with program("agent"):
        with pytest.raises(Exception):  # noqa: B017, PT011 - each library has its own
            await done(post(registered.url + "/generate", timeout_s=0.2 if stall_s else 9.0))
        await done(post(registered.url + "/generate"))
    assert [seen.ids["x-parent-call-ids"] for seen in registered.calls] == ["", ""]


def test_a_retry_after_half_an_answer_has_no_part_of_it_as_parent(registered: Recorder) -> None:
    """SDKs try again by themselves; the second attempt is a call that waited for nothing."""
    registered.num_broken = 1
    with (
        program("agent") as running,
        openai.OpenAI(base_url=registered.url + "/v1", api_key="none") as client,
    ):
        client.chat.completions.create(**BODY)
        first, second = (seen.ids for seen in registered.calls)
        assert running.root.frontier == (second["x-call-id"],) != (first["x-call-id"],)
    assert second["x-parent-call-ids"] == ""


async def test_an_aiohttp_stream_that_breaks_completes_no_call(registered: Recorder) -> None:
    """The same where the body is read piece by piece; one that is let go of counts."""
    registered.num_broken = 1
    async with aiohttp.ClientSession() as session:
        with program("agent") as running:
            async with session.post(registered.url + "/generate", json={}) as response:
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.content.readexactly(10_000)
            assert running.root.frontier == ()
            registered.num_broken, registered.stall_s = 2, 0.6
            async with session.post(registered.url + "/generate", json={}) as response:
                await response.content.readany()
                assert running.root.frontier == ()
            assert len(running.root.frontier) == 1


async def test_an_aiohttp_middleware_sends_again(registered: Recorder) -> None:
    """Each attempt of the same request is a call; the caller's request stays without our ids."""
    registered.status["/generate"] = 503

    async def twice(request: Any, send: Any) -> Any:
        (await send(request)).release()
        registered.status.clear()
        return await send(request)

    async with aiohttp.ClientSession(middlewares=(twice,)) as session:
        with program("agent") as running:
            async with session.post(registered.url + "/generate", json={}) as response:
                await response.read()
            assert not [name for name in response.request_info.headers if name.startswith("x-")]
            first, second = (seen.ids["x-call-id"] for seen in registered.calls)
            assert running.root.frontier == (second,) != (first,)


def test_an_error_completes_no_call(registered: Recorder) -> None:
    """A call that was refused is not what the next one waited for."""
    registered.status["/generate"] = 500
    with program("agent"):
        requests.post(registered.url + "/generate", json={})
        httpx.post(registered.url + "/generate", json={})
        requests.post(registered.url + "/v1/completions", json={})
    assert [seen.ids["x-parent-call-ids"] for seen in registered.calls] == [""] * 3


def test_a_prepared_request_is_given_back_as_it_was(registered: Recorder) -> None:
    """What the caller holds after the call has none of our headers, so it can be sent again."""
    with program("agent"), requests.Session() as session, httpx.Client() as client:
        prepared = requests.Request("POST", registered.url + "/generate", json={}).prepare()
        before = dict(prepared.headers)
        session.send(prepared)
        assert prepared.headers == before
        request = client.build_request("POST", registered.url + "/generate", json={})
        response = client.send(request)
        assert not [name for name in response.request.headers if name.startswith("x-")]


@pytest.mark.parametrize("reads", [True, False], ids=["read", "closed"])
def test_a_stream_is_complete_when_it_ends(registered: Recorder, reads: bool) -> None:
    """A streamed call becomes a parent when it is read to its end or closed, not before."""
    url = registered.url + "/generate"
    with program("agent") as running, httpx.Client() as client:
        with client.stream("POST", url, json={}) as response:
            assert running.root.frontier == ()
            if reads:
                response.read()
        assert len(running.root.frontier) == 1
        with requests.post(url, json={}, stream=True) as response:
            held = running.root.frontier
            if reads:
                list(response.iter_lines())
        assert len(running.root.frontier) == 1
        assert running.root.frontier != held


def test_a_stream_that_its_reader_stops_reading(registered: Recorder) -> None:
    """Who breaks off at the last event of a stream, closing nothing, has what it waited for."""
    url = registered.url + "/generate"
    with program("agent") as running, httpx.Client() as client, requests.Session() as session:
        response = session.post(url, json={}, stream=True)
        for _ in response.iter_content(4):
            break
        held = running.root.frontier
        assert len(held) == 1
        streamed = client.send(client.build_request("POST", url, json={}), stream=True)
        for _ in streamed.iter_raw():
            break
        assert len(running.root.frontier) == 1
        assert running.root.frontier != held
        response.close()
        streamed.close()


async def test_an_asynchronous_stream_that_its_reader_stops_reading(registered: Recorder) -> None:
    """The same, as soon as the event loop has finalized what read it."""
    async with httpx.AsyncClient() as client:
        request = client.build_request("POST", registered.url + "/generate", json={})
        with program("agent") as running:
            response = await client.send(request, stream=True)
            async for _ in response.aiter_raw():
                break
            for _ in range(9):
                await asyncio.sleep(0)
            assert len(running.root.frontier) == 1
        await response.aclose()


async def test_a_stream_of_aiohttp(registered: Recorder) -> None:
    """The same for aiohttp, whose connection goes back when the body is over."""
    async with aiohttp.ClientSession() as session:
        with program("agent") as running:
            async with session.post(registered.url + "/generate", json={}) as response:
                await response.read()
            assert len(running.root.frontier) == 1


@pytest.mark.parametrize("library", ["httpx", "requests", "aiohttp", "openai", "anthropic"])
def test_libraries_imported_later_are_hooked(library: str) -> None:
    """Whether a library is imported before or after us makes no difference."""
    script = f"""
import autellix_sglang.client as client
client.register("http://ours.test")
import {library}
import sys
from autellix_sglang.client.hooks import HOOKS, _hooked
present = set(HOOKS) & set(sys.modules)
assert present and present == _hooked, (present, _hooked)
for name in present:
    assert type(sys.modules[name].__spec__.loader).__name__ == "SourceFileLoader"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_star_import_brings_no_engine() -> None:
    """Neither where SGLang is installed, nor where it is not."""
    script = """
import sys
sys.modules["sglang"] = None
from autellix_sglang.client import *
register("http://ours.test")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_library_that_has_changed_still_works() -> None:
    """A release without the place that we hook is left alone, and that is said."""
    script = """
import sys, types
sys.modules["requests"] = changed = types.ModuleType("requests")
changed.__version__ = "99"
import autellix_sglang.client as client
client.register("http://ours.test")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("requests 99 is not annotated: ")


@pytest.mark.parametrize("url", ["localhost:1", "ftp://x", "http://", "http://x:y", ""])
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    """A typing mistake is an error and not a server that is never matched."""
    with pytest.raises(ConfigError, match="base_url"):
        register(url)


def test_base_urls_are_matched_by_origin_and_path() -> None:
    """Ports default by scheme, /v1 is no prefix, and a prefix must fit."""
    server = register("https://ours.test/engine/v1/")
    try:
        assert register("https://ours.test:443/engine") is server
        assert registry.find("https", "ours.test", None, "/engine/v1/completions") is server
        assert registry.find("https", "ours.test", 443, "/engine/generate") is server
        for scheme, port, path in (
            ("https", 443, "/generate"),
            ("http", 443, "/engine/generate"),
            ("https", 444, "/engine/generate"),
            ("https", 443, "/engine/generate/more"),
        ):
            assert registry.find(scheme, "ours.test", port, path) is None
        assert server.url == "https://ours.test:443/engine"
    finally:
        registry.discard(server)


def test_there_is_no_program_outside() -> None:
    """Outside of a program nothing is current, and inside the innermost one is."""
    assert current_program() is None
    with program("outer") as outer:
        with program("inner") as inner:
            assert current_program() is inner
        assert current_program() is outer
    assert current_program() is None
    assert OURS not in [server.url for server in registry.all()]
