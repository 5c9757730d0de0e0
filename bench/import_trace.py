"""Turn traces that exist in the wild into the format that our benchmarks replay (`bench.trace`).

    python -m bench.import_trace --from mooncake conversation_trace.jsonl conversation.jsonl.gz
    python -m bench.serve --trace conversation.jsonl.gz ...

| --from | what it reads | what it has to guess |
|---|---|---|
| mooncake | kvcache-ai/Mooncake: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` | sessions, from prefixes of 512-token blocks; completion times |
| sglang | `sglang.benchmark.serving --dataset-name agentic_trace`: `conversations` of turns with `messages` and `prompt_tokens` | lengths of answers; there are no times |
| aibrix | `aibrix.agent-session.v1`, JSON lines with `requests` and `events` | which part of a prompt is new, where it says too little |
| openai | one request per line: `timestamp`, `session_id` or `user`, `usage`, perhaps `messages` | which call a prompt continues, where there are no messages |

Where a completion time is not recorded it is taken to be 25 ms per generated token after the issue.
An error names the file, the line and the field. Nothing but numbers and ids is written. The last
line of stdout is one JSON object.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

from bench.common import new_parser, print_result, provenance
from bench.trace import (
    Record,
    TraceCall,
    TraceError,
    TraceProgram,
    load,
    parse_record,
    read_lines,
    save,
)

ASSUMED_TOKEN_S: Final = 0.025  # per generated token, where completion is not recorded


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the caller says about what a file does not hold."""

    output_tokens: int = 220  # sglang: its DEFAULT_AGENTIC_OUTPUT_LEN
    tokenizer: str | None = None  # openai: a tokenizer.json, to count where there is no usage


# --- Mooncake -----------------------------------------------------------------------------------

BLOCK_TOKENS: Final = 512
MIN_BLOCKS: Final = 2  # block 0 is a system prompt that all requests share


@dataclass(slots=True, eq=False)
class _Block:
    """A node of the tree of block sequences: who was seen there, and who ends there."""

    next: dict[str, _Block] = field(default_factory=dict)
    requests: list[_Request] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Request:
    """One line of a Mooncake trace, and the request that it continues."""

    at_s: float
    num_prompt: int
    num_output: int
    num_known: int  # leading tokens that an earlier request had
    parent: _Request | None = None
    children: list[_Request] = field(default_factory=list)


def from_mooncake(path: Path, assumed: Assumptions) -> Iterator[TraceProgram]:
    """Sessions rebuilt from block hashes.

    B continues A when all of A's full blocks (two or more) begin B's, A was issued earlier, and B's
    prompt has room for A's prompt and half of its answer. The longest such A wins, then the latest.
    """
    root = _Block()
    requests = []
    for record, blocks in sorted(_mooncake_lines(path), key=lambda pair: pair[0].at_s):
        _place(root, record, blocks)
        requests.append(record)
    start_s = requests[0].at_s if requests else 0.0
    roots = [request for request in requests if request.parent is None]
    for number, request in enumerate(roots):
        yield _mooncake_program(number, request, start_s)


def _mooncake_lines(path: Path) -> Iterator[tuple[_Request, list[str]]]:
    for where, line in read_lines(path):
        record = parse_record(line, where)
        blocks = record.raw("hash_ids")
        if not isinstance(blocks, list):
            raise record.error("hash_ids", f"expected a list of block ids, got {blocks!r}")
        at_ms = record.seconds("timestamp")
        if at_ms is None:
            raise record.error("timestamp", "is missing")
        request = _Request(
            at_ms / 1e3, max(1, record.count("input_length")), record.count("output_length"), 0
        )
        yield request, [str(block) for block in blocks]


def _place(root: _Block, request: _Request, blocks: Sequence[str]) -> None:
    """Find what the request continues, then file it under its own full blocks."""
    node, num_known, num_full = root, 0, request.num_prompt // BLOCK_TOKENS
    for depth, block in enumerate(blocks, start=1):
        known = node.next.get(block)
        if known is not None:
            num_known = depth
        node = known or node.next.setdefault(block, _Block())
        if depth >= MIN_BLOCKS:
            fitting = [earlier for earlier in node.requests if _continues(request, earlier)]
            request.parent = fitting[-1] if fitting else request.parent
        if depth == num_full:
            node.requests.append(request)
    request.num_known = min(num_known * BLOCK_TOKENS, request.num_prompt)
    if request.parent is not None:
        request.parent.children.append(request)


def _continues(request: _Request, earlier: _Request) -> bool:
    least = earlier.num_prompt + earlier.num_output / 2
    return earlier is not request and earlier.at_s < request.at_s and request.num_prompt >= least


def _mooncake_program(number: int, root: _Request, start_s: float) -> TraceProgram:
    calls: list[TraceCall] = []
    num_threads = 1
    waiting: list[tuple[_Request, TraceCall | None, int]] = [(root, None, 0)]
    while waiting:
        request, parent, thread = waiting.pop(0)
        call = _continuation(
            str(len(calls)),
            request.num_prompt,
            request.num_output,
            parent,
            issue_s=request.at_s - root.at_s,
            thread=str(thread),
            num_shared=request.num_known if parent is None else 0,
        )
        calls.append(call)
        for i, child in enumerate(request.children):
            # A second child of one request is an edited or regenerated turn.
            waiting.append((child, call, thread if i == 0 else num_threads))
            num_threads += i > 0
    return TraceProgram(f"mooncake-{number}", "", "chat", tuple(calls), root.at_s - start_s)


def _continuation(
    call_id: str,
    num_prompt: int,
    num_output: int,
    parent: TraceCall | None,
    *,
    issue_s: float | None,
    thread: str = "0",
    num_shared: int = 0,
    parent_s: float | None = None,
    num_new: int | None = None,
) -> TraceCall:
    """A call whose prompt begins with all of its parent's prompt and answer, as far as it reaches.

    `parent_s` is how long the parent took, where that is recorded; `num_new` the tokens known to
    be new.
    """
    gap_s = None
    history = 0
    if parent is not None:
        history = _total_tokens(parent)
        if issue_s is not None and parent.issue_s is not None:
            took_s = ASSUMED_TOKEN_S * parent.output_tokens if parent_s is None else parent_s
            gap_s = round(max(0.0, issue_s - parent.issue_s - took_s), 3)
    least = max(1, num_new or 0)
    return TraceCall(
        id=call_id,
        prompt_tokens=num_prompt,
        new_tokens=min(num_prompt, max(least, num_prompt - history)),
        output_tokens=num_output,
        parents=() if parent is None else (parent.id,),
        thread=thread,
        gap_s=gap_s,
        issue_s=None if issue_s is None else round(issue_s, 3),
        shared_prefix_tokens=num_shared,
    )


# --- SGLang's agentic trace ---------------------------------------------------------------------


def from_sglang(path: Path, assumed: Assumptions) -> Iterator[TraceProgram]:
    """One program per conversation; a turn's answer is at most what the next prompt grows by."""
    data = parse_record(path.read_text(encoding="utf-8"), str(path))
    conversations = data.raw("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise data.error("conversations", "expected a list of one or more conversations")
    for number, turns in enumerate(conversations):
        where = f"{path}: conversations[{number}]"
        if not isinstance(turns, list):
            raise TraceError(f"{where}: expected a list of turns")
        lengths = [
            Record(turn, f"{where}[{i}]").count("prompt_tokens")
            for i, turn in enumerate(turns)
            if not isinstance(turn, dict) or turn.get("messages")
        ]
        if lengths:
            calls = tuple(_growing(lengths, assumed.output_tokens))
            yield TraceProgram(f"sglang-{number}", "", "coding", calls)


def _growing(lengths: Sequence[int], num_output: int) -> Iterator[TraceCall]:
    parent: TraceCall | None = None
    for i, length in enumerate(lengths):
        grown = lengths[i + 1] - length if i + 1 < len(lengths) else math.inf
        output = int(min(num_output, grown - 1)) if grown > 1 else num_output
        # A prompt that shrank was summarised or begun anew: nothing of the history is left.
        is_anew = parent is not None and length <= parent.prompt_tokens
        num_new = length if is_anew else None
        parent = _continuation(
            str(i), max(1, length), output, parent, issue_s=None, num_new=num_new
        )
        yield parent


# --- AIBrix agent sessions ----------------------------------------------------------------------

AIBRIX_SCHEMA: Final = "aibrix.agent-session.v1"


@dataclass(frozen=True, slots=True)
class _Node:
    """A model call (`request`) or what happens between calls: a tool, a retry, a join, a wait."""

    record: Record
    parents: tuple[str, ...]
    duration_s: float
    num_added: int
    at_s: float
    request: Record | None = None


def from_aibrix(path: Path, assumed: Assumptions) -> Iterator[TraceProgram]:
    """One program per session; tools, joins and waits between two calls become the gap."""
    sessions: dict[str, dict[str, _Node]] = {}
    for where, line in read_lines(path):
        for session, name, node in _aibrix_nodes(parse_record(line, where)):
            sessions.setdefault(session, {})[name] = node
    start_s = min((n.at_s for nodes in sessions.values() for n in nodes.values()), default=0.0)
    for session, nodes in sessions.items():
        calls = tuple(_aibrix_calls(nodes))
        if calls:
            first_s = min(node.at_s for node in nodes.values() if node.request)
            yield TraceProgram(session, "", "react", calls, round(first_s - start_s, 3))


def _aibrix_nodes(record: Record) -> Iterator[tuple[str, str, _Node]]:
    if record.raw("schema_version") != AIBRIX_SCHEMA:
        raise record.error(
            "schema_version", f"expected {AIBRIX_SCHEMA}, got {record.raw('schema_version')!r}"
        )
    at_ms = record.seconds("timestamp")
    if at_ms is None:
        raise record.error("timestamp", "is missing")
    for request in record.items("requests") if record.raw("requests") else []:
        agent = request.part("agent")
        session, name = request.label("session_id"), agent.label("node_id")
        yield session, name, _node(agent, at_ms / 1e3, request)
    for event in record.items("events") if record.raw("events") else []:
        yield event.label("session_id"), event.label("node_id"), _node(event, at_ms / 1e3, None)


def _node(record: Record, at_s: float, request: Record | None) -> _Node:
    parents = record.raw("parent_ids") or []
    if not isinstance(parents, list):
        raise record.error("parent_ids", f"expected a list of node ids, got {parents!r}")
    return _Node(
        record,
        tuple(map(str, parents)),
        (record.seconds("duration_ms") or 0.0) / 1e3,
        record.optional_count("context_delta_tokens") or 0,
        at_s,
        request,
    )


def _aibrix_calls(nodes: dict[str, _Node]) -> Iterator[TraceCall]:
    made: dict[str, TraceCall] = {}
    models = [(name, node) for name, node in nodes.items() if node.request is not None]
    for name, node in sorted(models, key=lambda pair: pair[1].at_s):
        request = node.request
        assert request is not None
        between: set[str] = set()
        delays = _model_ancestors(node, nodes, between)
        missing = [parent for parent in delays if parent not in made]
        if missing:
            raise node.record.error("parent_ids", f"{missing[0]!r} is not an earlier model call")
        num_added = node.num_added + sum(nodes[other].num_added for other in between)
        longest = max((made[p] for p in delays), key=_total_tokens, default=None)
        call = _continuation(
            name,
            max(1, request.count("prompt_length")),
            request.count("output_length"),
            longest,
            issue_s=None,
            num_new=num_added if longest else None,
        )
        gap_s = round(max(delays.values()), 3) if delays else None
        made[name] = replace(call, parents=tuple(delays), gap_s=gap_s)
        yield made[name]


def _total_tokens(call: TraceCall) -> int:
    return call.prompt_tokens + call.output_tokens


def _model_ancestors(node: _Node, nodes: dict[str, _Node], between: set[str]) -> dict[str, float]:
    """The nearest model calls before a node, each with the longest way of tools from it, in s."""
    found: dict[str, float] = {}
    for name in node.parents:
        parent = nodes.get(name)
        if parent is None:
            raise node.record.error("parent_ids", f"{name!r} is not a node of this session")
        if parent.request is not None:
            found.setdefault(name, 0.0)
            continue
        between.add(name)
        for ancestor, delay_s in _model_ancestors(parent, nodes, between).items():
            found[ancestor] = max(found.get(ancestor, 0.0), delay_s + parent.duration_s)
    return found


# --- OpenAI request logs ------------------------------------------------------------------------

TIME_FIELDS: Final = ("timestamp", "created_at", "created")
SESSION_FIELDS: Final = ("session_id", "user", "user_id")


@dataclass(slots=True)
class _Logged:
    """One request of a log. `messages` are compared, never kept."""

    at_s: float
    num_prompt: int
    num_output: int
    took_s: float | None
    messages: tuple[str, ...]
    call: TraceCall | None = None


def from_openai(path: Path, assumed: Assumptions) -> Iterator[TraceProgram]:
    """One program per session; requests without a session id are programs of their own.

    With messages a call continues the call whose messages are the longest beginning of its own;
    without, the call before it, if its prompt has room for that one's.
    """
    sessions: dict[str, list[_Logged]] = {}
    for where, line in read_lines(path):
        record = parse_record(line, where)
        session = next((record.label(f) for f in SESSION_FIELDS if record.has(f)), where)
        sessions.setdefault(session, []).append(_logged(record, assumed))
    start_s = min((r.at_s for logged in sessions.values() for r in logged), default=0.0)
    for number, logged in enumerate(sessions.values()):
        ordered = sorted(logged, key=lambda request: request.at_s)
        calls = tuple(_openai_calls(ordered))
        kind = "chat" if len({call.thread for call in calls}) == 1 else "react"
        arrival_s = round(ordered[0].at_s - start_s, 3)
        yield TraceProgram(f"openai-{number}", "", kind, calls, arrival_s)


def _logged(record: Record, assumed: Assumptions) -> _Logged:
    messages = _messages(record)
    if record.has("usage"):
        usage = record.part("usage")
        num_prompt, num_output = usage.count("prompt_tokens"), usage.count("completion_tokens")
    elif assumed.tokenizer is not None:
        texts = [_content(json.loads(message)) for message in messages]
        num_prompt = sum(_count(text, assumed.tokenizer) for text in texts)
        answer = record.items("choices")[0].raw("message")
        num_output = _count(_content(answer), assumed.tokenizer)
    else:
        raise record.error("usage", "is missing: give --tokenizer FILE to count messages")
    return _Logged(
        _timestamp(record), max(1, num_prompt), num_output, _duration_s(record), messages
    )


def _timestamp(record: Record) -> float:
    """Unix seconds, or milliseconds where they are too many, or ISO 8601."""
    name = next((name for name in TIME_FIELDS if record.has(name)), TIME_FIELDS[0])
    value = record.raw(name)
    if isinstance(value, str):
        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError as error:
            raise record.error(name, f"neither a number nor ISO 8601: {value!r}") from error
    seconds = record.seconds(name)
    if seconds is None:
        raise record.error(name, f"is missing (any of {', '.join(TIME_FIELDS)})")
    return seconds / 1e3 if seconds > 1e11 else seconds


def _duration_s(record: Record) -> float | None:
    if record.has("duration_ms"):
        return (record.seconds("duration_ms") or 0.0) / 1e3
    return record.seconds("latency_s")


def _messages(record: Record) -> tuple[str, ...]:
    messages = record.raw("messages")
    if messages is None:
        return ()
    if not isinstance(messages, list):
        raise record.error("messages", f"expected a list, got {type(messages).__name__}")
    return tuple(json.dumps(message, sort_keys=True) for message in messages)


def _content(message: object) -> str:
    """A message's text, whole or in parts; what a chat template puts around it is not known."""
    content = message.get("content") if isinstance(message, dict) else None
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def _count(text: str, tokenizer: str) -> int:
    return len(_tokenizer(tokenizer).encode(text).ids)


def _openai_calls(ordered: Sequence[_Logged]) -> Iterator[TraceCall]:
    has_messages = all(request.messages for request in ordered)
    num_threads = 0
    for i, request in enumerate(ordered):
        earlier = ordered[:i]
        base = _longest_beginning(request, earlier) if has_messages else _before(request, earlier)
        parent = None if base is None else base.call
        thread = str(num_threads) if parent is None else parent.thread
        num_threads += parent is None
        request.call = _continuation(
            str(i),
            request.num_prompt,
            request.num_output,
            parent,
            issue_s=request.at_s - ordered[0].at_s,
            thread=thread,
            parent_s=None if base is None else base.took_s,
        )
        yield request.call


def _longest_beginning(request: _Logged, earlier: Sequence[_Logged]) -> _Logged | None:
    fitting = [
        other
        for other in earlier
        if len(other.messages) < len(request.messages)
        and request.messages[: len(other.messages)] == other.messages
    ]
    return max(fitting, key=lambda other: (len(other.messages), other.at_s), default=None)


def _before(request: _Logged, earlier: Sequence[_Logged]) -> _Logged | None:
    last = earlier[-1] if earlier else None
    return last if last is not None and request.num_prompt > last.num_prompt else None


# --- command line -------------------------------------------------------------------------------

Importer = Callable[[Path, Assumptions], Iterator[TraceProgram]]
IMPORTERS: Final[dict[str, Importer]] = {
    "mooncake": from_mooncake,
    "sglang": from_sglang,
    "aibrix": from_aibrix,
    "openai": from_openai,
}


def describe(programs: Sequence[TraceProgram]) -> dict[str, Any]:
    """The size of what was imported."""
    calls = [call for program in programs for call in program.calls]
    gaps = [call.gap_s for call in calls if call.gap_s is not None]
    return {
        "programs": len(programs),
        "calls": len(calls),
        "calls_per_program_mean": round(len(calls) / len(programs), 2),
        "prompt_tokens_mean": round(fmean(call.prompt_tokens for call in calls), 1),
        "new_tokens_mean": round(fmean(call.new_tokens for call in calls), 1),
        "output_tokens_mean": round(fmean(call.output_tokens for call in calls), 1),
        "gap_s_median": round(median(gaps), 3) if gaps else None,
    }


def convert(
    importer: Importer, source: Path, target: Path, assumed: Assumptions
) -> tuple[TraceProgram, ...]:
    """Import, write, and read back what was written, so that what is there can be replayed."""
    programs = list(importer(source, assumed))
    if not programs:
        raise TraceError(f"{source}: no programs in the file")
    save(programs, target)
    return load(target)


def parser() -> argparse.ArgumentParser:
    out = new_parser("bench.import_trace", __doc__)
    add = out.add_argument
    default = Assumptions()
    add("--from", dest="format", required=True, choices=IMPORTERS)
    add("source", type=Path, metavar="IN", help="may be gzipped (.gz), but for sglang")
    add("target", type=Path, metavar="OUT", help=".jsonl or .jsonl.gz")
    add("--output-tokens", type=int, default=default.output_tokens,
        help="of a turn that does not say, sglang (default: %(default)s, as SGLang)")  # fmt: skip
    add("--tokenizer", metavar="FILE", help="a tokenizer.json, for openai logs without usage")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    options = parser().parse_args(argv)
    assumed = Assumptions(options.output_tokens, options.tokenizer)
    try:
        programs = convert(IMPORTERS[options.format], options.source, options.target, assumed)
    except (TraceError, OSError) as error:
        print(f"bench.import_trace: {error}", file=sys.stderr)
        return 1
    result = {"from": options.format, "written": str(options.target), **describe(programs)}
    print_result(result | provenance(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
