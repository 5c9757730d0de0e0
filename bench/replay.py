"""Open-loop replay of programs against SGLang's `/generate`.

A program starts at its arrival time whatever the server does. A call is issued when all calls it
waits for have completed and its gap has passed; there is no limit on calls in flight. Every call
posts token ids with greedy sampling and a fixed output length, so a run's work is the same under
every policy and outputs can be compared by hash.

Identity goes in headers (`x-program-id`, `x-thread-id`, `x-call-id`, `x-parent-call-ids`, and
`x-program-end: 1` on a call known to be the last); stock SGLang ignores them. A program whose last
calls run side by side is ended by `DELETE /v1/programs/{id}`; stock SGLang's 404 is fine.

Connections are not reused: uvicorn closes idle ones after 5 s, and a replay has longer gaps.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from bench.prompts import ProgramPrompts, Vocabulary
from bench.stats import CallRecord, Outcome, ProgramRecord, Run, ServerProgramInfo
from bench.trace import TraceCall, TraceProgram

Observer = Callable[[CallRecord], None]


def _ignore(_: CallRecord) -> None:
    """The observer of those who do not watch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """How to replay. `gap_scale` multiplies recorded gaps (0: no gaps; null gaps are 0).

    `max_programs` holds back programs while that many are under way (a closed loop, to measure
    capacity); `deadline_s` ends the run early, recording what is open as errors. `run_id` keeps
    the program ids of several runs on one server apart.
    """

    base_url: str
    run_id: str = "run"
    identify: bool = True
    stream: bool = False
    gap_scale: float = 1.0
    seed: int = 0
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    timeout_s: float = 3600.0
    max_programs: int | None = None
    deadline_s: float | None = None


# --- arrivals -----------------------------------------------------------------------------------


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process with `rate` programs per second; the first is at 0."""
    rng = random.Random(f"arrivals/{seed}")
    gaps = [0.0, *(rng.expovariate(rate) for _ in range(count - 1))]
    return list(itertools.accumulate(gaps[:count]))


def recorded_arrivals(
    programs: Sequence[TraceProgram], *, time_scale: float = 1.0, rate: float | None = None
) -> list[float]:
    """The programs' own arrival times, from 0, times `time_scale`.

    With `rate` the times are stretched to that mean rate instead, keeping their bursts. Raises
    `ValueError` where a program has no recorded arrival.
    """
    times = []
    for program in programs:
        if program.arrival_s is None:
            raise ValueError(f"program {program.id} has no recorded arrival: use Poisson arrivals")
        times.append(program.arrival_s)
    first, last = min(times), max(times)
    if rate is not None and last > first:
        time_scale = (len(times) - 1) / rate / (last - first)
    return [(t - first) * time_scale for t in times]


# --- one HTTP call ------------------------------------------------------------------------------


class CallFailed(Exception):
    """The server, or the way to it, gave a call an end that is not its full answer."""


@dataclass(frozen=True, slots=True)
class _Answer:
    output_ids: list[int]
    meta: Mapping[str, Any]
    first_token_s: float | None


class GenerateClient:
    """The two requests a replay makes of a server; owns nothing but a reference to the session."""

    def __init__(
        self, session: aiohttp.ClientSession, options: ReplayOptions, now: Callable[[], float]
    ) -> None:
        self._session = session
        self._options = options
        self._now = now

    async def generate(
        self, input_ids: list[int], output_tokens: int, headers: Mapping[str, str]
    ) -> _Answer:
        """Greedily generate exactly `output_tokens` tokens; raises `CallFailed` otherwise."""
        body = {
            "input_ids": input_ids,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": output_tokens,
                "ignore_eos": True,
            },
            "stream": self._options.stream,
        }
        url = f"{self._options.base_url}/generate"
        try:
            async with self._session.post(url, json=body, headers=headers) as response:
                if response.status != 200:
                    raise CallFailed(f"HTTP {response.status}: {(await response.text())[:200]}")
                answer = await self._read(response)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise CallFailed(f"{type(error).__name__}: {error}"[:200]) from error
        _check_answer(answer, output_tokens)
        return answer

    async def _read(self, response: aiohttp.ClientResponse) -> _Answer:
        if self._options.stream:
            return await self._read_stream(response)
        reply = await response.json()
        return _Answer(_output_ids(reply), _meta(reply), None)

    async def _read_stream(self, response: aiohttp.ClientResponse) -> _Answer:
        first_token_s: float | None = None
        pieces: list[list[int]] = []
        meta: Mapping[str, Any] = {}
        async for chunk in _events(response):
            if "error" in chunk:
                raise CallFailed(f"error event: {str(chunk['error'])[:200]}")
            first_token_s = self._now() if first_token_s is None else first_token_s
            pieces.append(_output_ids(chunk))
            meta = _meta(chunk)
        return _Answer(_join_pieces(pieces, meta), meta, first_token_s)

    async def end_program(self, program_id: str) -> None:
        """Tell the server that a program is over; a server that does not know it is fine."""
        url = f"{self._options.base_url}/v1/programs/{program_id}"
        try:
            async with self._session.delete(url) as response:
                await response.read()
        except (aiohttp.ClientError, TimeoutError):
            # Ending is a courtesy (the server's TTL does the same); calls record real failures.
            return


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, until `[DONE]`."""
    buffer = b""
    async for data in response.content.iter_any():
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            payload = line.removeprefix(b"data:").strip()
            if payload == b"[DONE]":
                return
            if line.startswith(b"data:"):
                yield json.loads(payload)
    raise CallFailed("stream ended without [DONE]")


def _output_ids(reply: object) -> list[int]:
    ids = reply.get("output_ids") if isinstance(reply, dict) else None
    if not isinstance(ids, list):
        raise CallFailed(f"no output_ids in the answer: {str(reply)[:200]}")
    return ids


def _meta(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = reply.get("meta_info")
    return meta if isinstance(meta, dict) else {}


def _join_pieces(pieces: list[list[int]], meta: Mapping[str, Any]) -> list[int]:
    # SGLang streams either everything so far in each chunk (the default) or only what is new.
    last = pieces[-1] if pieces else []
    if len(last) == meta.get("completion_tokens"):
        return last
    return [token for piece in pieces for token in piece]


def _check_answer(answer: _Answer, output_tokens: int) -> None:
    reason = answer.meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise CallFailed(f"aborted by the server: {str(reason.get('message'))[:200]}")
    if len(answer.output_ids) != output_tokens:
        raise CallFailed(f"got {len(answer.output_ids)} of {output_tokens} tokens ({reason})")


# --- one program --------------------------------------------------------------------------------


class _ProgramReplay:
    """Walks one program's DAG: issues each call when what it waits for is done."""

    def __init__(
        self,
        program: TraceProgram,
        program_id: str,
        prompts: ProgramPrompts,
        client: GenerateClient,
        options: ReplayOptions,
        now: Callable[[], float],
        observe: Observer,
    ) -> None:
        self._program = program
        self._id = program_id
        self._prompts = prompts
        self._client = client
        self._options = options
        self._now = now
        self._observe = observe
        self._waits = {call.id: program.waits_for(call) for call in program.calls}
        self._records: dict[str, CallRecord] = {}
        self._has_ended = False
        self._position = {call.id: str(i) for i, call in enumerate(program.calls)}
        self.start_s: float | None = None

    async def run(self) -> None:
        """Issue every call that can be issued, then end the program on the server."""
        self.start_s = self._now()
        try:
            async with asyncio.TaskGroup() as group:
                tasks: dict[str, asyncio.Task[None]] = {}
                for call in self._program.calls:
                    before = [tasks[other] for other in self._waits[call.id]]
                    tasks[call.id] = group.create_task(self._run_call(call, before))
        finally:
            if self._options.identify and not self._has_ended:
                await self._client.end_program(self._id)

    def records(self) -> tuple[CallRecord, ...]:
        """One record per call of the program, in its order, whatever happened."""
        missing = "the run ended before the call could be issued"
        return tuple(
            self._records.get(call.id) or CallRecord(call.id, Outcome.NOT_ISSUED, missing)
            for call in self._program.calls
        )

    async def _run_call(self, call: TraceCall, before: list[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        failed = [c for c in self._waits[call.id] if not self._records[c].is_ok]
        if failed:
            reason = "a call it waits for failed"
            self._note(CallRecord(call.id, Outcome.NOT_ISSUED, reason))
            return
        await asyncio.sleep(self._gap_s(call))
        await self._issue(call)

    def _gap_s(self, call: TraceCall) -> float:
        # A root has no parents to measure from: its recorded offset is from the arrival.
        gap = call.gap_s if call.gap_s is not None or call.parents else call.issue_s
        return max(0.0, gap or 0.0) * self._options.gap_scale

    async def _issue(self, call: TraceCall) -> None:
        input_ids = self._prompts.prompt(call)
        wanted = max(1, call.output_tokens)
        headers = self._headers(call) if self._options.identify else {}
        issue_s = self._now()
        try:
            answer = await self._client.generate(input_ids, wanted, headers)
        except CallFailed as error:
            self._note(_failed(call, str(error), issue_s, self._now()))
        except asyncio.CancelledError:
            self._note(_failed(call, "cancelled at the deadline", issue_s, self._now()))
            raise
        else:
            self._has_ended = "x-program-end" in headers
            self._prompts.complete(call, answer.output_ids)
            self._note(_completed(call, answer, issue_s, self._now()))

    def _headers(self, call: TraceCall) -> dict[str, str]:
        headers = {
            "x-program-id": self._id,
            "x-thread-id": _safe(call.thread),
            "x-call-id": self._call_id(call.id),
            # Empty for a root, which says that it has none.
            "x-parent-call-ids": ",".join(map(self._call_id, self._waits[call.id])),
        }
        if len(self._records) == len(self._program.calls) - 1:
            headers["x-program-end"] = "1"
        return headers

    def _call_id(self, call_id: str) -> str:
        return f"{self._id}.{self._position[call_id]}"

    def _note(self, record: CallRecord) -> None:
        self._records[record.call_id] = record
        self._observe(record)


def _safe(text: str) -> str:
    """An id with only characters that are safe in headers and in URLs.

    It is short because a call may name a hundred parents in one header.
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:40] or "-"


def _failed(call: TraceCall, reason: str, issue_s: float, finish_s: float) -> CallRecord:
    return CallRecord(call.id, Outcome.ERROR, reason, issue_s=issue_s, finish_s=finish_s)


def _completed(call: TraceCall, answer: _Answer, issue_s: float, finish_s: float) -> CallRecord:
    meta = answer.meta
    return CallRecord(
        call_id=call.id,
        outcome=Outcome.OK,
        issue_s=issue_s,
        first_token_s=answer.first_token_s,
        finish_s=finish_s,
        num_output=len(answer.output_ids),
        prompt_tokens=int(meta.get("prompt_tokens") or 0),
        cached_tokens=int(meta.get("cached_tokens") or 0),
        e2e_s=_seconds(meta.get("e2e_latency")),
        # Only with --enable-metrics does SGLang say how long a call was queued (all times it was).
        queue_s=_seconds(meta.get("queue_time")),
        retractions=_whole(meta.get("num_retractions")),
        server=_server_info(meta.get("program")),
        output_hash=_hash_ids(answer.output_ids),
    )


def _server_info(value: object) -> ServerProgramInfo | None:
    if not isinstance(value, dict):
        return None
    return ServerProgramInfo(
        queue_steps=_seconds(value.get("queue_steps")),
        service_steps=_seconds(value.get("service_steps")),
        level=_whole(value.get("level")),
        preemptions=_whole(value.get("preemptions")),
        promotions=_whole(value.get("promotions")),
    )


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _hash_ids(output_ids: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(output_ids)).encode()).hexdigest()


# --- one run ------------------------------------------------------------------------------------


async def replay(
    policy: str,
    programs: Sequence[TraceProgram],
    arrivals: Sequence[float],
    options: ReplayOptions,
    observe: Observer = _ignore,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Replay the programs, program i arriving `arrivals[i]` seconds from now; record every call.

    `policy` only labels the result. `observe` is called once for each call as it ends.
    """
    if len(programs) != len(arrivals):
        raise ValueError(f"{len(programs)} programs but {len(arrivals)} arrivals")
    start = clock()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=options.timeout_s)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        run = _Replay(programs, arrivals, options, session, observe, lambda: clock() - start)
        records = await run.run()
    return Run(policy, records, output_hash(records))


class _Replay:
    """All programs of one run, over one session."""

    def __init__(
        self,
        programs: Sequence[TraceProgram],
        arrivals: Sequence[float],
        options: ReplayOptions,
        session: aiohttp.ClientSession,
        observe: Observer,
        now: Callable[[], float],
    ) -> None:
        self._programs = programs
        self._arrivals = arrivals
        self._options = options
        self._now = now
        self._client = GenerateClient(session, options, now)
        self._observe = observe
        self._slots = asyncio.Semaphore(options.max_programs or len(programs) or 1)

    async def run(self) -> tuple[ProgramRecord, ...]:
        walks = [self._walk(i) for i in range(len(self._programs))]
        tasks = [asyncio.ensure_future(self._start(i, walk)) for i, walk in enumerate(walks)]
        await _finish(tasks, self._options.deadline_s)
        return tuple(self._record(i, walk) for i, walk in enumerate(walks))

    async def _start(self, index: int, walk: _ProgramReplay) -> None:
        await asyncio.sleep(self._arrivals[index] - self._now())
        async with self._slots:
            await walk.run()

    def _walk(self, index: int) -> _ProgramReplay:
        program, options = self._programs[index], self._options
        program_id = f"{_safe(options.run_id)}-{index}-{_safe(program.id)}"
        prompts = ProgramPrompts(
            program, instance=str(index), seed=options.seed, vocabulary=options.vocabulary
        )
        return _ProgramReplay(
            program, program_id, prompts, self._client, options, self._now, self._observe
        )

    def _record(self, index: int, walk: _ProgramReplay) -> ProgramRecord:
        program, arrival_s = self._programs[index], self._arrivals[index]
        start_s = arrival_s if walk.start_s is None else walk.start_s
        return ProgramRecord(program.id, program.kind, arrival_s, start_s, walk.records())


async def _finish(tasks: Sequence[asyncio.Future[None]], deadline_s: float | None) -> None:
    """Wait for all tasks, cancel what is left at the deadline, and raise what was our own bug."""
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=deadline_s)
    for task in late:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


def output_hash(programs: Sequence[ProgramRecord]) -> str:
    """A hash over the output ids of all calls, in (program, call) order."""
    digest = hashlib.sha256()
    for program in programs:
        for call in program.calls:
            digest.update(f"{call.call_id}={call.output_hash};".encode())
    return digest.hexdigest()
