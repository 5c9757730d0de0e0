"""Importing foreign traces: small samples of each format, and what is wrong with broken ones."""

import gzip
import json

import pytest

from bench import import_trace
from bench.import_trace import IMPORTERS, Assumptions, convert
from bench.prompts import ProgramPrompts
from bench.trace import TraceError, TraceProgram, load

NOTHING = Assumptions()


def imported(tmp_path, kind: str, text: str, assumed: Assumptions = NOTHING):
    """What a benchmark reads after the sample has been imported and written."""
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    return convert(IMPORTERS[kind], source, tmp_path / "out.jsonl.gz", assumed)


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def shape(program: TraceProgram):
    """(parents, prompt, new, output, gap) of each call."""
    return [
        (c.parents, c.prompt_tokens, c.new_tokens, c.output_tokens, c.gap_s) for c in program.calls
    ]


# --- Mooncake -----------------------------------------------------------------------------------


def request(at_ms: int, num_input: int, num_output: int, *blocks: int) -> dict:
    return {
        "timestamp": at_ms,
        "input_length": num_input,
        "output_length": num_output,
        "hash_ids": list(blocks),
    }


def test_mooncake_sessions_are_found_by_their_blocks(tmp_path):
    """A request continues the latest longest earlier one whose full blocks begin it."""
    text = lines(
        request(0, 1100, 100, 0, 1, 2),
        request(3000, 1100, 50, 0, 7, 8),
        request(30000, 1300, 40, 0, 1, 9),
        request(60000, 1900, 10, 0, 1, 9, 10),
    )

    first, second = imported(tmp_path, "mooncake", text)

    # Two full blocks (0, 1) begin the third and the fourth; the fourth is nearer to the third.
    assert shape(first) == [
        ((), 1100, 1100, 100, None),
        (("0",), 1300, 100, 40, 30 - 2.5),
        (("1",), 1900, 560, 10, 30 - 1.0),
    ]
    assert [call.thread for call in first.calls] == ["0", "0", "0"]
    assert (first.arrival_s, second.arrival_s) == (0.0, 3.0)
    assert second.calls[0].shared_prefix_tokens == 512


def test_mooncake_requests_that_only_share_the_system_prompt_stay_apart(tmp_path):
    """One common block, a prompt that is too short, or the same moment is no continuation."""
    text = lines(
        request(0, 600, 10, 0, 1),
        request(9000, 700, 10, 0, 2),
        request(20000, 1024, 900, 0, 5),
        request(30000, 1200, 10, 0, 5, 6),
        request(30000, 1030, 10, 0, 5, 7),
    )

    assert [len(program.calls) for program in imported(tmp_path, "mooncake", text)] == [1] * 5


def test_an_edited_mooncake_turn_opens_a_thread(tmp_path):
    """A second continuation of one request is a branch of the same program."""
    text = lines(
        request(0, 1100, 10, 0, 1, 2),
        request(10000, 1600, 10, 0, 1, 3, 5),
        request(20000, 1700, 10, 0, 1, 4, 6),
    )

    (program,) = imported(tmp_path, "mooncake", text)

    assert [call.parents for call in program.calls] == [(), ("0",), ("0",)]
    assert [call.thread for call in program.calls] == ["0", "0", "1"]


# --- SGLang -------------------------------------------------------------------------------------


def turn(num_prompt: int) -> dict:
    return {"messages": [{"role": "user", "content": "x"}], "prompt_tokens": num_prompt}


def test_an_sglang_conversation_grows_by_answers_and_messages(tmp_path):
    """An answer is as long as asked for, but no longer than the next prompt has room for."""
    conversation = [turn(1000), turn(1500), turn(1600), turn(400)]
    text = json.dumps({"metadata": {}, "conversations": [conversation, [{"messages": []}]]})

    (program,) = imported(tmp_path, "sglang", text)

    assert shape(program) == [
        ((), 1000, 1000, 220, None),
        (("0",), 1500, 280, 99, None),
        (("1",), 1600, 1, 220, None),
        (("2",), 400, 400, 220, None),
    ]
    (short,) = imported(tmp_path, "sglang", text, Assumptions(output_tokens=50))
    assert [call.output_tokens for call in short.calls] == [50, 50, 50, 50]


# --- AIBrix -------------------------------------------------------------------------------------


def entry(at_ms: int, requests=(), events=()) -> dict:
    return {
        "schema_version": "aibrix.agent-session.v1",
        "timestamp": at_ms,
        "requests": list(requests),
        "events": list(events),
    }


def model(name: str, parents: list[str], num_prompt: int, added: int) -> dict:
    agent = {"node_id": name, "parent_ids": parents, "context_delta_tokens": added}
    return {
        "session_id": "s",
        "prompt": "...",
        "prompt_length": num_prompt,
        "output_length": 30,
        "agent": agent,
    }


def event(name: str, kind: str, parents: list[str], ms: int, added: int = 0) -> dict:
    return {
        "session_id": "s",
        "node_id": name,
        "parent_ids": parents,
        "node_type": kind,
        "duration_ms": ms,
        "context_delta_tokens": added,
    }


AGENT_SESSION = lines(
    entry(0, [model("plan", [], 512, 512)]),
    entry(
        200,
        events=[
            event("t1", "tool", ["plan"], 300, 64),
            event("t2", "tool", ["plan"], 100),
            event("r2", "retry", ["t2"], 900, 64),
        ],
    ),
    entry(1200, [model("followup", ["j"], 640, 0)], [event("j", "join", ["t1", "r2"], 0)]),
    entry(1400, events=[event("w", "wait", ["followup"], 2500)]),
    entry(3900, [model("plan2", ["w"], 768, 256)]),
)


def test_aibrix_tools_and_waits_become_the_gap(tmp_path):
    """The longest way through tools and retries separates two calls, and their results are new."""
    (program,) = imported(tmp_path, "aibrix", AGENT_SESSION)

    assert program.id == "s"
    assert shape(program) == [
        ((), 512, 512, 30, None),
        (("plan",), 640, 128, 30, 1.0),
        (("followup",), 768, 256, 30, 2.5),
    ]


# --- OpenAI -------------------------------------------------------------------------------------


def logged(at: object, messages: list[str] | None, prompt: int, output: int, **more) -> dict:
    record = {
        "timestamp": at,
        "usage": {"prompt_tokens": prompt, "completion_tokens": output},
        **more,
    }
    if messages is not None:
        record["messages"] = [{"role": "user", "content": text} for text in messages]
    return record


def test_openai_calls_continue_the_messages_that_they_begin_with(tmp_path):
    """A call extends the longest earlier conversation; another system prompt is a new thread."""
    text = lines(
        logged(100.0, ["a"], 50, 20, session_id="s", duration_ms=1500),
        logged(104.0, ["a", "b", "c"], 80, 10, session_id="s"),
        logged(105.0, ["other"], 30, 5, session_id="s"),
        logged(106.0, ["a"], 50, 7, user="someone else"),
        logged(107.0, ["a", "d"], 75, 5, session_id="s"),
    )

    session, other = imported(tmp_path, "openai", text)

    assert shape(session) == [
        ((), 50, 50, 20, None),
        (("0",), 80, 10, 10, 2.5),
        ((), 30, 30, 5, None),
        (("0",), 75, 5, 5, 5.5),
    ]
    assert [call.thread for call in session.calls] == ["0", "0", "1", "0"]
    assert session.calls[2].issue_s == 5.0
    assert (len(other.calls), other.arrival_s) == (1, 6.0)


def test_openai_logs_without_messages_or_sessions(tmp_path):
    """Without messages a prompt that grew continues the last; without an id all are strangers."""
    text = lines(
        logged("2026-01-02T03:04:05Z", None, 100, 40, user="u"),
        logged("2026-01-02T03:04:15+00:00", None, 200, 10, user="u"),
        logged("2026-01-02T03:04:25Z", None, 90, 10, user="u"),
        logged(1767323100000, None, 10, 1),
        logged(1767323101000, None, 10, 1),
    )

    user, one, two = imported(tmp_path, "openai", text)

    assert shape(user) == [
        ((), 100, 100, 40, None),
        (("0",), 200, 60, 10, 9.0),
        ((), 90, 90, 10, None),
    ]
    assert (one.calls[0].prompt_tokens, two.arrival_s - one.arrival_s) == (10, 1.0)


def test_openai_messages_are_counted_where_there_is_no_usage(tmp_path):
    """With a tokenizer the messages and the first choice are counted: here one token per byte."""
    from autellix_sglang.platform.tiny_model import write_tokenizer

    write_tokenizer(tmp_path)
    message = {"role": "user", "content": "four"}
    choices = [{"message": {"role": "assistant", "content": "sixsix"}}]
    text = lines({"created": 5, "messages": [message], "choices": choices})

    assumed = Assumptions(tokenizer=str(tmp_path / "tokenizer.json"))
    (program,) = imported(tmp_path, "openai", text, assumed)

    assert (program.calls[0].prompt_tokens, program.calls[0].output_tokens) == (4, 6)


# --- all of them --------------------------------------------------------------------------------

SAMPLES = {
    "mooncake": lines(request(0, 1100, 100, 0, 1, 2), request(9000, 1300, 40, 0, 1, 3)),
    "sglang": json.dumps({"conversations": [[turn(100), turn(400)]]}),
    "aibrix": AGENT_SESSION,
    "openai": lines(
        logged(1, ["a"], 50, 20, session_id="s"), logged(9, ["a", "b"], 90, 5, session_id="s")
    ),
}


@pytest.mark.parametrize("kind", IMPORTERS)
def test_what_was_imported_can_be_replayed(kind, tmp_path):
    """Prompts can be built for every call, each beginning with what it continues."""
    for program in imported(tmp_path, kind, SAMPLES[kind]):
        prompts = ProgramPrompts(program)
        for call in program.calls:
            assert len(prompts.prompt(call)) == call.prompt_tokens
            prompts.complete(call, [1] * call.output_tokens)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("mooncake", lines(request(0, 10, 1), {"timestamp": 1}), r"in.jsonl:2: hash_ids: expected"),
        ("mooncake", '{"hash_ids": [1], "timestamp": "x"}', r":1: timestamp: expected seconds"),
        ("mooncake", '{"hash_ids": [1], "timestamp": 1}', r":1: input_length: is missing"),
        ("mooncake", "not json", r":1: not JSON"),
        ("mooncake", "", "no programs in the file"),
        ("sglang", "{}", r"conversations: expected a list"),
        (
            "sglang",
            json.dumps({"conversations": [[turn(5), {"messages": [1]}]]}),
            r"conversations\[0\]\[1\]: prompt_tokens: is missing",
        ),
        ("aibrix", '{"timestamp": 1}', r":1: schema_version: expected aibrix.agent-session.v1"),
        (
            "aibrix",
            lines(entry(0, [model("a", ["nobody"], 5, 0)])),
            r":1: requests\[0\].agent.parent_ids: 'nobody' is not a node",
        ),
        ("openai", '{"timestamp": 1}', r":1: usage: is missing: give --tokenizer"),
        (
            "openai",
            '{"timestamp": 1, "usage": {"prompt_tokens": 1.5}}',
            r":1: usage.prompt_tokens: expected a whole number",
        ),
        ("openai", lines(logged("soon", None, 1, 1)), r":1: timestamp: neither a number nor ISO"),
        ("openai", lines(logged(None, None, 1, 1)), r":1: timestamp: is missing"),
    ],
)
def test_errors_name_the_file_the_line_and_the_field(kind, text, message, tmp_path):
    """What breaks a format is said in words that lead to the place."""
    with pytest.raises(TraceError, match=message):
        imported(tmp_path, kind, text)


def test_the_command_writes_a_trace_and_says_what_is_in_it(tmp_path, capsys):
    """Gzipped input and output; the last line is JSON; an error is one line and status 1."""
    source, target = tmp_path / "m.jsonl.gz", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(SAMPLES["mooncake"].encode()))

    assert import_trace.main(["--from", "mooncake", str(source), str(target)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["programs"], result["calls"], len(load(target))) == (1, 2, 1)

    assert import_trace.main(["--from", "openai", str(source), str(target)]) == 1
    assert "m.jsonl.gz:1: usage" in capsys.readouterr().err
