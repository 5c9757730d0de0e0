"""The real engine behind its real HTTP endpoints."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from autellix_sglang.engine.metrics import (
    COUNTERS,
    GAUGES,
    INTERVAL_S,
    MAX_STALL,
    PREFIX,
    WAITING,
)
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
MESSAGES = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 3}
RESPONSE = {"model": "tiny-llama", "input": "hi", "max_output_tokens": 16}
GENERATE = {"text": "hi", "sampling_params": {"max_new_tokens": 3}}
ENDPOINTS = {
    "/generate": GENERATE,
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/v1/responses": RESPONSE,
    "/v1/messages": MESSAGES,
}
IDENTITY = {
    "x-thread-id": "t1",
    "x-call-id": "c2",
    "x-parent-call-ids": "c1,unknown",
}
AGENT_HEADERS = (
    "x-program-id",
    "x-claude-code-session-id",
    "x-session-id",
    "session-id",
    "session_id",
    "x-session-affinity",
    "X-Dynamo-Session-ID",
    "x-smg-routing-key",
)


def _program(engine: Engine, program_id: str) -> Any:
    status, _, reply = engine.request(f"/v1/programs/{program_id}")
    assert status == 200, reply
    return reply


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_headers_place_a_call_in_its_program(engine: Engine, path: str, stream: bool) -> None:
    """On every endpoint, streaming or not, ids in headers reach the scheduler and come back."""
    name = f"p{path.replace('/', '-')}-{stream}"
    engine.generate(x_program_id=name, x_call_id="c1")
    body = {**ENDPOINTS[path], **({"stream": True} if stream else {})}
    status, headers, reply = engine.request(path, body, {"x-program-id": name, **IDENTITY})
    assert status == 200, reply
    assert (headers["x-program-id"], headers["x-call-id"]) == (name, "c2")
    assert stream or "x-program-service-steps" in headers  # a stream starts before they are known
    first, second = _program(engine, name)["calls"]
    assert first["id"] == "c1"
    assert (second["id"], second["thread"], second["parents"]) == ("c2", "t1", ["c1"])
    assert second["state"] == "finished"


@pytest.mark.parametrize("header", AGENT_HEADERS)
def test_each_known_header_names_the_program(engine: Engine, header: str) -> None:
    """Ids that agents already send are enough."""
    status, headers, reply = engine.request("/generate", GENERATE, {header: f"by-{header}"})
    assert status == 200, reply
    assert headers["x-program-id"] == f"by-{header}"
    assert _program(engine, f"by-{header}")["num_calls"] == 1


def test_body_fields_name_the_program(engine: Engine) -> None:
    """`custom_params.program_id` wins over `session_id`, and each is honoured."""
    params = {"max_new_tokens": 2, "custom_params": {"program_id": "by-custom"}}
    body = {"text": "hi", "sampling_params": params, "session_id": "by-session"}
    assert engine.request("/generate", body)[0] == 200
    assert _program(engine, "by-custom")["num_calls"] == 1
    assert engine.request("/v1/chat/completions", {**CHAT, "session_id": "by-session"})[0] == 200
    assert _program(engine, "by-session")["num_calls"] == 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_bad_header_is_a_400_that_names_it(engine: Engine, path: str, stream: bool) -> None:
    """A malformed id never reaches SGLang."""
    body = {**ENDPOINTS[path], "stream": stream}
    status, _, reply = engine.request(path, body, {"x-program-id": "x" * 257})
    assert status == 400
    assert "x-program-id" in json.dumps(reply)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_a_bad_body_id_is_a_400_that_names_it(engine: Engine, path: str, stream: bool) -> None:
    """So is one in the body, although a stream has begun by the time it is seen."""
    bad = {"program_id": ""}
    params = {"max_new_tokens": 2, "custom_params": bad}
    own = {"sampling_params": params} if path == "/generate" else {"custom_params": bad}
    status, _, reply = engine.request(path, {**ENDPOINTS[path], **own, "stream": stream})
    assert status == 400, reply
    assert "custom_params.program_id" in json.dumps(reply)


def test_samples_and_batches_are_calls_of_one_program(engine: Engine) -> None:
    """`n` samples of a prompt, and a batch of prompts, all belong to the program named once."""
    headers = {"x-program-id": "wide", "x-call-id": "fan"}
    status, _, reply = engine.request("/v1/chat/completions", {**CHAT, "n": 3}, headers)
    assert status == 200 and len(reply["choices"]) == 3
    body = {**GENERATE, "text": ["a", "b"]}
    status, _, reply = engine.request("/generate", body, {"x-program-id": "wide"})
    assert status == 200 and len(reply) == 2
    engine.generate(x_program_id="wide", x_call_id="join", x_parent_call_ids="fan")
    calls = _program(engine, "wide")["calls"]
    assert [call["id"] for call in calls].count("fan") >= 3
    assert calls[-1]["parents"] == ["fan"]


@pytest.mark.parametrize("ids", [{"x-program-id": "n-last", "x-program-end": "1"}, {}])
def test_samples_are_one_program_although_it_ends_with_them(
    engine: Engine, ids: dict[str, str]
) -> None:
    """SGLang's warm-up before the samples is tagged as they are, and ends nothing."""
    before = engine.stats()["num_programs"]
    status, _, reply = engine.request("/v1/chat/completions", {**CHAT, "n": 3}, ids)
    assert status == 200 and len(reply["choices"]) == 3
    assert engine.stats()["num_programs"] == before + 1
    assert engine.request("/v1/programs/n-last")[0] == 404


def test_calls_without_any_id_are_programs_of_their_own(engine: Engine) -> None:
    """Anonymous calls leave no program behind, and never share one."""
    before = engine.stats()["num_programs"]
    replies = [engine.generate() for _ in range(3)]
    names = {reply["meta_info"]["program"]["program_id"] for reply in replies}
    assert len(names) == 3
    assert engine.stats()["num_programs"] >= before + 3
    assert engine.request(f"/v1/programs/{names.pop()}")[0] == 404


def test_sessions_are_started_listed_and_ended(engine: Engine) -> None:
    """POST, GET with paging, and DELETE of /v1/programs; x-program-end on the last call."""
    assert engine.request("/v1/programs", {"id": "s1"})[2] == {"id": "s1"}
    assert engine.request("/v1/programs", {})[2]["id"]
    engine.generate(x_program_id="s2")
    page = engine.request("/v1/programs?state=idle&limit=1")[2]
    assert len(page["programs"]) == 1 and page["next"] is not None
    rest = engine.request(f"/v1/programs?state=idle&after={page['next']}")[2]
    names = [program["id"] for program in page["programs"] + rest["programs"]]
    assert {"s1", "s2"} <= set(names) and len(names) == len(set(names))
    assert engine.request("/v1/programs/s1", method="DELETE")[2] == {"id": "s1", "state": "ended"}
    assert engine.request("/v1/programs/s1", method="DELETE")[0] == 404
    engine.generate(x_program_id="s2", x_program_end="1")
    assert engine.request("/v1/programs/s2")[0] == 404


@pytest.mark.parametrize("query", ["state=asleep", "limit=0", "limit=x", "after=", "after=p"])
def test_a_bad_query_is_a_400_that_names_it(engine: Engine, query: str) -> None:
    """GET /v1/programs says which parameter is wrong."""
    status, _, reply = engine.request(f"/v1/programs?{query}")
    assert status == 400
    assert reply["error"]["param"] == query.split("=")[0]


def test_a_tenant_sees_its_own_programs_only(engine: Engine) -> None:
    """Two tenants use one id for two programs."""
    for tenant in ("alice", "bob"):
        engine.generate(x_program_id="shared", x_tenant_id=tenant)
    alice = engine.request("/v1/programs", headers={"x-tenant-id": "alice"})[2]["programs"]
    assert [(program["id"], program["num_calls"]) for program in alice] == [("shared", 1)]
    assert engine.request("/v1/programs/shared", headers={"x-tenant-id": "eve"})[0] == 404


def test_service_counts_tokens_and_uncached_prefill(engine: Engine) -> None:
    """A generated token is 1 step, an uncached prompt token `prefill_weight`, a cached one 0."""
    prompt = "a prompt that nobody else in these tests has sent, " * 4
    first = engine.generate(prompt, 5)["meta_info"]["program"]
    again = engine.generate(prompt, 5)["meta_info"]["program"]
    assert first["service_steps"] == pytest.approx(5 + 0.02 * len(prompt), abs=0.05)
    assert again["service_steps"] == pytest.approx(5 + 0.02, abs=0.01)


def test_preemption_changes_no_result(engine: Engine) -> None:
    """Long calls, taken off for short ones in mid-decode, answer as they do alone."""
    prompts = [f"long call number {i}: " for i in range(6)]
    alone = [engine.generate(prompt, 60)["output_ids"] for prompt in prompts]
    before = engine.stats()
    with ThreadPoolExecutor(20) as pool:
        long = [pool.submit(engine.generate, p, 60, x_program_id=f"l{p}") for p in prompts]
        short = [pool.submit(engine.generate, f"short {i}", 3) for i in range(40)]
        assert [call.result()["output_ids"] for call in long] == alone
        assert all(len(call.result()["output_ids"]) == 3 for call in short)
    after = engine.stats()
    assert after["num_preemptions"] > before["num_preemptions"]
    assert after["retracted_calls"] == before["retracted_calls"]  # there is KV for all of them
    assert max(call.result()["meta_info"]["program"]["preemptions"] for call in long) > 0


def test_log_probabilities_are_those_of_an_undisturbed_run(engine: Engine) -> None:
    """A call that asks for extras per token is ordered, but not preempted."""
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    body = {"text": "probable", "sampling_params": params, "return_logprob": True}

    def probabilities() -> Any:
        reply = engine.request("/generate", body, {"x-program-id": "logprobs"})[2]
        assert reply["meta_info"]["program"]["preemptions"] == 0
        return [entry[:2] for entry in reply["meta_info"]["output_token_logprobs"]]

    alone = probabilities()
    with ThreadPoolExecutor(12) as pool:
        busy = pool.submit(probabilities)
        for i in range(30):
            pool.submit(engine.generate, f"short {i}", 3)
        disturbed = busy.result()
    assert [token for _, token in disturbed] == [token for _, token in alone]
    assert [p for p, _ in disturbed] == pytest.approx([p for p, _ in alone], abs=1e-4)


LOOKS_BACK = (
    {"frequency_penalty": 0.5},
    {"presence_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 50},
)


def test_calls_that_look_back_at_their_output_are_not_preempted(engine: Engine) -> None:
    """SGLang would count penalties anew on resumption: such calls are ordered and run on.

    Answers are not compared: with overlap scheduling SGLang's own penalties miss the token before
    any other call's prefill.
    """

    def num_preemptions(extra: dict[str, float]) -> int:
        params = {"temperature": 0, "max_new_tokens": 60, "ignore_eos": True, **extra}
        body = {"text": "look back", "sampling_params": params}
        reply = engine.request("/generate", body, {"x-program-id": f"looks-back-{extra}"})[2]
        return int(reply["meta_info"]["program"]["preemptions"])

    with ThreadPoolExecutor(16) as pool:
        busy = [pool.submit(num_preemptions, extra) for extra in LOOKS_BACK]
        for i in range(40):
            pool.submit(engine.generate, f"short {i}", 3)
        assert [call.result() for call in busy] == [0] * len(LOOKS_BACK)


def test_settings_change_while_serving(engine: Engine) -> None:
    """PATCH /program_config takes effect at once; bad changes are refused by name."""
    before = engine.stats()
    reply = engine.request("/program_config", {"policy": "atlas", "beta": 2}, method="PATCH")[2]
    assert (reply["policy"], reply["beta"], reply["quantum"]) == ("atlas", 2, before["quantum"])
    for bad, field in (({"policy": "off"}, "policy"), ({"quantum": -1}, "quantum")):
        status, _, reply = engine.request("/program_config", bad, method="PATCH")
        assert status == 400 and field in reply["error"]["param"]
    restored = {"policy": before["policy"], "beta": before["beta"]}
    engine.request("/program_config", restored, method="PATCH")
    assert engine.stats()["policy"] == before["policy"]


def test_a_host_pool_is_made_while_serving_or_refused_by_name(engine: Engine) -> None:
    """More memory than there is costs a 400 and nothing else; -1 is this machine's share."""
    huge = {"kv": "swap", "host_memory": 2.0**30}
    status, _, reply = engine.request("/program_config", huge, method="PATCH")
    assert (status, reply["error"]["param"]) == (400, "--program-host-memory")
    assert engine.stats()["kv"] == "keep"
    status, _, reply = engine.request(
        "/program_config", {"kv": "swap", "host_memory": -1}, method="PATCH"
    )
    assert status == 200 and reply["host_pool_bytes"] > 0 and reply["host_memory"] > 0
    engine.generate()
    assert engine.request("/program_config", {"kv": "keep"}, method="PATCH")[0] == 200


def test_server_info_shows_the_scheduler(engine: Engine) -> None:
    """SGLang's own introspection carries our counters."""
    info = engine.request("/server_info")[2]
    assert info["internal_states"][0]["program_scheduler"]["policy"] == "plas"


def _series(engine: Engine) -> dict[str, float]:
    """Our samples at /metrics: value by name, and by name and level."""
    text = engine.request("/metrics")[2]
    samples = (s for f in text_string_to_metric_families(text) for s in f.samples)
    return {
        f"{s.name} {s.labels['level']}" if "level" in s.labels else s.name: s.value
        for s in samples
        if s.name.startswith(PREFIX)
    }


def test_prometheus_has_the_counters(engine: Engine) -> None:
    """Every series is there; counters count on, and none grows with the number of programs."""
    before = _series(engine)
    assert {name for name in before if name.endswith("_total")} == {
        f"{PREFIX}{name}_total" for name in COUNTERS
    }
    assert before.keys() >= {f"{PREFIX}{name}" for name in (*GAUGES, MAX_STALL)}
    assert f"{PREFIX}{WAITING} {engine.stats()['levels'] - 1}" in before
    for i in range(5):
        engine.generate(x_program_id=f"metric-{i}")
    time.sleep(2 * INTERVAL_S)
    engine.generate()
    after = _series(engine)
    assert after.keys() == before.keys()
    assert after[f"{PREFIX}calls_total"] >= before[f"{PREFIX}calls_total"] + 5


def test_every_series_is_in_the_docs() -> None:
    """docs/metrics.md names what is exported."""
    text = Path("docs/metrics.md").read_text()
    for name in (*COUNTERS, *GAUGES, WAITING, MAX_STALL):
        assert f"`{name}" in text, name


def test_an_abort_reaches_waiting_preempted_and_running_calls(engine: Engine) -> None:
    """POST /abort_request for everything ends every call, and nothing is left."""
    with ThreadPoolExecutor(12) as pool:
        calls = [
            pool.submit(
                engine.request,
                "/generate",
                {"text": f"{i}", "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}},
                {"x-program-id": f"abort-{i}"},
            )
            for i in range(12)
        ]
        while engine.stats()["live_calls"] < 12:
            pass
        engine.request("/abort_request", {"abort_all": True})
        for call in calls:
            reply = call.result()[2]
            assert "abort" in json.dumps(reply)
    engine.wait_until_empty()


def test_a_preempted_call_that_is_aborted_keeps_what_it_has(engine: Engine) -> None:
    """All its tokens, its usage and its outcome, as if it had been aborted while it ran."""
    params = {"temperature": 0, "max_new_tokens": 900, "ignore_eos": True}
    body = {"text": "a long call to abort", "sampling_params": params, "rid": "abort-me"}
    is_over = threading.Event()

    def others(i: int) -> None:
        while not is_over.is_set():
            engine.generate(f"short {i}", 20)

    with ThreadPoolExecutor(20) as pool:  # so many that it waits for long
        call = pool.submit(engine.request, "/generate", body, {"x-program-id": "abort-me"})
        for i in range(18):
            pool.submit(others, i)
        page: dict[str, Any] = {}
        while not (page.get("state") == "waiting" and page["calls"][0]["preemptions"]):
            assert not call.done(), "it was never seen preempted"
            page = engine.request("/v1/programs/abort-me")[2]
        engine.request("/abort_request", {"rid": "abort-me"})
        status, headers, reply = call.result()
        is_over.set()
    num_tokens = len(reply["output_ids"])
    alone = engine.generate(body["text"], num_tokens)["output_ids"]
    meta = reply["meta_info"]
    assert (status, meta["finish_reason"]["type"], reply["output_ids"]) == (200, "abort", alone)
    assert (meta["completion_tokens"], meta["prompt_tokens"] > 0) == (num_tokens, True)
    # Each token is a step; what the page showed then is there, and perhaps some more.
    assert num_tokens >= int(page["service_steps"]) - 1
    assert meta["program"]["preemptions"] == int(headers["x-program-preemptions"]) > 0
    engine.wait_until_empty()


@pytest.mark.parametrize("prompt", [{"text": ""}, {"input_ids": []}, {"input_ids": [5, -1]}])
def test_a_prompt_that_would_end_the_engine_is_refused(engine: Engine, prompt: Any) -> None:
    """Stock SGLang's scheduler dies of it, and a router would send it to the next replica."""
    status, _, reply = engine.request("/generate", {**prompt, "sampling_params": {}})
    assert status == 400, reply
    assert engine.generate("still there", 2)["output_ids"]


def test_a_request_id_with_a_line_break_loses_no_answer(engine: Engine) -> None:
    """It cannot be a header, so it is none."""
    params = {"max_new_tokens": 2, "ignore_eos": True}
    body = {"text": "hello", "sampling_params": params, "rid": "a\nb"}
    status, headers, reply = engine.request("/generate", body)
    assert (status, reply["meta_info"]["completion_tokens"]) == (200, 2)
    assert "x-call-id" not in headers


def _abandon(engine: Engine, i: int) -> None:
    """Start a program and walk away: in mid-stream, or after its first call."""
    headers = {"content-type": "application/json", "x-program-id": f"abandoned-{i}"}
    leaves = i % 2 == 0
    params = {"max_new_tokens": 300 if leaves else 2, "ignore_eos": True}
    body = {"text": f"program {i}", "sampling_params": params, "stream": leaves}
    request = urllib.request.Request(engine.url + "/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read(20 if leaves else -1)


def test_a_thousand_abandoned_programs_leave_nothing(engine: Engine) -> None:
    """Half disconnect in mid-stream; after the TTL no program, call or KV row is held."""
    before = engine.stats()
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda i: _abandon(engine, i), range(1000)))
    after = engine.wait_until_empty()
    assert after["num_programs"] - before["num_programs"] == 1000
    assert after["orphaned_calls"] == 0
    assert after["num_expired"] > before["num_expired"]


# -- calls that send no id -----------------------------------------------------------------------


@pytest.fixture
def inferring(engine: Engine) -> Iterator[Engine]:
    """The engine with `--program-infer` on, for the time of one test."""
    status, _, reply = engine.request("/program_config", {"infer": True}, method="PATCH")
    assert status == 200, reply
    yield engine
    engine.request("/program_config", {"infer": False}, method="PATCH")


def _continue(engine: Engine, input_ids: list[int], **headers: str) -> tuple[str, list[int]]:
    """Send a prompt of token ids; its program, and prompt and output together."""
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"input_ids": input_ids, "sampling_params": params}
    status, told, reply = engine.request("/generate", body, names)
    assert status == 200, reply
    program_id = reply["meta_info"]["program"]["program_id"]
    assert told["x-program-id"] == program_id
    return program_id, input_ids + reply["output_ids"]


def test_a_call_without_id_joins_the_program_it_continues(inferring: Engine) -> None:
    """Histories lead a call to its program: a chain, with each call the parent of the next."""
    first, history = _continue(inferring, list(range(60, 100)))
    second, longer = _continue(inferring, [*history, 1, 2, 3])
    third, _ = _continue(inferring, [*longer, 4])
    assert first == second == third
    calls = _program(inferring, first)["calls"]
    assert [call["parents"] for call in calls] == [[], [calls[0]["id"]], [calls[1]["id"]]]
    assert inferring.stats()["histories"] >= 3


def test_only_a_whole_history_of_the_same_tenant_is_joined(inferring: Engine) -> None:
    """A shared prompt, a changed token or another tenant's history join nothing."""
    prompt = list(range(100, 150))
    first, history = _continue(inferring, prompt)
    changed = [*history[:-1], history[-1] ^ 1, 5]
    assert _continue(inferring, [*prompt, 200])[0] != first
    assert _continue(inferring, changed)[0] != first
    assert _continue(inferring, [*history, 5], x_tenant_id="other")[0] != first
    named, _ = _continue(inferring, [*history, 5], x_program_id="named")
    assert named == "named"
    assert _continue(inferring, [*history, 6])[0] == first


def test_histories_are_not_followed_unless_asked(engine: Engine) -> None:
    """Without the flag every call without an id is a program of its own."""
    first, history = _continue(engine, list(range(150, 200)))
    assert _continue(engine, [*history, 1])[0] != first
    assert engine.stats()["histories"] == 0


def test_a_root_that_says_so_is_not_placed_by_the_longest_chain(engine: Engine) -> None:
    """Under atlas an empty list of parents begins a chain; no list continues the longest one."""
    try:
        assert engine.request("/program_config", {"policy": "atlas"}, method="PATCH")[0] == 200
        engine.generate(num_tokens=40, x_program_id="wide", x_call_id="long")
        root = engine.generate(num_tokens=2, x_program_id="wide", x_parent_call_ids="")
        untold = engine.generate(num_tokens=2, x_program_id="wide")
        child = engine.generate(num_tokens=2, x_program_id="wide", x_parent_call_ids="long")
    finally:
        engine.request("/program_config", {"policy": "plas"}, method="PATCH")
    levels = [reply["meta_info"]["program"]["level"] for reply in (root, untold, child)]
    assert levels == [0, 3, 3]  # 40 steps and more lie in the level from 32 to 64
