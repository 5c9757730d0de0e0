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
_CURSOR_ITEM: Final = re.compile(r"(.+?):([0-9]{1,18})(?:,|$)")  # a worker's id, its position
_CURSOR: Final = re.compile(rf"(?:{_CURSOR_ITEM.pattern})+(?<!,)")


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
    if not _CURSOR.fullmatch(cursor):
        raise ValueError(f"'after' must be the 'next' of the page before, not {cursor[:64]!r}")
    return {worker: int(position) for worker, position in _CURSOR_ITEM.findall(cursor)}


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


EVERYWHERE: Final[Mapping[tuple[str, str], Merge]] = {
    ("GET", "/v1/programs"): merge_programs,
    ("GET", "/metrics"): merge_metrics,
    ("GET", "/program_stats"): merge_by_worker,
    ("PATCH", "/program_config"): worst,
    ("GET", "/flush_cache"): worst,
    ("POST", "/flush_cache"): worst,
}
