"""The tokenizer manager's own parts, on a manager without sockets or processes."""

from __future__ import annotations

import asyncio
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import GenerateReqInput

from autellix_sglang.config import ProgramConfig
from autellix_sglang.engine import http, tokenizer
from autellix_sglang.errors import ControlError, IdentityError
from autellix_sglang.identity import HeaderIdentity
from autellix_sglang.messages import CONFIGURE, GET, OPEN, TICK, ProgramControl, ProgramReply


class Manager(tokenizer.ProgramTokenizerManager):
    """Keeps what it would send to the scheduler; a test delivers the replies to GET."""

    def __init__(self, ttl_s: float = 2.0) -> None:
        self.program_config = ProgramConfig(ttl=ttl_s)
        self._replies = tokenizer.deque()
        self._num_activities = 0
        self._ttl_s = ttl_s
        self._ticker = None
        self._has_changed = asyncio.Event()
        self.asyncio_tasks = set()
        self.sent: list[ProgramControl] = []
        self.num_programs = 0
        self.present_ttl_s = ttl_s

    def auto_create_handle_loop(self) -> None:
        pass

    async def tell(self, control: ProgramControl) -> ProgramReply:
        """As `program_control`, at once."""
        return ProgramReply(
            ok=True, body={"programs": self.num_programs, "ttl_s": self.present_ttl_s}
        )

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        self.sent.append(obj)
        if obj.op in (OPEN, TICK):
            body = {"programs": self.num_programs, "ttl_s": self.present_ttl_s}
            reply = ProgramReply(ok=True, body=body)
            asyncio.get_running_loop().call_soon(self._take_reply, reply)


def ask(program_id: str) -> ProgramControl:
    return ProgramControl(op=GET, now_s=0.0, program_id=program_id)


def answer(program_id: str) -> ProgramReply:
    return ProgramReply(ok=True, body={"id": program_id})


async def test_replies_go_to_who_asked():
    """Concurrent questions get their own answers, in the order in which they were asked."""
    manager = Manager()
    tasks = [asyncio.create_task(manager.program_control(ask(i))) for i in "abc"]
    await asyncio.sleep(0)
    for i in "abc":
        manager._take_reply(answer(i))
    assert [reply.body["id"] for reply in await asyncio.gather(*tasks)] == ["a", "b", "c"]


async def test_late_reply_is_not_given_to_the_next_question():
    """A question that timed out keeps its place, so its late answer reaches nobody else."""
    manager = Manager()
    with pytest.raises(ControlError, match="did not answer 'get' within"):
        await manager.program_control(ask("slow"), timeout_s=0.01)
    task = asyncio.create_task(manager.program_control(ask("next")))
    await asyncio.sleep(0)
    manager._take_reply(answer("slow"))
    manager._take_reply(answer("next"))
    assert (await task).body["id"] == "next"


async def test_ticks_end_when_no_program_is_left():
    """Ticks run while the scheduler has programs, stop after, and start again with the next."""
    manager = Manager(ttl_s=0.1)
    assert manager._ticker is None
    manager.num_programs = 1
    await manager.program_control(ProgramControl(op=OPEN, now_s=0.0))
    await asyncio.sleep(0.6)
    assert not manager._ticker.done()
    manager.num_programs = 0
    await asyncio.wait_for(manager._ticker, 2)
    num_ticks = len(manager.sent)
    manager._note_activity()
    await asyncio.wait_for(manager._ticker, 2)
    assert len(manager.sent) > num_ticks


async def test_ticks_follow_the_present_ttl(monkeypatch):
    """A TTL that was changed while serving sets the time between ticks, from the next one on."""
    waits: list[float] = []

    async def wait_for(waiter: Any, delay_s: float) -> None:
        waiter.close()
        waits.append(delay_s)
        manager.num_programs = 2 - len(waits)
        raise TimeoutError

    manager = Manager(ttl_s=80.0)
    manager.present_ttl_s = 8.0
    monkeypatch.setattr(manager, "program_control", manager.tell)
    monkeypatch.setattr(
        tokenizer, "asyncio", SimpleNamespace(**{**vars(asyncio), "wait_for": wait_for})
    )
    await manager._tick_until_empty()
    assert waits == [10.0, 1.0]


async def test_changed_settings_bring_the_next_tick():
    """A TTL of an hour that is cut to seconds does not wait for an eighth of the hour."""
    manager = Manager(ttl_s=3600.0)
    manager._note_activity()
    asking = asyncio.create_task(
        manager.program_control(ProgramControl(op=CONFIGURE, config={"ttl": 1.0}, now_s=0.0))
    )
    await asyncio.sleep(0)
    manager._take_reply(ProgramReply(ok=True, body={}))
    await asking
    await asyncio.wait_for(manager._ticker, 2)
    assert [control.op for control in manager.sent] == [CONFIGURE, TICK]


@pytest.mark.parametrize("tokens", [[], [-1], [5, 100], [3, -7, 2], [2**40]])
def test_token_ids_that_end_the_engine_are_refused(tokens):
    """Stock SGLang indexes the embedding with them, and its scheduler process is gone."""
    with pytest.raises(
        ValueError, match=r"prompt has no tokens|is not a token; allowed are 0 to 99"
    ):
        tokenizer.check_prompt(array("q", tokens), 100)


@pytest.mark.parametrize("tokens", [None, [0], [99, 0, 50]])
def test_token_ids_of_the_vocabulary_pass(tokens):
    """And prompts that are given by other means than ids."""
    tokenizer.check_prompt(None if tokens is None else array("q", tokens), 100)


async def test_ticks_carry_a_clock_that_grows():
    """Each tick tells the scheduler a later time."""
    manager = Manager(ttl_s=0.1)
    manager._note_activity()
    await asyncio.wait_for(manager._ticker, 2)
    times = [control.now_s for control in manager.sent]
    assert times == sorted(set(times)) and times[0] > 0


def normalized(**fields: Any) -> GenerateReqInput:
    request = GenerateReqInput(**fields)
    request.normalize_batch_and_arguments()
    return request


def test_batch_shares_one_call():
    """Prompts of one batch and samples of one prompt are one call of one program."""
    request = normalized(text=["a", "b"], sampling_params={"n": 2})
    origin = tokenizer._origin_of(request)
    tags = {origin.tag(request, params).call_id for params in request.sampling_params}
    assert tags == {request.rid[0]}


def test_bad_id_anywhere_in_a_batch_is_found_at_once():
    """Every prompt's ids are checked before any prompt is sent."""
    params = [{"custom_params": {"program_id": "P"}}, {"custom_params": {"program_id": ""}}]
    with pytest.raises(IdentityError, match=r"custom_params\.program_id"):
        tokenizer._origin_of(normalized(text=["a", "b"], sampling_params=params))


def test_http_request_is_settled_or_rejected(monkeypatch):
    """The middleware hears of the first call's ids, or of the error."""
    good, bad = (http.RequestContext(HeaderIdentity(call_id="C")) for _ in range(2))
    params = {"custom_params": {"program_id": "P"}}
    monkeypatch.setattr(tokenizer, "current_request", lambda: good)
    tokenizer._origin_of(normalized(text="a", sampling_params=params))
    assert (good.tag.program_id, good.tag.call_id, good.error) == ("P", "C", None)
    params = {"custom_params": {"program_id": ""}}
    monkeypatch.setattr(tokenizer, "current_request", lambda: bad)
    with pytest.raises(IdentityError) as caught:
        tokenizer._origin_of(normalized(text="a", sampling_params=params))
    assert (bad.tag, bad.error) == (None, caught.value)


def test_summary_of_a_finished_call_reaches_meta_info_and_headers():
    """What the scheduler says of a call is a plain object in meta_info, not a list."""
    context = http.RequestContext(HeaderIdentity())
    state = SimpleNamespace(program_origin=tokenizer._Origin(context, "rid"))
    running: dict[str, Any] = {}
    finished: dict[str, Any] = {}
    info = {"program": [[], [{"level": 2}]]}
    manager = Manager.__new__(Manager)
    manager.update_request_meta_info(running, state, info, 0, None)
    manager.update_request_meta_info(finished, state, info, 1, {"type": "stop"})
    assert (running, finished) == ({}, {"program": {"level": 2}})
    assert context.outcomes == [{"level": 2}]
