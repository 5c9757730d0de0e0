"""Measures what an uncached prefill token costs, in decode steps of the same engine.

Three kinds of request, alone on the engine, each a few times: a long prompt with one new token, a
short prompt with one, and a short prompt with many. Differences between them cancel what every
request costs anyway (HTTP, tokenizer, sockets).
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.managers.io_struct import GenerateReqInput

SHORT_TOKENS: Final = 8
LONG_TOKENS: Final = 1024
DECODE_TOKENS: Final = 33
NUM_ROUNDS: Final = 3
BUDGET_S: Final = 4.0  # no further round is begun after this, once there is one


@dataclass(frozen=True, slots=True)
class Calibration:
    """Seconds per uncached prefill token and per decode step of one call alone."""

    prefill_token_s: float
    decode_step_s: float

    @property
    def prefill_weight(self) -> float:
        return self.prefill_token_s / self.decode_step_s

    @property
    def is_plausible(self) -> bool:
        """A prompt's token never costs more than a whole step, which reads all weights for one."""
        return 0 < self.prefill_token_s < self.decode_step_s


async def measure(manager: Any) -> Calibration | None:
    """The medians over rounds; None if the model's limits, noise or other traffic forbid it.

    `manager` is a `TokenizerManager`. A first round is never counted: it pays for what the engine
    does once, which on a GPU may be seconds of compiling.
    """
    if long_prompt_tokens(manager) < 4 * SHORT_TOKENS:
        return None
    rng = random.Random(0)
    if await _measure_once(manager, rng) is None:
        return None
    rounds: list[Calibration] = []
    started = time.perf_counter()
    while len(rounds) < NUM_ROUNDS and (not rounds or time.perf_counter() - started < BUDGET_S):
        one = await _measure_once(manager, rng)
        if one is None:
            return None
        rounds.append(one)
    found = Calibration(
        statistics.median(one.prefill_token_s for one in rounds),
        statistics.median(one.decode_step_s for one in rounds),
    )
    return found if found.is_plausible else None


async def _measure_once(manager: Any, rng: random.Random) -> Calibration | None:
    """One round, which noise may turn negative; None if others were about."""
    num_long = long_prompt_tokens(manager)
    long_s = await _time_alone(manager, rng, num_long, 1)
    short_s = await _time_alone(manager, rng, SHORT_TOKENS, 1)
    decode_s = await _time_alone(manager, rng, SHORT_TOKENS, DECODE_TOKENS)
    if long_s is None or short_s is None or decode_s is None:
        return None
    return Calibration(
        (long_s - short_s) / (num_long - SHORT_TOKENS), (decode_s - short_s) / (DECODE_TOKENS - 1)
    )


def long_prompt_tokens(manager: Any) -> int:
    """The long prompt's length: one chunk of prefill at most, within the context."""
    chunk = resolving_view(manager.server_args).chunked_prefill_size
    limits = [LONG_TOKENS, manager.context_len // 2, (manager.max_req_input_len or 0) // 2]
    if chunk is not None and chunk > 0:
        limits.append(chunk)
    return int(min(limits))


async def _time_alone(
    manager: Any, rng: random.Random, num_prompt: int, num_new: int
) -> float | None:
    """Seconds for one request of random tokens; None if others were about."""
    if manager.rid_to_state or manager.gracefully_exit:
        return None
    vocabulary = range(manager.model_config.vocab_size)
    request = GenerateReqInput(
        input_ids=rng.choices(vocabulary, k=num_prompt),
        sampling_params={"max_new_tokens": num_new, "temperature": 0.0, "ignore_eos": True},
        log_metrics=False,
    )
    started = time.perf_counter()
    async for _ in manager.generate_request(request):
        pass
    seconds = time.perf_counter() - started
    return None if manager.rid_to_state else seconds
