"""Two real replicas behind the router: what people run against one server runs against these."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from autellix_sglang.platform.tiny_model import ensure_tiny_model
from bench.server import Server, free_port
from tests.engine.conftest import Engine

pytestmark = pytest.mark.engine

FLAGS = [
    "--max-running-requests", "4", "--max-total-tokens", "3000", "--context-length", "2048",
    "--sleep-on-idle", "--skip-server-warmup", "--program-prefill-weight", "0.02",
]  # fmt: skip
MESSAGES: Any = [{"role": "user", "content": "say something"}]
LONG_S = 300.0  # for a machine that does much else


class Fleet(Engine):
    """`launch --replicas 2`, asked through its router."""

    def workers(self) -> dict[str, Any]:
        status, _, reply = self.request("/workers")
        assert status == 200, reply
        return {worker["id"]: worker for worker in reply["workers"]}

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LONG_S
        while not is_so():
            self.server.check_alive()
            assert time.monotonic() < deadline, f"not {what}: {self.workers()}"
            time.sleep(0.1)

    def wait_ready(self) -> None:
        def are_ready() -> bool:
            workers = self.workers()
            states = [worker["state"] for worker in workers.values()]
            return states == ["ready", "ready"]

        self.wait_until(are_ready, "ready")

    def where(self, program_id: str, prompt: str = "hello") -> str:
        """The replica that a program's next call runs on."""
        body = {"text": prompt, "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
        status, headers, reply = self.request("/generate", body, {"x-program-id": program_id})
        assert status == 200, reply
        return headers["x-router-worker"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    port = free_port()
    command = [
        sys.executable, "-m", "autellix_sglang.launch", "--replicas", "2", "--port", str(port),
        *FLAGS,
    ]  # fmt: skip
    server = Server("fleet", command, port, tmp_path_factory.mktemp("fleet"))
    with server:
        fleet = Fleet(server, "")
        fleet.wait_ready()
        yield fleet
        server.check_alive()


def test_the_openai_client(fleet: Fleet) -> None:
    """Whole and streamed answers, and a program whose calls are all on one replica."""
    with openai.OpenAI(
        base_url=fleet.url + "/v1", api_key="none", default_headers={"x-program-id": "sdk"}
    ) as client:
        whole = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=5, extra_body={"ignore_eos": True},
            extra_headers={"x-call-id": "one"},
        )  # fmt: skip
        chunks = client.chat.completions.create(
            model="m", messages=MESSAGES, max_tokens=5, extra_body={"ignore_eos": True},
            stream=True, extra_headers={"x-parent-call-ids": "one"},
        )  # fmt: skip
        streamed = [chunk for chunk in chunks if chunk.choices]
        with pytest.raises(openai.BadRequestError, match="x-program-id"):
            client.chat.completions.create(
                model="m", messages=MESSAGES, extra_headers={"x-program-id": "a" * 300}
            )
    assert whole.choices[0].message.content
    assert streamed[-1].choices[0].finish_reason == "length"
    status, _, program = fleet.request("/v1/programs/sdk")
    assert status == 200
    assert [call["parents"] for call in program["calls"]] == [[], ["one"]]


def test_an_sglang_frontend_program(fleet: Fleet) -> None:
    """SGLang's own language runs unchanged, fork and join too."""
    import sglang

    @sglang.function
    def branches(s: Any) -> None:
        s += sglang.user("first")
        forks = s.fork(3)
        forks += sglang.assistant(sglang.gen("one", max_tokens=4))
        s += sglang.user("".join(fork["one"] for fork in forks))
        s += sglang.assistant(sglang.gen("two", max_tokens=4))

    state = branches.run(backend=sglang.RuntimeEndpoint(fleet.url))
    assert state["two"]


def test_programs_are_listed_with_their_replica(fleet: Fleet) -> None:
    """One list of all replicas' programs; a program can be asked for and ended anywhere."""
    homes = {f"list-{i}": fleet.where(f"list-{i}") for i in range(8)}
    assert set(homes.values()) == {"replica-0", "replica-1"}
    assert all(fleet.where(name) == home for name, home in homes.items())
    _, _, listed = fleet.request("/v1/programs?limit=1000")
    found = {p["id"]: p["worker"] for p in listed["programs"]}
    assert homes.items() <= found.items()
    status, _, _ = fleet.request("/v1/programs/list-0", method="DELETE")
    assert status == 200
    assert fleet.request("/v1/programs/list-0")[0] == 404
    _, _, metrics = fleet.request("/program_stats")
    assert set(metrics["workers"]) == {"replica-0", "replica-1"}


def test_greedy_answers_do_not_depend_on_the_replica(fleet: Fleet) -> None:
    """In float32 both replicas say the same, alone and in company."""
    prompts = [f"{word} " * 20 for word in ("alpha", "beta", "gamma", "delta")]

    def answers(worker: str) -> list[list[int]]:
        with ThreadPoolExecutor(4) as pool:
            replies = pool.map(
                lambda prompt: fleet.generate(prompt, 12, x_router_worker=worker), prompts
            )
            return [reply["output_ids"] for reply in replies]

    assert answers("replica-0") == answers("replica-1")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "m", "input": "hello"}),
        ("/v1/chat/completions", {"model": "m", "messages": "none"}),
        ("/generate", {"no_prompt": True}),
        ("/no/such/path", {}),
    ],
)
def test_errors_are_the_replicas_own(fleet: Fleet, path: str, body: object) -> None:
    """What a replica refuses is refused through the router in the same words."""
    url = fleet.workers()["replica-0"]["url"]
    through = fleet.request(path, body, {"x-router-worker": "replica-0"})
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as direct:
        urllib.request.urlopen(request, timeout=60)
    with direct.value as error:
        said = json.loads(error.read())
    assert (through[0], _timeless(through[2])) == (direct.value.code, _timeless(said))


def _timeless(reply: Any) -> Any:
    """An error without what differs from call to call."""
    return {key: value for key, value in reply.items() if key not in ("id", "created")}


def test_sglangs_own_serving_benchmark(fleet: Fleet, tmp_path: Path) -> None:
    """`python -m sglang.benchmark.serving` runs against the router as against a server.

    It imports Hugging Face's `datasets` for its image workload; where that is not installed, an
    empty module takes its place, for random ids need nothing of it.
    """
    command = [
        sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang",
        "--base-url", fleet.url, "--dataset-name", "random-ids", "--num-prompts", "16",
        "--random-input-len", "64", "--random-output-len", "8", "--random-range-ratio", "1",
        "--tokenizer", str(ensure_tiny_model()), "--model", "tiny-llama", "--tokenize-prompt",
        "--disable-tqdm", "--output-file", str(tmp_path / "result.jsonl"),
    ]  # fmt: skip
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if importlib.util.find_spec("datasets") is None:
        (tmp_path / "datasets.py").write_text("load_dataset = None\n")
        environ["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LONG_S, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    assert ["Successful", "requests:", "16"] in found


def test_drained_replica_gets_no_calls(fleet: Fleet) -> None:
    """A drained replica keeps what it has, its programs run elsewhere until it is back."""
    name = fleet.where("drained")
    assert fleet.request(f"/workers/{name}/drain", {})[0] == 200
    assert fleet.workers()[name]["state"] == "draining"
    assert fleet.where("drained") != name
    assert fleet.request(f"/workers/{name}/undrain", {})[0] == 200
    fleet.wait_ready()


def test_killed_replica_is_replaced(fleet: Fleet) -> None:
    """After kill -9 in mid-run every call ends, elsewhere; the replica is started again."""
    victim = fleet.where("victim")
    leader = _process(fleet, victim)
    undisturbed = fleet.generate("a long story", 200)["output_ids"]
    with ThreadPoolExecutor(6) as pool:
        running = [
            pool.submit(fleet.generate, "a long story", 200, x_program_id="victim")
            for _ in range(6)
        ]
        time.sleep(0.2)
        os.killpg(leader.pid, signal.SIGKILL)
        answers = [call.result()["output_ids"] for call in running]
    assert answers == [undisturbed] * 6
    assert fleet.where("victim") != victim
    fleet.wait_until(lambda: not leader.is_running(), "dead")
    fleet.wait_ready()
    assert _process(fleet, victim).pid != leader.pid
    status, headers, _ = fleet.request("/v1/models", headers={"x-router-worker": victim})
    assert (status, headers["x-router-worker"]) == (200, victim)


def _process(fleet: Fleet, name: str) -> psutil.Process:
    """The leader of a replica's process group."""
    children = psutil.Process(fleet.server.pid).children()
    return next(child for child in children if name in child.cmdline())
