"""Messages between the HTTP process and the scheduler process, and nothing else.

Array-like tagged structs, because SGLang's own socket decoder is a union of such; fields are
only ever appended. `msgspec` is the only import.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ProgramControl(
    msgspec.Struct, frozen=True, tag="autellix.ProgramControl", array_like=True, kw_only=True
):
    """A request to every scheduler rank; each field that is None asks for nothing.

    `now_s` is the HTTP process's clock (seconds): ranks forget idle programs by this value and
    never by a clock of their own, so that all of them decide alike.
    """

    op: str  # one of OPS
    now_s: float
    tenant: str = ""
    program_id: str = ""
    state: str | None = None
    limit: int = 100
    after: int | None = None
    prefill_weight: float | None = None
    all_tenants: bool = False
    config: dict[str, Any] | None = None
    kv_break_even: int | None = None


class ProgramReply(
    msgspec.Struct, frozen=True, tag="autellix.ProgramReply", array_like=True, kw_only=True
):
    """The answer of one scheduler (rank 0) to a `ProgramControl`."""

    ok: bool
    error: str = ""
    body: dict[str, Any] = {}
    field: str | None = None  # the setting that was refused; None: there is no such program


OPEN = "open"  # start a session: body {"id"}
END = "end"  # end it: body {"id"}
GET = "get"  # one program with its calls: body as GET /v1/programs/{id}
LIST = "list"  # programs: body {"programs": [...], "next": position | None}
TICK = "tick"  # forget idle programs; body {"programs": how many are left, "ttl_s": the TTL}
STATS = "stats"  # totals of the scheduler: body of counters
CALIBRATE = "calibrate"  # set prefill_weight and kv_break_even on every rank: body of both
CONFIGURE = "configure"  # change settings of the running scheduler: body as STATS
OPS = (OPEN, END, GET, LIST, TICK, STATS, CALIBRATE, CONFIGURE)

MESSAGES = (ProgramControl, ProgramReply)
