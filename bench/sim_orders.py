"""Baselines that order the waiting queue anew in each pass, as other schedulers do it.

- `lpm`: SGLang's longest prefix match. `hrrn`: SGLang's highest response ratio next, the prefill
  tokens that the engine has worked on since the call came, over those that the call needs. Both are
  first come, first served above `MAX_MATCHED` waiting calls, as in SGLang 0.5.23, whose in-batch
  prefix caching (one of several calls with the same new prefix goes first) is left out.
- `las`: the `program-aware-fairness` plugin of llm-d's router (least attained service): per program
  prompt tokens plus twice the output tokens of its ended calls, halved every minute, weighed 0.8
  to 0.2 against how long its first waiting call has waited. The plugin sits in front of engines
  and releases calls one by one; here it orders the engine's own queue.

None of them preempts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp2
from typing import TYPE_CHECKING, Any, Final

from autellix_sglang.core.program import Call

if TYPE_CHECKING:
    from bench.sim_engine import Request, SimEngine

MAX_MATCHED: Final = 128
HALF_LIFE_S: Final = 60.0
SERVICE_SHARE: Final = 0.8

Order = Callable[["SimEngine", Sequence[Call]], Sequence[Call]]


def served_tokens(request: Request) -> float:
    """What `las` charges for a call that has ended."""
    return request.num_prompt + 2.0 * request.num_output


def decayed(tokens: float, seconds: float) -> float:
    return tokens * exp2(-seconds / HALF_LIFE_S)


def longest_prefix_match(engine: SimEngine, calls: Sequence[Call]) -> Sequence[Call]:
    if len(calls) > MAX_MATCHED:
        return calls
    return sorted(calls, key=lambda call: -engine.cache.match(call.handle.leaf).end)


def highest_response_ratio_next(engine: SimEngine, calls: Sequence[Call]) -> Sequence[Call]:
    if len(calls) > MAX_MATCHED:
        return calls

    def ratio(call: Call) -> float:
        request: Request = call.handle
        num_uncached = request.num_tokens - engine.cache.match(request.leaf).end
        return (engine.num_prefilled - request.num_prefilled_before) / max(1, num_uncached)

    return sorted(calls, key=ratio, reverse=True)


def least_attained_service(engine: SimEngine, calls: Sequence[Call]) -> Sequence[Call]:
    first_by_program = {call.program: call for call in reversed(calls)}
    service, wait = {}, {}
    for program, first in first_by_program.items():
        request: Request = first.handle
        served, at_s = request.program.served
        service[program] = decayed(served, engine.now_s - at_s)
        wait[program] = engine.now_s - request.waiting_from_s
    normal_service, normal_wait = _normal(service), _normal(wait)
    score = {
        program: SERVICE_SHARE * (1 - normal_service[program])
        + (1 - SERVICE_SHARE) * normal_wait[program]
        for program in first_by_program
    }
    return sorted(calls, key=lambda call: -score[call.program])


def _normal(values: dict[Any, float]) -> dict[Any, float]:
    """Values from 0 to 1; equal ones are 0.5."""
    low, high = min(values.values()), max(values.values())
    return {
        key: (value - low) / (high - low) if high > low else 0.5 for key, value in values.items()
    }


ORDERS: Final[dict[str, Order]] = {
    "lpm": longest_prefix_match,
    "hrrn": highest_response_ratio_next,
    "las": least_attained_service,
}
