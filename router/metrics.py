"""What `GET /workers` shows, as Prometheus text for `GET /router_metrics`.

A route of the router's own: `/metrics` is the replicas', and cannot be answered without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

PREFIX: Final = "autellix_router:"
CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"
# Key of the overview: (kind, help). A counter's name ends in _total.
OF_ROUTER: Final = {
    "open_calls": ("gauge", "Calls that the router holds."),
    "buffered_bytes": ("gauge", "Bytes of request bodies that it holds."),
    "programs": ("gauge", "Programs whose home it knows."),
    "retries": ("counter", "Calls that were sent to another worker."),
    "spills": ("counter", "Calls that ran elsewhere than at their program's home."),
}
OF_WORKER: Final = {
    "live_calls": ("gauge", "Calls that wait or run there."),
    "slots": ("gauge", "Calls that run there at once."),
    "delay_s": ("gauge", "Queueing delay that placement reckons with, in seconds."),
    "open_streams": ("gauge", "Answers that are under way from there."),
    "programs": ("gauge", "Programs whose home it is."),
    "kv_tokens": ("gauge", "Tokens that its KV pool holds."),
    "kv_used_tokens": ("gauge", "Of them, in use."),
    "silent_s": ("gauge", "Seconds since it was last heard."),
    "ended_calls": ("counter", "Calls that it has answered."),
}


def exposition(overview: Mapping[str, Any]) -> bytes:
    """The text of one scrape, from what `RouterApp` tells about itself and its workers."""
    workers = overview["workers"]
    lines: list[str] = []
    for key, (kind, text) in OF_ROUTER.items():
        lines += _family(key, kind, text, {"": overview[key]})
    for key, (kind, text) in OF_WORKER.items():
        samples = {_labels(worker): worker[key] for worker in workers}
        lines += _family(f"worker_{key}", kind, text, samples)
    ready = {_labels(worker): int(worker["state"] == "ready") for worker in workers}
    lines += _family("worker_ready", "gauge", "1 if it takes calls.", ready)
    return "\n".join([*lines, ""]).encode()


def _family(key: str, kind: str, text: str, samples: Mapping[str, float]) -> list[str]:
    name = PREFIX + key + ("_total" if kind == "counter" else "")
    head = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    return head + [f"{name}{labels} {value}" for labels, value in samples.items()]


def _labels(worker: Mapping[str, Any]) -> str:
    return "{" + worker_label(worker["id"]) + "}"


def worker_label(name: str) -> str:
    """The label that tells one worker's sample from another's, whatever its name holds."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'worker="{escaped}"'
