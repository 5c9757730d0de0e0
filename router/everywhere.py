"""Requests that concern every worker, and how their answers become one.

Pure functions from what workers answered to what the client gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

from autellix_sglang.router.messages import Headers
from autellix_sglang.router.metrics import CONTENT_TYPE, worker_label

JSON: Final[Headers] = [(b"content-type", b"application/json")]
_CURSOR_ITEM: Final = re.compile(r"(.+?):([0-9]{1,18})(?:,(?=.)|\Z)")  # a worker, its position


@dataclass(frozen=True, slots=True)
class Reply:
    """What one worker answered, or the router for all of them (worker "")."""

    worker: str
    status: int
    headers: Headers
    body: bytes


Merge = Callable[[Sequence[Reply]], Reply]


def best(replies: Sequence[Reply]) -> Reply:
    """The first success, else the first failure: one worker knows, the others say 404."""
    return min(replies, key=lambda reply: reply.status)


def worst(replies: Sequence[Reply]) -> Reply:
    """The worst of all: only when it is a success have all workers done it."""
    return max(replies, key=lambda reply: reply.status)


def merge_programs(replies: Sequence[Reply]) -> Reply:
    """The programs of a page of each worker in one; each says which worker has it."""
    failed = worst(replies)
    if failed.status != 200:
        return failed
    pages = {reply.worker: json.loads(reply.body) for reply in replies}
    programs = [
        {**program, "worker": worker}
        for worker, page in pages.items()
        for program in page["programs"]
    ]
    rest = {worker: page["next"] for worker, page in pages.items() if page["next"] is not None}
    return _json({"programs": programs, "next": _cursor(rest) if rest else None})


def next_pages(query: bytes) -> dict[str, bytes] | None:
    """By worker, the query for its next page; None where `query` asks for the first ones.

    Raises `ValueError` if its `after` is not the `next` of a merged page.
    """
    fields = dict(parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    if (after := fields.pop("after", None)) is None:
        return None
    return {
        worker: urlencode({**fields, "after": position}).encode()
        for worker, position in _positions(after).items()
    }


def _cursor(rest: Mapping[str, int]) -> str:
    """Where each worker goes on."""
    return ",".join(f"{worker}:{position}" for worker, position in rest.items())


def _positions(cursor: str) -> dict[str, int]:
    """Item by item: one pattern for all of them would try every way to divide them."""
    found: dict[str, int] = {}
    end = 0
    while not found or end < len(cursor):
        item = _CURSOR_ITEM.match(cursor, end)
        if item is None:
            raise ValueError(f"'after' must be the 'next' of the page before, not {cursor[:64]!r}")
        found[item[1]] = int(item[2])
        end = item.end()
    return found


def merge_by_worker(replies: Sequence[Reply]) -> Reply:
    """Each worker's JSON under its name."""
    failed = worst(replies)
    if failed.status != 200:
        return failed
    return _json({"workers": {reply.worker: json.loads(reply.body) for reply in replies}})


def merge_metrics(replies: Sequence[Reply]) -> Reply:
    """Prometheus text with a label `worker` on every sample, each family in one piece."""
    failed = worst(replies)
    if failed.status != 200:
        return failed
    families: dict[str, tuple[list[str], list[str]]] = {}
    for reply in replies:
        _sort_samples(reply, families)
    lines = [line for head, samples in families.values() for line in (*head, *samples)]
    body = "\n".join([*lines, ""]).encode()
    return Reply("", 200, [(b"content-type", CONTENT_TYPE)], body)


def _sort_samples(reply: Reply, families: dict[str, tuple[list[str], list[str]]]) -> None:
    """Add one worker's lines to the families they belong to; (comments, samples) by name."""
    family: tuple[list[str], list[str]] = ([], [])
    name = ""
    for line in reply.body.decode().splitlines():
        if line.startswith("#"):
            words = line.split(maxsplit=3)
            if len(words) > 2 and words[2] != name:
                name = words[2]
                family = families.setdefault(name, ([], []))
            if line not in family[0]:
                family[0].append(line)
        elif line.strip():
            if not name:
                family = families.setdefault("", ([], []))
            family[1].append(_label(line, reply.worker))


def _label(sample: str, worker: str) -> str:
    label = worker_label(worker)
    metric, brace, rest = sample.partition("{")
    if brace and " " not in metric:
        return (
            f"{metric}{{{label},{rest}" if not rest.startswith("}") else f"{metric}{{{label}{rest}"
        )
    name, _, value = sample.partition(" ")
    return f"{name}{{{label}}} {value}"


def _json(value: Mapping[str, Any]) -> Reply:
    return Reply("", 200, JSON, json.dumps(value).encode())


_MERGES: Final[Mapping[tuple[str, str], Merge]] = {
    ("GET", "/v1/programs"): merge_programs,
    ("GET", "/metrics"): merge_metrics,
    ("GET", "/program_stats"): merge_by_worker,
    ("PATCH", "/program_config"): worst,
}
# What an operator or a trainer asks of the engine, by any method.
_COMMANDS: Final = frozenset(
    {
        "/abort_request", "/configure_logging", "/continue_generation", "/flush_cache",
        "/freeze_gc", "/load_lora_adapter", "/pause_generation", "/release_memory_occupation",
        "/resume_memory_occupation", "/set_trace_level", "/slow_down", "/start_profile",
        "/stop_profile", "/unload_lora_adapter", "/update_weight_version",
        "/update_weights_from_disk",
    }
)  # fmt: skip
_STORED: Final = "/v1/responses/"  # an answer that one worker keeps, by its id
# What holds for one replica only: its sessions, and weights that come by its own connections.
PRIVATE: Final = frozenset(
    {
        "/begin_weight_update", "/close_session", "/destroy_weights_update_group",
        "/end_weight_update", "/init_weights_send_group_for_remote_instance",
        "/init_weights_update_group", "/load_lora_adapter_from_tensors", "/open_session",
        "/send_weights_to_remote_instance", "/update_weights_from_distributed",
        "/update_weights_from_ipc", "/update_weights_from_tensor",
    }
)  # fmt: skip


def merge_for(method: str, path: str) -> Merge | None:
    """How the answers of all workers become one; None for what one of them answers."""
    if path.startswith(_STORED):
        return best
    return worst if path in _COMMANDS else _MERGES.get((method, path))
