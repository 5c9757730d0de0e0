"""Clients that people use, unchanged, against the real engine.

Each drives one program of the same form, once chained by hand and once with a fork and a join, and
the engine then shows exactly its calls, threads and parents:

    plan --+--> draft 1 --> edit 1 --+--> review
           +--> draft 2 --> edit 2 --+
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import aiohttp
import anthropic
import httpx
import openai
import pytest
import requests

from autellix_sglang.client import ThreadPool, flush, program, register
from autellix_sglang.client.program import registry
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine

MODEL = "tiny-llama"
MESSAGES: Any = [{"role": "user", "content": "say something"}]
CHAT: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}
# Calls are named by thread and position on it; threads are numbered as they first call.
FORK_AND_JOIN = {
    "0.0": set(),
    "1.0": {"0.0"}, "1.1": {"1.0"},
    "2.0": {"0.0"}, "2.1": {"2.0"},
    "0.1": {"1.1", "2.1"},
}  # fmt: skip
CHAIN = {"0.0": set(), "0.1": {"0.0"}, "0.2": {"0.1"}}

Call = Callable[[], Any]
AsyncCall = Callable[[], Awaitable[Any]]


def _calls(engine: Engine, program_id: str) -> list[Any]:
    status, _, reply = engine.request(f"/v1/programs/{program_id}")
    assert status == 200, reply
    calls: list[Any] = reply["calls"]
    return calls


def graph(engine: Engine, program_id: str) -> dict[str, set[str]]:
    """The parents of each finished call of a program, both named by thread and position."""
    names: dict[str, str] = {}
    lengths: dict[str, int] = {}
    calls = _calls(engine, program_id)
    for call in calls:
        assert call["state"] == "finished"
        position = lengths.get(call["thread"], 0)
        lengths[call["thread"]] = position + 1
        names[call["id"]] = f"{call['thread']}.{position}"
    return {names[call["id"]]: {names[parent] for parent in call["parents"]} for call in calls}


@pytest.fixture
def registered(engine: Engine) -> Iterator[Engine]:
    """The engine, registered with the client library for the time of one test."""
    server = register(engine.url)
    yield engine
    flush()
    registry.discard(server)


# -- by hand -------------------------------------------------------------------------------------


def test_the_openai_client(engine: Engine) -> None:
    """Default headers name the program; a call may add its own."""
    with openai.OpenAI(
        base_url=engine.url + "/v1", api_key="none", default_headers={"x-program-id": "sync"}
    ) as client:
        whole = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=5, extra_body={"ignore_eos": True},
            extra_headers={"x-call-id": "one"},
        )  # fmt: skip
        chunks = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=5, extra_body={"ignore_eos": True},
            stream=True, extra_headers={"x-parent-call-ids": "one"},
        )  # fmt: skip
        streamed = "".join(
            chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices
        )
    assert whole.choices[0].message.content and streamed
    first, second = _calls(engine, "sync")
    assert (first["id"], second["parents"]) == ("one", ["one"])


async def test_the_async_openai_client(engine: Engine) -> None:
    """Parallel calls of one program, and their join."""
    async with openai.AsyncOpenAI(base_url=engine.url + "/v1", api_key="none") as client:

        async def call(name: str, parents: str = "") -> Any:
            headers = {"x-program-id": "async", "x-call-id": name}
            if parents:
                headers["x-parent-call-ids"] = parents
            return await client.chat.completions.create(
                model="m", messages=MESSAGES, max_tokens=4, extra_headers=headers
            )

        await asyncio.gather(*(call(f"map{i}") for i in range(5)))
        await call("reduce", ",".join(f"map{i}" for i in range(5)))
        with pytest.raises(openai.BadRequestError, match="x-program-id"):
            await client.chat.completions.create(
                model="m", messages=MESSAGES, extra_headers={"x-program-id": "a" * 300}
            )
    calls = _calls(engine, "async")
    assert len(calls) == 6
    assert sorted(calls[-1]["parents"]) == [f"map{i}" for i in range(5)]


# -- plain clients -------------------------------------------------------------------------------


def with_openai(stack: ExitStack, url: str) -> Call:
    client = stack.enter_context(openai.OpenAI(base_url=url + "/v1", api_key="none"))
    return lambda: client.chat.completions.create(**CHAT)


def with_openai_stream(stack: ExitStack, url: str) -> Call:
    client = stack.enter_context(openai.OpenAI(base_url=url + "/v1", api_key="none"))
    return lambda: list(client.chat.completions.create(**CHAT, stream=True))


def with_anthropic(stack: ExitStack, url: str) -> Call:
    client = stack.enter_context(anthropic.Anthropic(base_url=url, api_key="none"))
    return lambda: client.messages.create(**CHAT)


def with_httpx(stack: ExitStack, url: str) -> Call:
    client = stack.enter_context(httpx.Client())
    return lambda: client.post(url + "/v1/chat/completions", json=CHAT)


def with_requests(stack: ExitStack, url: str) -> Call:
    session = stack.enter_context(requests.Session())
    return lambda: session.post(url + "/v1/chat/completions", json=CHAT)


def with_langchain(stack: ExitStack, url: str) -> Call:
    model = langchain_model(url, http_client=stack.enter_context(httpx.Client()))
    return lambda: model.invoke("say something")


@pytest.mark.parametrize(
    "make",
    [with_openai, with_openai_stream, with_anthropic, with_httpx, with_requests, with_langchain],
    ids=lambda make: make.__name__[5:],
)
def test_a_client_drives_a_program(
    registered: Engine, make: Callable[[ExitStack, str], Call]
) -> None:
    """What the engine knows of a program is what the script did, without a word from it."""
    with ExitStack() as stack:
        call = make(stack, registered.url)
        with program("chain") as running:
            for _ in CHAIN:
                call()
            assert graph(registered, running.id) == CHAIN

        def branch(_: int) -> None:
            call()
            call()

        with program("fork") as running:
            call()
            with ThreadPool(2) as pool:
                list(pool.map(branch, range(2)))
            call()
            assert graph(registered, running.id) == FORK_AND_JOIN


async def with_openai_async(stack: AsyncExitStack, url: str) -> AsyncCall:
    made = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
    client = await stack.enter_async_context(made)
    return lambda: client.chat.completions.create(**CHAT)


async def with_openai_async_stream(stack: AsyncExitStack, url: str) -> AsyncCall:
    made = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
    client = await stack.enter_async_context(made)

    async def call() -> None:
        async for _ in await client.chat.completions.create(**CHAT, stream=True):
            pass

    return call


async def with_anthropic_async(stack: AsyncExitStack, url: str) -> AsyncCall:
    made = anthropic.AsyncAnthropic(base_url=url, api_key="none")
    client = await stack.enter_async_context(made)
    return lambda: client.messages.create(**CHAT)


async def with_httpx_async(stack: AsyncExitStack, url: str) -> AsyncCall:
    client = await stack.enter_async_context(httpx.AsyncClient())
    return lambda: client.post(url + "/v1/chat/completions", json=CHAT)


async def with_aiohttp(stack: AsyncExitStack, url: str) -> AsyncCall:
    session = await stack.enter_async_context(aiohttp.ClientSession())

    async def call() -> None:
        async with session.post(url + "/v1/chat/completions", json=CHAT) as response:
            await response.json()

    return call


# -- agent frameworks ----------------------------------------------------------------------------


def langchain_model(url: str, **clients: Any) -> Any:
    """Its own clients are kept for the life of the process, and so beyond a test's event loop."""
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=url + "/v1", api_key="none", max_tokens=4, **clients)


async def _langchain_model(stack: AsyncExitStack, url: str) -> Any:
    client = await stack.enter_async_context(httpx.AsyncClient())
    return langchain_model(url, http_async_client=client)


async def with_langchain_async(stack: AsyncExitStack, url: str) -> AsyncCall:
    model = await _langchain_model(stack, url)
    return lambda: model.ainvoke("say something")


async def with_langchain_chain(stack: AsyncExitStack, url: str) -> AsyncCall:
    from langchain_core.output_parsers import StrOutputParser

    chain = await _langchain_model(stack, url) | StrOutputParser()
    return lambda: chain.ainvoke("say something")


async def with_langchain_stream(stack: AsyncExitStack, url: str) -> AsyncCall:
    model = await _langchain_model(stack, url)

    async def call() -> None:
        async for _ in model.astream("say something"):
            pass

    return call


async def _agent(stack: AsyncExitStack, url: str, model: Callable[..., Any]) -> Any:
    from agents import Agent, ModelSettings

    made = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
    client = await stack.enter_async_context(made)
    return Agent(
        name="agent",
        instructions="Be brief.",
        model=model(model=MODEL, openai_client=client),
        model_settings=ModelSettings(max_tokens=16),
    )


def _runs() -> Any:
    from agents import RunConfig

    return RunConfig(tracing_disabled=True)  # traces would be sent to openai.com


async def with_openai_agents(stack: AsyncExitStack, url: str) -> AsyncCall:
    from agents import OpenAIChatCompletionsModel, Runner

    agent = await _agent(stack, url, OpenAIChatCompletionsModel)
    return lambda: Runner.run(agent, "say something", run_config=_runs())


async def with_openai_agents_responses(stack: AsyncExitStack, url: str) -> AsyncCall:
    from agents import OpenAIResponsesModel, Runner

    agent = await _agent(stack, url, OpenAIResponsesModel)
    return lambda: Runner.run(agent, "say something", run_config=_runs())


@pytest.mark.parametrize(
    "make",
    [
        with_openai_async, with_openai_async_stream, with_anthropic_async, with_httpx_async,
        with_aiohttp, with_langchain_async, with_langchain_chain, with_langchain_stream,
        with_openai_agents, with_openai_agents_responses,
    ],
    ids=lambda make: make.__name__[5:],
)  # fmt: skip
async def test_an_async_client_drives_a_program(
    registered: Engine, make: Callable[[AsyncExitStack, str], Awaitable[AsyncCall]]
) -> None:
    """The same with asyncio, also where a framework runs each call in a task of its own."""
    async with AsyncExitStack() as stack:
        call = await make(stack, registered.url)
        with program("chain") as running:
            for _ in CHAIN:
                await call()
            assert graph(registered, running.id) == CHAIN

        async def branch() -> None:
            await call()
            await call()

        with program("fork") as running:
            await call()
            await asyncio.gather(branch(), branch())
            await call()
            assert graph(registered, running.id) == FORK_AND_JOIN


def _parallel(model: Any) -> Any:
    """Two branches of two calls each."""
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.runnables import RunnableParallel

    branch = model | StrOutputParser() | model | StrOutputParser()
    return model | StrOutputParser() | RunnableParallel(one=branch, two=branch) | str | model


def test_a_parallel_chain_of_langchain(registered: Engine) -> None:
    """Its pool of OS threads runs the branches, and each is a thread of the program."""
    with httpx.Client() as client, program("parallel") as running:
        _parallel(langchain_model(registered.url, http_client=client)).invoke("say something")
        assert graph(registered, running.id) == FORK_AND_JOIN


async def test_an_async_parallel_chain_of_langchain(registered: Engine) -> None:
    """The same with asyncio."""
    async with AsyncExitStack() as stack:
        model = await _langchain_model(stack, registered.url)
        with program("parallel") as running:
            await _parallel(model).ainvoke("say something")
            assert graph(registered, running.id) == FORK_AND_JOIN


def test_a_batch_of_langchain(registered: Engine) -> None:
    """Each input of a batch is a thread, and whatever follows waited for all."""
    with httpx.Client() as client, program("batch") as running:
        model = langchain_model(registered.url, http_client=client)
        model.batch(["one", "two", "three"])
        model.invoke("say something")
        assert graph(registered, running.id) == {
            "1.0": set(), "2.0": set(), "3.0": set(), "0.0": {"1.0", "2.0", "3.0"},
        }  # fmt: skip


async def test_a_streamed_run_of_openai_agents_is_a_thread(registered: Engine) -> None:
    """It runs in a task that nobody awaits, but its events: parents are exact, threads are new."""
    from agents import OpenAIChatCompletionsModel, Runner

    async with AsyncExitStack() as stack:
        agent = await _agent(stack, registered.url, OpenAIChatCompletionsModel)
        with program("stream") as running:
            for _ in range(3):
                run = Runner.run_streamed(agent, "say something", run_config=_runs())
                async for _event in run.stream_events():
                    pass
            expected = {"1.0": set(), "2.0": {"1.0"}, "3.0": {"2.0"}}
            assert graph(registered, running.id) == expected


# -- SGLang's frontend language ------------------------------------------------------------------


def test_an_sglang_frontend_program(engine: Engine) -> None:
    """SGLang's own language runs unchanged; without ids its calls are programs of their own."""
    import sglang

    @sglang.function
    def two_turns(s: Any) -> None:
        s += sglang.user("first")
        s += sglang.assistant(sglang.gen("one", max_tokens=4))
        s += sglang.user("second")
        s += sglang.assistant(sglang.gen("two", max_tokens=4))

    before = engine.stats()["num_finished"]
    state = two_turns.run(backend=sglang.RuntimeEndpoint(engine.url))
    assert state["one"] and state["two"]
    assert engine.stats()["num_finished"] == before + 2


def test_the_sglang_frontend_drives_a_program(registered: Engine) -> None:
    """A run inside of a program: fork makes threads, join makes parents."""
    import sglang

    from autellix_sglang.client import ProgramEndpoint

    @sglang.function
    def fork_and_join(s: Any) -> None:
        s += "Plan: " + sglang.gen("plan", max_tokens=4)
        s.sync()
        forks = s.fork(2)
        forks += "\nDraft: " + sglang.gen("draft", max_tokens=4)
        forks += "\nEdit: " + sglang.gen("edit", max_tokens=4)
        forks.join()
        s += "\nReview: " + sglang.gen("review", max_tokens=4)

    backend = ProgramEndpoint(registered.url)
    with program("frontend") as running:
        state = fork_and_join.run(backend=backend)
        assert state["review"]
        found = graph(registered, running.id)
    # The run is a thread of the program; before it forks, SGLang caches the prefix with a call.
    assert found == {
        "1.0": set(), "1.1": {"1.0"},
        "2.0": {"1.1"}, "2.1": {"2.0"},
        "3.0": {"1.1"}, "3.1": {"3.0"},
        "1.2": {"2.1", "3.1"},
    }  # fmt: skip


def test_a_choice_of_the_sglang_frontend(registered: Engine) -> None:
    """`select` is a chain of two calls, of which the second scores the choices."""
    import sglang

    from autellix_sglang.client import ProgramEndpoint

    @sglang.function
    def choose(s: Any) -> None:
        s += "It is " + sglang.select("grade", ["bad", "good"])
        s += " because " + sglang.gen("why", max_tokens=4)

    with program("select") as running:
        state = choose.run(backend=ProgramEndpoint(registered.url))
        assert state["why"]
        calls = _calls(registered, running.id)
    by_id: dict[str, set[str]] = {}
    for call in calls:
        by_id.setdefault(call["id"], set()).update(call["parents"])
    assert {call["thread"] for call in calls} == {"1"}
    first, second, third = by_id
    assert [by_id[call] for call in (first, second, third)] == [set(), {first}, {second}]
    assert len([call for call in calls if call["id"] == second]) == 2  # one for each choice
