"""Lets the program table say who is retracted when the KV pool is full.

SGLang offers `--retraction-policy length|priority` and no hook, so the static method that sorts
the candidates is replaced. See the ledger in README.md.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch

from autellix_sglang.core.planner import standing
from autellix_sglang.engine.tracking import call_of

_stock = ScheduleBatch._get_decode_retraction_order


def install() -> None:
    """Replace the order in this process; repeated calls do nothing more."""
    ScheduleBatch._get_decode_retraction_order = staticmethod(_retraction_order)


def _retraction_order(reqs: list[Any]) -> list[int]:
    """Indices from most to least worth keeping, as SGLang expects; it pops from the end."""
    calls = [call_of(req) for req in reqs]
    if any(call is None for call in calls):
        order: list[int] = _stock(reqs)
        return order
    keys = [standing(call) for call in calls if call is not None]
    return sorted(range(len(reqs)), key=lambda i: keys[i])
