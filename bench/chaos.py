"""Does anything break when everything happens at once?

    python -m bench.chaos --minutes 5

Clients send greedy calls to one program server, and let some run to their end, abort some, and
walk away from others in mid-stream, while an operator keeps changing the quantum and what becomes
of preempted calls' KV. Batch, quanta, KV pool and host pool are so small that calls are preempted,
retracted and refused by a full host pool all the time. Every token that arrives is compared with
the answer to the same prompt on the idle server; at the end nothing may be left in it.

All choices come from `--seed`; how they fall together does not, for the engine is real. With
`--no-model` it is not: then the same kinds of events happen to the swap manager on SGLang's own
cache (`bench.swap_rig`), so many minutes of steps of 25 ms, and a seed says it all. With `--device
cuda` that cache and the host pool are those of a GPU, and the kernel moves the rows.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import aiohttp

from autellix_sglang.core.kv import KV_CHOICES
from bench.common import new_parser, print_result, provenance, say
from bench.identity import OVERCOMMIT, SETTINGS
from bench.server import (
    COUNTED,
    LEAKS,
    Server,
    configure,
    free_port,
    launch_command,
    leaks,
    wait_empty,
)

NUM_PROMPTS = 24
NUM_CLIENTS = 12
NUM_PROGRAMS = 40
CALL_TIMEOUT_S = 120.0  # a call takes a few seconds: whatever takes so long is stuck
OPERATOR_INTERVAL_S = 1.5
QUANTA = (4.0, 256.0)  # calls are preempted all the time, or fill the KV pool and are retracted
REPORT_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and how many tokens to generate."""

    input_ids: tuple[int, ...]
    num_output: int


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    started = time.perf_counter()
    if options.no_model:
        result = _without_model(options.seed, options.minutes, options.device)
        print_result({**result, **provenance(started)})
        return 0
    with _server(options) as server:
        found = asyncio.run(_Chaos(server, options.seed, options.minutes * 60).run())
        state = wait_empty(server)
    result = {
        "minutes": options.minutes,
        **{key: found[key] for key in ("completed", "aborted", "disconnected")},
        **{key: found[key] for key in ("changed", "stuck", "failed")},
        **{key: state[key] for key in COUNTED},
        **leaks(state),
    }
    print_result({**result, **provenance(started)})
    is_clean = not any(result[key] for key in ("changed", "stuck", "failed", *LEAKS))
    return 0 if is_clean else 1


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("bench.chaos", __doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--no-model", action="store_true", help="no engine: see above")
    parser.add_argument("--device", default="cpu", help="of the KV pool, with --no-model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-tokens", type=int, default=480, help="KV pool of the engine")
    parser.add_argument("--host-memory", type=float, default=0.004, help="GiB of host pool")
    parser.add_argument(
        "--server-args", type=shlex.split, default=[], help="more SGLang flags, in one string"
    )
    return parser


def _without_model(seed: int, minutes: float, device: str) -> dict[str, Any]:
    """Counts of what happened; raises `AssertionError` for anything that must not."""
    from bench.swap_rig import STEP_S, Chaos, sglang_settings

    num_steps = round(minutes * 60 / STEP_S)
    with sglang_settings():
        found = Chaos(seed, device=device).run(num_steps)
    return {"minutes": minutes, "steps": num_steps, **found}


def _server(options: Any) -> Server:
    port = free_port()
    directory = Path(mkdtemp(prefix="autellix-chaos-"))
    flags = [
        "--dtype", "float32", "--max-running-requests", "4", "--program-kv", "mixed",
        "--max-total-tokens", str(options.kv_tokens), "--program-prefill-weight", "0.02",
        "--program-host-memory", str(options.host_memory), "--program-kv-break-even", "16",
        *options.server_args,
    ]  # fmt: skip
    say(f"starting a server; log in {directory}")
    return Server("chaos", launch_command("plas", port, flags), port, directory, OVERCOMMIT)


def prompts(seed: int) -> list[Prompt]:
    """Prompts of random tokens; every third continues one of four common beginnings."""
    rng = random.Random(f"prompts/{seed}")
    beginnings = [[rng.randrange(100) for _ in range(120)] for _ in range(4)]
    made = []
    for i in range(NUM_PROMPTS):
        start = beginnings[i % 4] if i % 3 == 0 else []
        tokens = [*start, *(rng.randrange(100) for _ in range(rng.randint(8, 200)))]
        made.append(Prompt(tuple(tokens), rng.randint(8, 80)))
    return made


class _Chaos:
    """The clients and the operator, for so many seconds."""

    def __init__(self, server: Server, seed: int, seconds: float) -> None:
        self._server = server
        self._seed = seed
        self._seconds = seconds
        self._prompts = prompts(seed)
        self._answers: list[list[int]] = []
        self._ids = itertools.count()
        self._found: Counter[str] = Counter()

    async def run(self) -> Counter[str]:
        """Wreak havoc, then let every call end; the counts of how calls ended."""
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            for prompt in self._prompts:
                answer = [ids async for ids in self._stream(session, prompt, "alone", "alone")]
                self._answers.append(answer[-1])
            configure(self._server.base_url, **SETTINGS)
            until = time.monotonic() + self._seconds
            async with asyncio.TaskGroup() as group:
                for i in range(NUM_CLIENTS):
                    group.create_task(
                        self._client(session, random.Random(f"{self._seed}/{i}"), until)
                    )
                group.create_task(self._operator(random.Random(f"{self._seed}/operator"), until))
            for program_id in ("alone", *(f"program-{i}" for i in range(NUM_PROGRAMS))):
                url = f"{self._server.base_url}/v1/programs/{program_id}"
                async with session.delete(url) as response:
                    await response.read()
        return self._found

    async def _operator(self, rng: random.Random, until: float) -> None:
        """Change the KV mode now and then, and say how it goes."""
        said = time.monotonic()
        while time.monotonic() < until:
            await asyncio.sleep(OPERATOR_INTERVAL_S * rng.random())
            settings = {"kv": rng.choice(KV_CHOICES), "quantum": rng.choice(QUANTA)}
            await asyncio.to_thread(configure, self._server.base_url, **settings)
            if time.monotonic() - said > REPORT_INTERVAL_S:
                said = time.monotonic()
                say(f"  {until - said:.0f} s to go: {dict(self._found)}")

    async def _client(
        self, session: aiohttp.ClientSession, rng: random.Random, until: float
    ) -> None:
        while time.monotonic() < until:
            index = rng.randrange(len(self._prompts))
            end = rng.choices(("completed", "aborted", "disconnected"), (70, 15, 15))[0]
            try:
                end = await self._call(session, rng, index, end)
            except TimeoutError:
                end = "stuck"
            except aiohttp.ClientError as error:
                say(f"  {type(error).__name__}: {error}")
                end = "failed"
            self._found[end] += 1

    async def _call(
        self, session: aiohttp.ClientSession, rng: random.Random, index: int, end: str
    ) -> str:
        """One call, ended in one of three ways; returns how it really ended."""
        prompt, answer = self._prompts[index], self._answers[index]
        rid = f"chaos-{next(self._ids)}-end"  # SGLang aborts by prefix
        num_wanted = prompt.num_output if end == "completed" else rng.randrange(prompt.num_output)
        output: list[int] = []
        stream = self._stream(session, prompt, f"program-{rng.randrange(NUM_PROGRAMS)}", rid)
        async for output in stream:
            if output != answer[: len(output)]:
                say(f"  prompt {index}: {output} instead of {answer}")
                return "changed"
            if len(output) >= num_wanted and end == "disconnected":
                break
            if len(output) >= num_wanted and end == "aborted":
                await self._abort(session, rid)
                num_wanted = prompt.num_output + 1
        await stream.aclose()
        if end == "completed" and len(output) != prompt.num_output:
            return "changed"
        return end

    async def _abort(self, session: aiohttp.ClientSession, rid: str) -> None:
        url = f"{self._server.base_url}/abort_request"
        async with session.post(url, json={"rid": rid}) as response:
            await response.read()

    async def _stream(
        self, session: aiohttp.ClientSession, prompt: Prompt, program_id: str, rid: str
    ) -> AsyncGenerator[list[int]]:
        """The output so far, again and again; leaving it early closes the connection."""
        body = {
            "rid": f"{rid}-{next(self._ids)}" if rid == "alone" else rid,
            "input_ids": prompt.input_ids,
            "sampling_params": {
                "temperature": 0, "max_new_tokens": prompt.num_output, "ignore_eos": True,
            },
            "stream": True,
        }  # fmt: skip
        url = f"{self._server.base_url}/generate"
        headers = {"x-program-id": program_id}
        async with session.post(url, json=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.content:
                payload = line.removeprefix(b"data:").strip()
                if payload and payload != b"[DONE]":
                    with suppress(KeyError):  # an abort's last event may have no tokens
                        yield json.loads(payload)["output_ids"]


if __name__ == "__main__":
    sys.exit(main())
