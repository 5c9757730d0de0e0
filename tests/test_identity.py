"""Where a call's program, thread, parents and tenant come from."""

from __future__ import annotations

from itertools import combinations

import pytest

from autellix_sglang.errors import IdentityError
from autellix_sglang.identity import (
    AGENT_HEADERS,
    MAX_PARENTS,
    BodyIdentity,
    CallTag,
    HeaderIdentity,
    tenant_of,
)


def resolve(headers=None, custom_params=None, session_id=None, key_name=None) -> CallTag:
    """The tag of request `rid` with these headers and body fields."""
    header = HeaderIdentity.from_headers(headers or {}, key_name)
    return CallTag.resolve(header, BodyIdentity.from_body(custom_params, session_id), "rid", 5.0)


PROGRAM_SOURCES = [
    ({"x-program-id": "A"}, {}, None),
    ({}, {"program_id": "A"}, None),
    *(({name: "A"}, {}, None) for name in AGENT_HEADERS),
    ({}, {}, "A"),
]


@pytest.mark.parametrize(("headers", "params", "session_id"), PROGRAM_SOURCES)
def test_each_source_names_the_program(headers, params, session_id):
    """A program id is found in every place that the contract lists."""
    tag = resolve(headers, params, session_id)
    assert (tag.program_id, tag.anonymous) == ("A", False)


@pytest.mark.parametrize(("first", "second"), list(combinations(PROGRAM_SOURCES, 2)))
def test_earlier_source_wins(first, second):
    """Of two sources the one listed first names the program."""
    headers = {**dict.fromkeys(second[0], "late"), **dict.fromkeys(first[0], "early")}
    params = {**dict.fromkeys(second[1], "late"), **dict.fromkeys(first[1], "early")}
    session_id = "late" if second[2] else None
    assert resolve(headers, params, session_id).program_id == "early"


def test_no_id_is_a_program_of_its_own():
    """A call that names no program is anonymous and named after its request."""
    expected = CallTag(program_id="rid", call_id="rid", anonymous=True, now_s=5.0)
    assert resolve() == expected == CallTag.anonymous_call("rid", now_s=5.0)


def test_all_headers_are_read():
    """Every header of ours sets its field of the tag."""
    tag = resolve(
        {
            "X-Program-ID": "P",
            "X-Thread-Id": "T",
            "x-call-id": "C",
            "x-parent-call-ids": "a, b,a",
            "x-program-end": "1",
            "x-tenant-id": "org",
            "x-agent-name": "coder",
        }
    )
    assert tag == CallTag(
        program_id="P",
        thread_id="T",
        call_id="C",
        parent_call_ids=("a", "b"),
        ends_program=True,
        tenant="org",
        agent_name="coder",
        now_s=5.0,
    )


def test_all_body_fields_are_read():
    """Every field of custom_params sets its field of the tag, and others are left alone."""
    params = {
        "program_id": "P",
        "thread_id": "T",
        "call_id": "C",
        "parent_call_ids": ["a", "b,c"],
        "program_end": True,
        "agent_name": "coder",
        "temperature_schedule": [1, 2],
    }
    tag = resolve({}, params)
    assert tag == CallTag(
        program_id="P",
        thread_id="T",
        call_id="C",
        parent_call_ids=("a", "b,c"),
        ends_program=True,
        agent_name="coder",
        now_s=5.0,
    )


def test_headers_win_over_body_fields():
    """For the other ids too, a header goes before the body field of the same meaning."""
    headers = {
        "x-thread-id": "T",
        "x-call-id": "C",
        "x-parent-call-ids": "a",
        "x-program-end": "false",
        "x-agent-name": "A",
    }
    params = {
        "thread_id": "t",
        "call_id": "c",
        "parent_call_ids": ["b"],
        "program_end": True,
        "agent_name": "b",
    }
    tag = resolve(headers, params)
    found = (tag.thread_id, tag.call_id, tag.parent_call_ids, tag.ends_program, tag.agent_name)
    assert found == ("T", "C", ("a",), False, "A")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "is empty"),
        ("x" * 257, "has 257 characters"),
        ("a\tb", "not printable"),
        ("a\nb", "not printable"),
        ("a\u200bb", "not printable"),
        ("a\x00b", "not printable"),
    ],
)
@pytest.mark.parametrize(
    "header",
    ["x-program-id", "x-thread-id", "x-call-id", "x-tenant-id", "x-agent-name"],
)
def test_malformed_header_is_named(header, value, reason):
    """A malformed id in a header is an error that names the header and the reason."""
    with pytest.raises(IdentityError, match=reason) as caught:
        HeaderIdentity.from_headers({header: value})
    assert caught.value.field == header
    assert str(caught.value).startswith(f"{header}: ")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"program_id": 7}, "custom_params.program_id"),
        ({"program_id": " a"}, "custom_params.program_id"),
        ({"thread_id": ""}, "custom_params.thread_id"),
        ({"call_id": ["c"]}, "custom_params.call_id"),
        ({"agent_name": 3}, "custom_params.agent_name"),
        ({"parent_call_ids": {"a": 1}}, "custom_params.parent_call_ids"),
        ({"parent_call_ids": ["a", 1]}, "custom_params.parent_call_ids"),
        ({"parent_call_ids": "a,,b"}, "custom_params.parent_call_ids"),
        ({"parent_call_ids": ["p"] * (MAX_PARENTS + 1)}, "custom_params.parent_call_ids"),
        ({"program_end": "maybe"}, "custom_params.program_end"),
        ([], "custom_params"),
    ],
)
def test_malformed_body_field_is_named(params, field):
    """A malformed id in the body is an error that names the field."""
    with pytest.raises(IdentityError) as caught:
        BodyIdentity.from_body(params)
    assert caught.value.field == field


def test_session_id_is_checked_only_where_it_names_the_program():
    """SGLang's own session_id is held to our rules only when it is the program id."""
    assert resolve({"x-program-id": "P"}, {}, "").program_id == "P"
    with pytest.raises(IdentityError, match="session_id"):
        resolve({}, {}, "")


@pytest.mark.parametrize("value", ["", "x" * 257, "a\tb"])
@pytest.mark.parametrize("header", AGENT_HEADERS)
def test_foreign_header_without_an_id_is_silent(header, value):
    """A header of another agent cannot fail a request, and hides no other that has an id."""
    assert resolve({header: value}).anonymous
    assert resolve({"x-program-id": "P", header: value}).program_id == "P"
    assert resolve({**dict.fromkeys(AGENT_HEADERS, "A"), header: value}).program_id == "A"


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("True", True), ("0", False)]
)
def test_end_flag_values(value, expected):
    """x-program-end takes 1, true, 0 and false."""
    assert resolve({"x-program-end": value}).ends_program is expected


@pytest.mark.parametrize("value", ["", "yes", "2"])
def test_end_flag_refuses_other_values(value):
    """Any other value of x-program-end is an error that says what is allowed."""
    with pytest.raises(IdentityError, match="x-program-end: must be 1, true, 0 or false"):
        HeaderIdentity.from_headers({"x-program-end": value})


def test_raw_asgi_headers_are_decoded():
    """Header bytes are UTF-8, or latin-1 where they are not valid UTF-8."""
    raw = [(b"X-Program-Id", "中文".encode()), (b"x-thread-id", b"caf\xe9"), (b"host", b"\xff")]
    identity = HeaderIdentity.from_headers(raw)
    assert (identity.program_id, identity.thread_id) == ("中文", "café")


def test_header_given_twice():
    """Lists add up over repeated headers, equal ids may repeat, and different ids contradict."""
    raw = [(b"x-parent-call-ids", ids) for ids in (b"a", b"", b"b")] + [(b"x-call-id", b"c")]
    identity = HeaderIdentity.from_headers([*raw, (b"x-call-id", b"c")])
    assert (identity.parent_call_ids, identity.call_id) == (("a", "b"), "c")
    with pytest.raises(IdentityError, match="x-call-id: is given more than once"):
        HeaderIdentity.from_headers([*raw, (b"x-call-id", b"other")])


@pytest.mark.parametrize(
    ("tenant_id", "key_name", "expected"),
    [
        (None, None, ""),
        ("org", None, "org"),
        (None, "api", "api"),
        ("org", "api", "api/org"),
        ("admin/org", "open", "open/admin/org"),
    ],
)
def test_tenant_stays_within_its_key(tenant_id, key_name, expected):
    """With API keys a tenant is named under the key, whatever the header says."""
    assert tenant_of(tenant_id, key_name) == expected
    headers = {} if tenant_id is None else {"x-tenant-id": tenant_id}
    assert resolve(headers, key_name=key_name).tenant == expected


def test_wire_round_trip():
    """A tag survives its flat wire form, which has nothing deeper than scalars."""
    tag = resolve({"x-program-id": "P", "x-parent-call-ids": "a,b c", "x-agent-name": "A"})
    wire = tag.to_wire()
    assert CallTag.from_wire(wire) == tag
    assert all(isinstance(value, str | bool | float) for value in wire.values())


@pytest.mark.parametrize(
    ("headers", "params", "expected"),
    [
        ({}, {}, None),
        ({"x-parent-call-ids": ""}, {}, ()),
        ({"x-parent-call-ids": " "}, {"parent_call_ids": ["a"]}, ()),
        ({}, {"parent_call_ids": []}, ()),
        ({}, {"parent_call_ids": ""}, ()),
        ({"x-parent-call-ids": "a"}, {"parent_call_ids": []}, ("a",)),
    ],
)
def test_no_parents_is_not_the_same_as_not_told(headers, params, expected):
    """An empty list says that the call waited for none, and stays that way on the wire."""
    tag = resolve(headers, params)
    assert tag.parent_call_ids == expected
    assert CallTag.from_wire(tag.to_wire()) == tag
