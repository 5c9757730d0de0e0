"""`autellix_sglang.client` with the libraries people use, against the real engine."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import anthropic
import httpx
import openai
import pytest
import requests

from autellix_sglang.client import ThreadPool, flush, program, register
from autellix_sglang.client.program import Program, registry
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine

WIDTH = 3
MESSAGES: Any = [{"role": "user", "content": "hi"}]
CHAT: Any = {"model": "m", "messages": MESSAGES, "max_tokens": 4}
RESPONSES: Any = {"model": "tiny-llama", "input": "hi", "max_output_tokens": 16}
GENERATE: Any = {"text": "hi", "sampling_params": {"max_new_tokens": 4}}

Call = Callable[[], object]
AsyncCall = Callable[[], Awaitable[object]]


@pytest.fixture(autouse=True)
def registered(engine: Engine) -> Iterator[None]:
    """The engine is registered for the time of one test."""
    server = register(engine.url)
    yield
    assert flush(30)
    assert server.is_ours
    registry.discard(server)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """Programs whose end is put off to the end of the test, so that they can be looked at."""
    made: list[Program] = []
    end = Program.end
    monkeypatch.setattr(Program, "end", made.append)
    yield made
    for each in made:
        end(each)


def calls_of(engine: Engine, program_id: str) -> list[dict[str, Any]]:
    """The calls of a program in order of arrival."""
    status, _, reply = engine.request(f"/v1/programs/{program_id}")
    assert status == 200, reply
    calls: list[dict[str, Any]] = reply["calls"]
    return calls


def wait_for(held: list[Program], count: int) -> list[Program]:
    """Programs that have ended; SGLang's executors end a moment after their last result."""
    deadline = time.monotonic() + 10
    while len(held) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(held) == count
    return held


def held_by(held: list[Program]) -> Program:
    """The only program, once it has ended."""
    [only] = wait_for(held, 1)
    return only


def check_map_reduce(calls: list[dict[str, Any]], makes_tasks: bool = False) -> None:
    """One call, then WIDTH on threads of their own that waited for it, then one for all of them.

    A library that `makes_tasks` runs each call in a task, so each is on a thread of its own.
    """
    first, *maps, last = calls
    assert first["parents"] == []
    assert [call["parents"] for call in maps] == [[first["id"]]] * WIDTH
    assert sorted(last["parents"]) == sorted(call["id"] for call in maps)
    num_threads = len({call["thread"] for call in calls})
    if makes_tasks:
        assert num_threads == WIDTH + 2
    else:
        assert (num_threads, first["thread"], last["thread"]) == (WIDTH + 1, "0", "0")


# -- one call with each library ------------------------------------------------------------------


@contextmanager
def with_openai(url: str) -> Iterator[Call]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
        yield lambda: client.chat.completions.create(**CHAT)


@contextmanager
def with_openai_stream(url: str) -> Iterator[Call]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
        yield lambda: list(client.chat.completions.create(**CHAT, stream=True))


@contextmanager
def with_openai_responses(url: str) -> Iterator[Call]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
        yield lambda: client.responses.create(**RESPONSES)


@contextmanager
def with_anthropic(url: str) -> Iterator[Call]:
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        yield lambda: client.messages.create(**CHAT)


@contextmanager
def with_anthropic_stream(url: str) -> Iterator[Call]:
    with anthropic.Anthropic(base_url=url, api_key="none") as client:

        def call() -> str:
            with client.messages.stream(**CHAT) as stream:
                return "".join(stream.text_stream)

        yield call


@contextmanager
def with_httpx(url: str) -> Iterator[Call]:
    with httpx.Client() as client:
        yield lambda: client.post(url + "/generate", json=GENERATE).raise_for_status()


@contextmanager
def with_requests(url: str) -> Iterator[Call]:
    yield lambda: requests.post(url + "/generate", json=GENERATE).raise_for_status()


@contextmanager
def with_requests_stream(url: str) -> Iterator[Call]:
    def call() -> list[bytes]:
        body = {**GENERATE, "stream": True}
        with requests.post(url + "/generate", json=body, stream=True) as response:
            return list(response.iter_lines())

    yield call


@contextmanager
def with_langchain(url: str) -> Iterator[Call]:
    langchain = pytest.importorskip("langchain_openai")
    with httpx.Client() as client:
        model = langchain.ChatOpenAI(
            base_url=url + "/v1", api_key="none", model="m", max_tokens=4, http_client=client
        )
        yield lambda: model.invoke("hi")


SYNC = [
    with_openai, with_openai_stream, with_openai_responses, with_anthropic,
    with_anthropic_stream, with_httpx, with_requests, with_requests_stream, with_langchain,
]  # fmt: skip


@pytest.mark.parametrize("make", SYNC, ids=lambda make: make.__name__[5:])
def test_a_program_of_plain_functions(engine: Engine, make: Any) -> None:
    """The server shows exactly the calls, threads and parents of a fan-out in a thread pool."""
    with make(engine.url) as call, program("sync") as running:
        call()
        with ThreadPool(WIDTH) as pool:
            for job in [pool.submit(call) for _ in range(WIDTH)]:
                job.result()
        call()
        check_map_reduce(calls_of(engine, running.id))


@asynccontextmanager
async def with_openai_async(url: str) -> AsyncIterator[AsyncCall]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:
        yield lambda: client.chat.completions.create(**CHAT)


@asynccontextmanager
async def with_openai_async_stream(url: str) -> AsyncIterator[AsyncCall]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:

        async def call() -> list[Any]:
            chunks = await client.chat.completions.create(**CHAT, stream=True)
            return [chunk async for chunk in chunks]

        yield call


@asynccontextmanager
async def with_anthropic_async(url: str) -> AsyncIterator[AsyncCall]:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
        yield lambda: client.messages.create(**CHAT)


@asynccontextmanager
async def with_httpx_async(url: str) -> AsyncIterator[AsyncCall]:
    async with httpx.AsyncClient() as client:
        yield lambda: client.post(url + "/generate", json=GENERATE)


@asynccontextmanager
async def with_aiohttp(url: str) -> AsyncIterator[AsyncCall]:
    async with aiohttp.ClientSession() as session:

        async def call() -> object:
            async with session.post(url + "/generate", json=GENERATE) as response:
                return await response.json()

        yield call


@asynccontextmanager
async def with_aiohttp_stream(url: str) -> AsyncIterator[AsyncCall]:
    async with aiohttp.ClientSession() as session:

        async def call() -> object:
            body = {**GENERATE, "stream": True}
            async with session.post(url + "/generate", json=body) as response:
                return [line async for line in response.content]

        yield call


@asynccontextmanager
async def with_langchain_async(url: str) -> AsyncIterator[AsyncCall]:
    langchain = pytest.importorskip("langchain_openai")
    async with httpx.AsyncClient() as client:
        model = langchain.ChatOpenAI(
            base_url=url + "/v1", api_key="none", model="m", max_tokens=4, http_async_client=client
        )
        yield lambda: model.ainvoke("hi")


@asynccontextmanager
async def with_openai_agents(url: str) -> AsyncIterator[AsyncCall]:
    agents = pytest.importorskip("agents")
    agents.set_tracing_disabled(True)  # it would report to OpenAI
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none") as client:
        agent = agents.Agent(
            name="helper",
            model=agents.OpenAIChatCompletionsModel(model="m", openai_client=client),
            model_settings=agents.ModelSettings(max_tokens=4),
        )
        yield lambda: agents.Runner.run(agent, "hi")


ASYNC = [
    with_openai_async, with_openai_async_stream, with_anthropic_async, with_httpx_async,
    with_aiohttp, with_aiohttp_stream, with_langchain_async, with_openai_agents,
]  # fmt: skip


@pytest.mark.parametrize("make", ASYNC, ids=lambda make: make.__name__[5:])
async def test_a_program_of_coroutines(engine: Engine, make: Any) -> None:
    """The server shows exactly the calls, threads and parents of a fan-out by gather."""
    async with make(engine.url) as call:
        with program("async") as running:
            await call()
            await asyncio.gather(*(call() for _ in range(WIDTH)))
            await call()
            calls = await asyncio.to_thread(calls_of, engine, running.id)
            check_map_reduce(calls, make in (with_langchain_async, with_openai_agents))


# -- sessions ------------------------------------------------------------------------------------


def test_the_server_knows_a_program_from_start_to_end(engine: Engine) -> None:
    """It is there before its first call, and forgotten as soon as it is over."""
    with program("session") as running:
        assert flush(30)
        assert engine.request(f"/v1/programs/{running.id}")[2]["num_calls"] == 0
        requests.post(engine.url + "/generate", json=GENERATE).raise_for_status()
        assert engine.request(f"/v1/programs/{running.id}")[2]["num_calls"] == 1
    assert flush(30)
    assert engine.request(f"/v1/programs/{running.id}")[0] == 404


# -- SGLang's frontend language ------------------------------------------------------------------


@pytest.fixture
def backend(engine: Engine) -> Any:
    from autellix_sglang.client import ProgramEndpoint

    return ProgramEndpoint(engine.url)


def edges(calls: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    """Thread and indices of parents of each call, threads renumbered in order of appearance."""
    index = {call["id"]: i for i, call in enumerate(calls)}
    names: dict[str, str] = {}
    return [
        (
            names.setdefault(call["thread"], str(len(names))),
            sorted(index[parent] for parent in call["parents"]),
        )
        for call in calls
    ]


def test_a_frontend_run_is_a_program(engine: Engine, backend: Any, held: list[Program]) -> None:
    """A chat of two turns is one program of two calls in a row."""
    example = importlib.import_module("examples.chatbot_sglang")
    state = example.chat.run(questions=["a", "b"], max_tokens=4, backend=backend)
    assert state["answer0"] and state["answer1"]
    state.sync()
    assert edges(calls_of(engine, held_by(held).id)) == [("0", []), ("0", [0])]


def test_forks_are_threads_and_join_makes_parents(
    engine: Engine, backend: Any, held: list[Program]
) -> None:
    """A fork caches its prefix with one call; its branches wait for that, the join for them."""
    sgl = importlib.import_module("sglang")

    @sgl.function
    def fan_out(s: Any) -> None:
        s += "Some text.\n"
        s.sync()  # SGLang's fork caches the prefix if the text is there by then
        forks = s.fork(WIDTH)
        forks += sgl.gen("line", max_tokens=3)
        forks.join()
        s += "\n".join(s["line"]) + sgl.gen("summary", max_tokens=3)

    state = fan_out.run(backend=backend)
    assert state["summary"] and len(state["line"]) == WIDTH
    state.sync()
    check_map_reduce(calls_of(engine, held_by(held).id))


def test_the_map_reduce_example_in_sglang(
    engine: Engine, backend: Any, held: list[Program]
) -> None:
    """Every part is a thread, and the summary waited for all of them."""
    example = importlib.import_module("examples.map_reduce_sglang")
    state = example.summarise.run(parts=["x", "y", "z"], max_tokens=4, backend=backend)
    assert state["summary"]
    state.sync()
    *_, first, second, third, last = calls_of(engine, held_by(held).id)
    maps = (first, second, third)
    assert len({call["thread"] for call in maps} - {"0"}) == 3
    assert (last["thread"], set(last["parents"])) == ("0", {call["id"] for call in maps})


def test_reading_a_fork_makes_parents(engine: Engine, backend: Any, held: list[Program]) -> None:
    """Without a join, the variable that is read is what the next call waited for."""
    sgl = importlib.import_module("sglang")

    @sgl.function
    def tips(s: Any) -> None:
        s += "Tips.\n"
        s.sync()
        forks = s.fork(2)
        forks += sgl.gen("tip", max_tokens=3)
        s += forks[0]["tip"] + sgl.gen("one", max_tokens=3)
        s += forks[1]["tip"] + sgl.gen("two", max_tokens=3)

    state = tips.run(backend=backend)
    assert state["two"]
    state.sync()
    calls = calls_of(engine, held_by(held).id)
    one, two = calls[-2:]
    assert (len(calls), one["thread"], two["thread"]) == (5, "0", "0")
    assert set(one["parents"]) <= {call["id"] for call in calls[1:3]}
    assert one["id"] in two["parents"]
    parents = {*one["parents"], *two["parents"]} - {one["id"]}
    assert parents == {call["id"] for call in calls[1:3]}


def test_select_is_a_chain(engine: Engine, backend: Any, held: list[Program]) -> None:
    """`select` first caches the prefix, then scores all choices with one request."""
    sgl = importlib.import_module("sglang")

    @sgl.function
    def choose(s: Any) -> None:
        s += "It is " + sgl.select("grade", ["bad", "good"]) + sgl.gen("why", max_tokens=3)

    state = choose.run(backend=backend)
    assert state["grade"] in ("bad", "good") and state["why"]
    state.sync()
    calls = calls_of(engine, held_by(held).id)
    prefix, *choices, why = calls
    assert {call["id"] for call in choices} == {choices[0]["id"]}
    assert [call["parents"] for call in choices] == [[prefix["id"]]] * 2
    assert why["parents"] == [choices[0]["id"]]


def test_run_batch_makes_a_program_of_each(
    engine: Engine, backend: Any, held: list[Program]
) -> None:
    """Runs of a batch overlap and are programs of their own."""
    example = importlib.import_module("examples.chatbot_sglang")
    arguments = [{"questions": [str(i), "more"], "max_tokens": 3} for i in range(4)]
    states = example.chat.run_batch(arguments, backend=backend, num_threads=4)
    assert all(state["answer1"] for state in states)
    for state in states:
        state.sync()
    for each in wait_for(held, 4):
        assert edges(calls_of(engine, each.id)) == [("0", []), ("0", [0])]


def test_a_streamed_run(engine: Engine, backend: Any, held: list[Program]) -> None:
    """A run that streams is the same program; no library adds calls of its own."""
    example = importlib.import_module("examples.chatbot_sglang")
    state = example.chat.run(questions=["a", "b"], max_tokens=4, backend=backend, stream=True)
    assert "".join(state.text_iter())
    assert edges(calls_of(engine, held_by(held).id)) == [("0", []), ("0", [0])]


def test_a_run_inside_of_a_program_is_a_thread_of_it(engine: Engine, backend: Any) -> None:
    """What was read from the run is what the program's next call waited for."""
    example = importlib.import_module("examples.chatbot_sglang")
    with program("outer") as running:
        state = example.chat.run(questions=["a"], max_tokens=4, backend=backend, stream=True)
        assert state["answer0"]
        httpx.post(engine.url + "/generate", json=GENERATE)
        inner, after = calls_of(engine, running.id)
    assert inner["thread"] != after["thread"] == "0"
    assert after["parents"] == [inner["id"]]


def test_other_backends_are_left_alone(engine: Engine, backend: Any) -> None:
    """Beside a `ProgramEndpoint`, SGLang's own backend still sends no ids."""
    sgl = importlib.import_module("sglang")
    example = importlib.import_module("examples.chatbot_sglang")
    with program("outer") as running:
        stock = sgl.RuntimeEndpoint(engine.url)
        state = example.chat.run(questions=["a"], max_tokens=4, backend=stock)
        assert state["answer0"]
        assert flush(30)
        assert engine.request(f"/v1/programs/{running.id}")[2]["num_calls"] == 0


# -- examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["chatbot", "react"])
def test_chain_examples(engine: Engine, make: str, held: list[Program]) -> None:
    """A chatbot and a ReAct agent are chains: each call waited for the one before."""
    example = importlib.import_module(f"examples.{make}")
    with openai.OpenAI(base_url=engine.url + "/v1", api_key="none") as client:
        if make == "chatbot":
            assert len(example.chat(client, ["a", "b", "c"], max_tokens=4)) == 3
        else:
            assert len(example.react(client, "a", max_turns=3, max_tokens=4)) > 1
    found = edges(calls_of(engine, held_by(held).id))
    assert found == [("0", [i - 1] if i else []) for i in range(len(found))]


async def test_the_map_reduce_example(engine: Engine, held: list[Program]) -> None:
    """Every map is a root on a thread of its own, and all are parents of the reduce."""
    example = importlib.import_module("examples.map_reduce")
    async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none") as client:
        await example.summarise(client, ["a", "b", "c"], max_tokens=4)
    found = edges(await asyncio.to_thread(calls_of, engine, held_by(held).id))
    assert found == [("0", []), ("1", []), ("2", []), ("3", [0, 1, 2])]


async def test_the_tree_search_example(engine: Engine, held: list[Program]) -> None:
    """In each round branches of two calls, which waited for the branches of the round before."""
    example = importlib.import_module("examples.tree_search")
    async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none") as client:
        await example.Search(client, "a", width=2, rounds=2, max_tokens=4).run()
    calls = await asyncio.to_thread(calls_of, engine, held_by(held).id)
    threads: dict[str, list[Any]] = {}
    for call in calls:
        threads.setdefault(call["thread"], []).append(call)
    assert [len(chain) for chain in threads.values()] == [2] * 4
    first, second = list(threads.values())[:2], list(threads.values())[2:]
    ends = sorted(chain[1]["id"] for chain in first)
    assert [chain[0]["parents"] for chain in first] == [[], []]
    assert [sorted(chain[0]["parents"]) for chain in second] == [ends, ends]
    assert all(chain[1]["parents"] == [chain[0]["id"]] for chain in threads.values())


def test_the_tree_search_example_in_sglang(
    engine: Engine, backend: Any, held: list[Program]
) -> None:
    """Branches fork from the best one so far, and the answer waited for all that was read."""
    example = importlib.import_module("examples.tree_search_sglang")
    state = example.search.run(question="a", width=2, depth=2, max_tokens=4, backend=backend)
    assert state["answer"]
    state.sync()
    calls = calls_of(engine, held_by(held).id)
    assert len({call["thread"] for call in calls}) == 5
    branches = {c["id"] for c in calls if c["thread"] != "0"}
    assert set(calls[-1]["parents"]) <= branches
    assert len(set(calls[-1]["parents"])) == 2
