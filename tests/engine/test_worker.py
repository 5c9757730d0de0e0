"""The worker agent in SGLang's HTTP process: what it relies on there, and when it lives."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("zmq")

from starlette.applications import Starlette

from autellix_sglang.engine import worker
from autellix_sglang.router.config import RouterConfig, WorkerConfig
from autellix_sglang.router.hub import Hub
from autellix_sglang.router.messages import Call, Report
from tests.router.conftest import FAST, Rig


async def test_load_is_read_from_sglangs_own_snapshot():
    """A report takes slots, cache and the measured prefill rate from SGLang's `LoadSnapshot`."""
    pytest.importorskip("sglang")
    from sglang.srt.managers.load_snapshot import LoadSnapshot
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    load = LoadSnapshot(
        num_running_reqs=3, num_waiting_reqs=2, max_running_requests=8, max_total_num_tokens=900,
        num_used_tokens=90, total_prefill_uncached_tokens=50_000, total_prefill_busy_us=20_000_000,
        cache_hit_rate=0.5,
    )  # fmt: skip

    async def get_loads():
        return [load]

    manager = SimpleNamespace(
        get_loads=get_loads, server_status=ServerStatus.Up, gracefully_exit=False
    )
    report = await worker.probe_sglang(manager)
    assert (report.is_ready, report.num_live, report.num_slots) == (True, 5, 8)
    assert (report.kv_tokens, report.kv_used_tokens, report.cache_hit_rate) == (900, 90, 0.5)
    assert (report.prefill_tokens_per_s, report.computed_tokens) == (2500.0, 50_000)
    load.total_prefill_uncached_tokens = worker.RATE_TOKENS - 1
    assert (await worker.probe_sglang(manager)).prefill_tokens_per_s == 0
    manager.server_status = ServerStatus.Starting
    assert not (await worker.probe_sglang(manager)).is_ready


async def test_agent_lives_as_long_as_the_app(tmp_path):
    """Attached to an app, the agent joins after its start-up and leaves before its end."""
    seen = []

    @asynccontextmanager
    async def own(app):
        seen.append("up")
        yield {}
        seen.append("down")

    endpoint = f"ipc://{tmp_path}/router.sock"
    hub = Hub(RouterConfig(endpoint=endpoint, **FAST))
    await hub.start()
    app = Starlette(lifespan=own)
    worker.attach(app, None, WorkerConfig(endpoints=(endpoint,), name="a"), "http://here")
    async with app.router.lifespan_context(app):
        await Rig.until(lambda: "a" in hub.workers)
        assert (seen, hub.workers["a"].url) == (["up"], "http://here")
    await Rig.until(lambda: "a" not in hub.workers or hub.workers["a"].is_leaving)
    assert seen == ["up", "down"]
    await hub.stop()


async def test_late_end_leaves_a_later_call_of_the_same_number_alone(tmp_path):
    """A call of the session before ends late; the one that has its number now is still there."""
    ends = [asyncio.Event(), asyncio.Event()]

    async def app(scope, receive, send):
        await ends[int(scope["path"])].wait()

    async def probe():
        return Report(is_ready=True)

    config = WorkerConfig(endpoints=(f"ipc://{tmp_path}/router.sock",), name="a")
    agent = worker.WorkerAgent(app, config, probe)
    await agent.start()
    (link,) = agent._links
    link._beating.cancel()
    for path in "01":
        link._end_session()
        link._serve(Call(stream=1, method="GET", path=path))
    ends[0].set()
    await Rig.until(lambda: len(link._tasks) == 1)
    left = [stream.call.path for stream in link._streams.values()]
    ends[1].set()
    await agent.stop()
    assert left == ["1"]
