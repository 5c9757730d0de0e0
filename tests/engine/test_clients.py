"""Clients that people use, unchanged, against the real engine."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine

MESSAGES: Any = [{"role": "user", "content": "say something"}]


def _calls(engine: Engine, program_id: str) -> list[Any]:
    status, _, reply = engine.request(f"/v1/programs/{program_id}")
    assert status == 200, reply
    calls: list[Any] = reply["calls"]
    return calls


def test_the_openai_client(engine: Engine) -> None:
    """Default headers name the program; a call may add its own."""
    with openai.OpenAI(
        base_url=engine.url + "/v1", api_key="none", default_headers={"x-program-id": "sync"}
    ) as client:
        whole = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=5, extra_headers={"x-call-id": "one"}
        )
        chunks = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=5, stream=True,
            extra_headers={"x-parent-call-ids": "one"}, temperature=0,
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
