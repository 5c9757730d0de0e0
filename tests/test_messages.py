"""Messages survive the wire that SGLang's processes share."""

from __future__ import annotations

import functools
import operator
import pickle
from typing import Any

import msgspec
import pytest

from autellix_sglang import messages

UNION: Any = functools.reduce(operator.or_, messages.MESSAGES)
EXAMPLES: tuple[Any, ...] = (
    messages.ProgramControl(op=messages.TICK, now_s=1.5),
    messages.ProgramControl(
        op=messages.LIST,
        now_s=2.0,
        tenant="api/org",
        program_id="中",
        state="idle",
        limit=3,
        after=7,
        prefill_weight=0.25,
        all_tenants=True,
        kv_break_even=64,
    ),
    messages.ProgramReply(ok=False, error="unknown"),
    messages.ProgramReply(ok=False, error="too large", field="--program-host-memory"),
    messages.ProgramReply(ok=True, body={"programs": [{"id": "p", "service_steps": 1.5}]}),
)


def test_examples_cover_every_message():
    """Each message of the union is exercised below."""
    assert {type(example) for example in EXAMPLES} == set(messages.MESSAGES)


@pytest.mark.parametrize("message", EXAMPLES, ids=repr)
def test_union_round_trip(message):
    """A decoder of the union gives back what was encoded."""
    decoder = msgspec.msgpack.Decoder(UNION)
    assert decoder.decode(msgspec.msgpack.encode(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=repr)
def test_pickle_round_trip(message):
    """Messages can be pickled, as SGLang does to broadcast them to tensor-parallel ranks."""
    assert pickle.loads(pickle.dumps(message)) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=repr)
def test_longer_message_of_a_later_version_is_understood(message):
    """Fields are only appended, so a decoder ignores those it does not know."""
    encoded = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    longer = msgspec.msgpack.encode([*encoded, "from the future"])
    assert msgspec.msgpack.Decoder(UNION).decode(longer) == message


@pytest.mark.parametrize("message", EXAMPLES, ids=repr)
def test_sglang_decoder_round_trip(message):
    """SGLang's own socket decoder understands our messages once they are registered."""
    io_struct = pytest.importorskip("sglang.srt.managers.io_struct")
    io_struct.hook_custom_types(*messages.MESSAGES)
    assert io_struct.msgpack_decode(io_struct.msgpack_encode(message)) == message


def test_sglang_decoder_takes_a_tag():
    """The tag passes SGLang's typed decoder inside custom_params, next to a user's own values."""
    pytest.importorskip("sglang")
    from sglang.srt.sampling.sampling_params import SamplingParams

    from autellix_sglang.identity import WIRE_KEY, CallTag

    tag = CallTag(program_id="p", call_id="c", parent_call_ids=("a", "b"), now_s=1.0)
    params = {"thinking_budget": 3, WIRE_KEY: tag.to_wire()}
    encoded = msgspec.msgpack.encode(SamplingParams(custom_params=params))
    decoded = msgspec.msgpack.decode(encoded, type=SamplingParams)
    assert decoded.custom_params == params
