"""Which program, thread and tenant a request belongs to.

Pure functions from request headers and body fields to a `CallTag`, which then travels to the
scheduler inside SGLang's `sampling_params.custom_params[WIRE_KEY]`.

The program's id is the first of these that the request has:

    1. header x-program-id
    2. body   custom_params.program_id
    3. the headers agents send already, in the order of `AGENT_HEADERS`: the first with a valid id
    4. body   session_id

and without any of them the call is a program of its own, named after its request id. For the other
ids a header wins over the body field of the same meaning. An id is a string of 1 to 256 characters
that are printable in the sense of `str.isprintable` (any script, no control characters, no line
breaks) with no space at either end. Header bytes are read as UTF-8, or as latin-1 where they are
not valid UTF-8.

Parents are a list of ids, and an empty list says something: the call waited for none. Who sends no
list has not told.

What sort of agent a program is may be told by header x-agent-name or body custom_params.agent_name,
with the first call. It names no program: it only lets the scheduler learn how much work programs
of that name take.

Tenants. On a server without API keys the tenant is what `x-tenant-id` says, or "". On a server
with keys it is the name of the key that the request carries ("open" for none, where the server
lets that pass), and `x-tenant-id` only divides it further: "api", "api/alice". A key's name has no
slash, so whatever a client sends, it stays within its own key's tenants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from autellix_sglang.errors import IdentityError

WIRE_KEY: Final = "autellix"
MAX_ID_CHARACTERS: Final = 256
MAX_PARENTS: Final = 1024

PROGRAM_HEADER: Final = "x-program-id"
THREAD_HEADER: Final = "x-thread-id"
CALL_HEADER: Final = "x-call-id"
PARENTS_HEADER: Final = "x-parent-call-ids"
END_HEADER: Final = "x-program-end"
TENANT_HEADER: Final = "x-tenant-id"
AGENT_NAME_HEADER: Final = "x-agent-name"
AGENT_HEADERS: Final = (
    "x-claude-code-session-id",
    "x-session-id",
    "session-id",
    "session_id",
    "x-session-affinity",
    "x-dynamo-session-id",
    "x-smg-routing-key",
)
_OWN_HEADERS: Final = (
    PROGRAM_HEADER, THREAD_HEADER, CALL_HEADER, PARENTS_HEADER, END_HEADER, TENANT_HEADER,
    AGENT_NAME_HEADER,
)  # fmt: skip
_KNOWN_HEADERS: Final = frozenset((*_OWN_HEADERS, *AGENT_HEADERS))
_BODY_FIELDS: Final = (
    "program_id", "thread_id", "call_id", "parent_call_ids", "program_end", "agent_name",
)  # fmt: skip
_FLAGS: Final = {"1": True, "true": True, "0": False, "false": False}

RawHeaders = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderIdentity:
    """What a request's headers say; None where they are silent."""

    program_id: str | None = None
    agent_program_id: str | None = None  # of a header in AGENT_HEADERS
    thread_id: str | None = None
    call_id: str | None = None
    parent_call_ids: tuple[str, ...] | None = None
    ends_program: bool | None = None
    agent_name: str | None = None
    tenant: str = ""

    @classmethod
    def from_headers(
        cls, headers: Mapping[str, str] | RawHeaders, key_name: str | None = None
    ) -> HeaderIdentity:
        """Read a mapping or ASGI's list of byte pairs; raises `IdentityError` naming the header.

        `key_name` names the API key of the request, None on a server without keys.
        """
        found = _known_headers(headers)
        parents = found.get(PARENTS_HEADER)
        return cls(
            program_id=_optional_id(PROGRAM_HEADER, found),
            agent_program_id=_agent_id(found),
            thread_id=_optional_id(THREAD_HEADER, found),
            call_id=_optional_id(CALL_HEADER, found),
            parent_call_ids=None if parents is None else parse_ids(PARENTS_HEADER, parents),
            ends_program=parse_flag(END_HEADER, found[END_HEADER]) if END_HEADER in found else None,
            agent_name=_optional_id(AGENT_NAME_HEADER, found),
            tenant=tenant_of(_optional_id(TENANT_HEADER, found), key_name),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyIdentity:
    """What a request's body says; None where it is silent."""

    program_id: str | None = None
    thread_id: str | None = None
    call_id: str | None = None
    parent_call_ids: tuple[str, ...] | None = None
    ends_program: bool | None = None
    agent_name: str | None = None
    session_id: object = None  # SGLang's own field: checked only when it names the program

    @classmethod
    def from_body(cls, custom_params: object = None, session_id: object = None) -> BodyIdentity:
        """Read the body's `custom_params` and `session_id`; raises `IdentityError`."""
        if custom_params is None:
            return cls(session_id=session_id)
        if not isinstance(custom_params, Mapping):
            raise IdentityError("custom_params", "must be an object")
        found = {
            f"custom_params.{name}": custom_params[name]
            for name in _BODY_FIELDS
            if custom_params.get(name) is not None
        }
        parents = found.get("custom_params.parent_call_ids")
        end = found.get("custom_params.program_end")
        return cls(
            program_id=_optional_id("custom_params.program_id", found),
            thread_id=_optional_id("custom_params.thread_id", found),
            call_id=_optional_id("custom_params.call_id", found),
            parent_call_ids=(
                None if parents is None else parse_ids("custom_params.parent_call_ids", parents)
            ),
            ends_program=None if end is None else parse_flag("custom_params.program_end", end),
            agent_name=_optional_id("custom_params.agent_name", found),
            session_id=session_id,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTag:
    """Everything the scheduler is told about one call. Ids order work; they never change results.

    `program_id` of an `anonymous` call is its request id: a program of its own.
    """

    program_id: str
    call_id: str
    thread_id: str = ""
    parent_call_ids: tuple[str, ...] | None = None  # (): it has none; None: not told
    ends_program: bool = False
    tenant: str = ""
    anonymous: bool = False
    agent_name: str = ""
    now_s: float = 0.0  # the HTTP process's clock

    @classmethod
    def anonymous_call(cls, rid: str, tenant: str = "", now_s: float = 0.0) -> CallTag:
        """A call that names no program, as it arrives from outside HTTP."""
        return cls(program_id=rid, call_id=rid, tenant=tenant, anonymous=True, now_s=now_s)

    @classmethod
    def resolve(
        cls, header: HeaderIdentity, body: BodyIdentity, rid: str, now_s: float = 0.0
    ) -> CallTag:
        """The tag of request `rid` by the order of precedence; raises `IdentityError`."""
        named = header.program_id or body.program_id or header.agent_program_id
        if named is None and body.session_id is not None:
            named = parse_id("session_id", body.session_id)
        return cls(
            program_id=named or rid,
            call_id=header.call_id or body.call_id or rid,
            thread_id=header.thread_id or body.thread_id or "",
            parent_call_ids=(
                body.parent_call_ids if header.parent_call_ids is None else header.parent_call_ids
            ),
            ends_program=_first(header.ends_program, body.ends_program, False),
            tenant=header.tenant,
            anonymous=named is None,
            agent_name=header.agent_name or body.agent_name or "",
            now_s=now_s,
        )

    def to_wire(self) -> dict[str, str | bool | float | None]:
        """A flat dictionary of scalars.

        SGLang's typed decoder (SGLANG_USE_PICKLE_IPC=0) takes nothing deeper here. Parents are
        joined by line breaks, which no id contains.
        """
        parents = self.parent_call_ids
        return {
            "program": self.program_id,
            "thread": self.thread_id,
            "call": self.call_id,
            "parents": None if parents is None else "\n".join(parents),
            "end": self.ends_program,
            "tenant": self.tenant,
            "anonymous": self.anonymous,
            "agent": self.agent_name,
            "now": self.now_s,
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> CallTag:
        """Inverse of `to_wire`."""
        parents = wire["parents"]
        return cls(
            program_id=wire["program"],
            thread_id=wire["thread"],
            call_id=wire["call"],
            parent_call_ids=tuple(parents.split("\n"))
            if parents
            else None
            if parents is None
            else (),
            ends_program=wire["end"],
            tenant=wire["tenant"],
            anonymous=wire["anonymous"],
            agent_name=wire["agent"],
            now_s=wire["now"],
        )


def tenant_of(tenant_id: str | None, key_name: str | None) -> str:
    """The tenant by the rule above; `key_name` is None on a server without API keys."""
    if key_name is None:
        return tenant_id or ""
    return key_name if tenant_id is None else f"{key_name}/{tenant_id}"


def parse_id(field: str, value: object) -> str:
    """`value` if it is a valid id, else `IdentityError` naming `field`."""
    if not isinstance(value, str):
        raise IdentityError(field, f"must be a string, not {type(value).__name__}")
    if not value:
        raise IdentityError(field, f"is empty; an id has 1 to {MAX_ID_CHARACTERS} characters")
    if len(value) > MAX_ID_CHARACTERS:
        raise IdentityError(
            field, f"has {len(value)} characters; an id has 1 to {MAX_ID_CHARACTERS}"
        )
    if not value.isprintable():
        raise IdentityError(field, "has a character that is not printable")
    if value != value.strip():
        raise IdentityError(field, "begins or ends with a space")
    return value


def parse_ids(field: str, value: object) -> tuple[str, ...]:
    """Ids from a comma-separated string or a list, without repetition, in order; maybe none."""
    if isinstance(value, str):
        items: list[Any] = [item.strip(" \t") for item in value.split(",")] if value else []
    elif isinstance(value, list):
        items = value
    else:
        raise IdentityError(field, "must be a list of ids or a comma-separated string")
    if len(items) > MAX_PARENTS:
        raise IdentityError(field, f"has {len(items)} ids; at most {MAX_PARENTS} are allowed")
    return tuple(dict.fromkeys(parse_id(field, item) for item in items))


def parse_flag(field: str, value: object) -> bool:
    """True for 1, true; False for 0, false; else `IdentityError`."""
    flag = _FLAGS.get(str(value).lower())
    if flag is None:
        raise IdentityError(field, f"must be 1, true, 0 or false, not {str(value)[:32]!r}")
    return flag


def _optional_id(field: str, found: Mapping[str, Any]) -> str | None:
    return parse_id(field, found[field]) if field in found else None


def _agent_id(found: Mapping[str, str]) -> str | None:
    """What an agent's own headers say; they need not know our rules, so by them they are silent."""
    for name in AGENT_HEADERS:
        with suppress(IdentityError):
            if name in found:
                return parse_id(name, found[name])
    return None


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _known_headers(headers: Mapping[str, str] | RawHeaders) -> dict[str, str]:
    """The headers we read, by lower-case name; raises `IdentityError` for contradictions."""
    found: dict[str, str] = {}
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    for raw_name, raw_value in pairs:
        name = _text(raw_name).lower()
        if name not in _KNOWN_HEADERS:
            continue
        value = _text(raw_value).strip(" \t")
        if name in found and name == PARENTS_HEADER:
            # A list may be split over several lines.
            value = ",".join(part for part in (found[name], value) if part)
        elif name in _OWN_HEADERS and found.get(name, value) != value:
            raise IdentityError(name, "is given more than once with different values")
        elif name in found:
            continue
        found[name] = value
    return found


def _text(raw: str | bytes) -> str:
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")
