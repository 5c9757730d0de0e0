"""The real engine behind a real router: what clients get is what the engine gives."""

from __future__ import annotations

import json
import sys
import urllib.request

import openai
import pytest

from bench.server import Server, free_port
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def routed(engine, tmp_path_factory):
    """The engine as seen through a router that it has joined."""
    port = free_port()
    command = [sys.executable, "-m", "autellix_sglang.router", "--port", str(port)]
    command += ["--endpoint", engine.router_endpoint]
    with Server("router", command, port, tmp_path_factory.mktemp("router")) as server:
        yield Engine(server, engine.router_endpoint)


def client_of(engine: Engine) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0)


def chat(engine: Engine, *, stream: bool):
    return client_of(engine).chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        temperature=0,
        stream=stream,
        extra_headers={"x-program-id": f"chat-{stream}"},
    )


def test_openai_client_gets_what_the_engine_says(engine, routed):
    """Chat completions, streamed and not, are the same through the router as without."""
    direct = chat(engine, stream=False).choices[0].message.content
    assert chat(routed, stream=False).choices[0].message.content == direct
    pieces = [part.choices[0].delta.content or "" for part in chat(routed, stream=True)]
    assert "".join(pieces) == direct


def test_generate_keeps_its_program(engine, routed):
    """/generate has the same output, and what the scheduler says of the call."""
    direct = engine.generate("the router", 6)
    reply = routed.generate("the router", 6, x_program_id="through-router")
    assert reply["output_ids"] == direct["output_ids"]
    assert reply["meta_info"]["program"]["service_steps"] > 0
    status, headers, found = routed.request("/v1/programs/through-router")
    assert (status, found["id"], len(found["calls"])) == (200, "through-router", 1)
    assert headers["content-type"] == "application/json"
    assert routed.request("/v1/programs/through-router", method="DELETE")[0] == 200


def test_other_endpoints_answer_too(routed):
    """Models, programs, statistics, metrics and errors come from the replica."""
    assert routed.request("/v1/models")[2]["data"][0]["id"] == "tiny-llama"
    assert routed.request("/program_stats")[2]["workers"]["engine"]["policy"] == "plas"
    opened = routed.request("/v1/programs", body={})[2]["id"]
    listed = routed.request("/v1/programs")[2]["programs"]
    assert {"engine"} == {p["worker"] for p in listed if p["id"] == opened}
    assert 'worker="engine"' in routed.request("/metrics")[2]
    assert routed.request("/generate", {"text": "x"}, {"x-program-id": " "})[0] == 400
    assert routed.request("/nowhere")[0] == 404


def test_overview_knows_the_engines_load(routed):
    """The router sees the engine's slots and the size of its cache."""
    routed.generate("load", 4)
    (worker,) = routed.request("/workers")[2]["workers"]
    assert (worker["id"], worker["state"], worker["slots"]) == ("engine", "ready", 4)
    assert worker["kv_tokens"] > 0


def test_client_that_leaves_frees_the_engine(engine, routed):
    """A stream that its reader abandons is aborted in the engine, and nothing is left of it."""
    params = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0}
    body = {"text": "a long story", "sampling_params": params, "stream": True}
    request = urllib.request.Request(
        f"{routed.url}/generate",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: ")
    engine.wait_until_empty()
