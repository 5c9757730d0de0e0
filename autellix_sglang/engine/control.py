"""Control messages, answered in the scheduler process."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from autellix_sglang import messages
from autellix_sglang.core.program import Program, ProgramTable
from autellix_sglang.errors import ConfigError, UnknownProgramError
from autellix_sglang.messages import ProgramControl, ProgramReply

if TYPE_CHECKING:
    from autellix_sglang.engine.scheduler import ProgramScheduler


def handle(scheduler: ProgramScheduler, request: ProgramControl) -> ProgramReply:
    """Carry out one request. Every rank does; only rank 0's answer reaches the HTTP process."""
    table = scheduler.program_table
    table.now_s = max(table.now_s, request.now_s)
    try:
        return ProgramReply(ok=True, body=_body(scheduler, table, request))
    except ConfigError as error:
        return ProgramReply(ok=False, error=error.reason, field=error.field)
    except UnknownProgramError as error:
        return ProgramReply(ok=False, error=str(error))


def _body(
    scheduler: ProgramScheduler, table: ProgramTable, request: ProgramControl
) -> dict[str, Any]:
    match request.op:
        case messages.OPEN:
            table.start_program(request.tenant, request.program_id)
            return {"id": request.program_id}
        case messages.END:
            program = _find(table, request)
            table.end_program(program.tenant, program.program_id)
            return {"id": request.program_id, "state": "ended"}
        case messages.GET:
            program = _find(table, request)
            return {**program.summary(), "calls": [call.summary() for call in program.calls()]}
        case messages.LIST:
            return _page(table, request)
        case messages.TICK:
            table.expire(request.now_s)
            return {"programs": table.num_programs, "ttl_s": table.ttl_s}
        case messages.CALIBRATE:
            if request.prefill_weight is not None:
                scheduler.prefill_weight = request.prefill_weight
            if request.kv_break_even is not None:
                scheduler.swaps.break_even_tokens = request.kv_break_even
            return {
                "prefill_weight": scheduler.prefill_weight,
                "kv_break_even": scheduler.swaps.break_even_tokens,
            }
        case messages.CONFIGURE:
            scheduler.configure(scheduler.program_config.replace(**(request.config or {})))
            return totals(scheduler)
        case messages.STATS:
            return {**totals(scheduler), "ranks": scheduler.rank_states()}
    raise AssertionError(f"unknown control op {request.op!r}")


def _find(table: ProgramTable, request: ProgramControl) -> Program:
    if not request.all_tenants:
        return table.program(request.tenant, request.program_id)
    for program in table.programs():
        if program.program_id == request.program_id:
            return program
    raise UnknownProgramError(request.program_id)


def _page(table: ProgramTable, request: ProgramControl) -> dict[str, Any]:
    """Programs in order of their arrival, after position `after`.

    The position of a program stays valid when it is forgotten between two pages.
    """
    chosen = sorted(
        (
            program
            for program in table.programs()
            if (request.all_tenants or program.tenant == request.tenant)
            and (request.state is None or program.state == request.state)
            and (request.after is None or program.seq > request.after)
        ),
        key=lambda program: program.seq,
    )
    page = chosen[: request.limit]
    return {
        "programs": [program.summary() for program in page],
        "next": page[-1].seq if len(chosen) > len(page) else None,
    }


def totals(scheduler: ProgramScheduler) -> dict[str, Any]:
    """Counters and settings for operators, in JSON types."""
    return {
        **dataclasses.asdict(scheduler.program_config),
        **scheduler.program_table.totals(),
        "running_calls": len(scheduler.running_batch.reqs),
        "kv_total_tokens": scheduler.max_total_num_tokens,
        "kv_available_tokens": scheduler.token_to_kv_pool_allocator.available_size(),
        "kv_evictable_tokens": scheduler.tree_cache.evictable_size(),
        "prefill_weight": scheduler.prefill_weight,
        "recomputed_tokens": scheduler.num_recomputed_tokens,
        "prefix_waits": scheduler.num_prefix_waits,
        "kv_loss_share": round(scheduler.kv_loss.value, 4),
        **scheduler.swaps.totals(),
        "retracted_calls": scheduler.num_retractions,
        "orphaned_calls": scheduler.num_orphans,
        "histories": len(scheduler.history_index or ()),
    }
