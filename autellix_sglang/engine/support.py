"""SGLang versions and modes that program scheduling cannot honour, or that nobody has tested.

A mode in the table, or another version of SGLang, stops the launch with one line.
`--program-policy off` serves them all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final

from autellix_sglang.errors import ActivationError, UnsupportedModeError

SGLANG_VERSION: Final = "0.5.23"  # as in pyproject.toml; patches/README.md says what relies on it
UNTESTED: Final = "it has not been tested together with preemption"
ONE_SCHEDULER: Final = "each rank would see only its share; start one server per replica"
TWO_ENGINES: Final = "prefill and decode run in two engines, and neither sees all the work"
NO_CACHE: Final = "a preempted call keeps its KV in the radix cache"
NO_HEADERS: Final = "its requests do not pass through the HTTP process, which reads the program ids"


@dataclass(frozen=True, slots=True)
class Conflict:
    """A flag, the values of it that conflict, and why. Reads the resolved server arguments."""

    flag: str
    is_set: Callable[[Any], object]
    why: str


def _given(field: str, why: str) -> Conflict:
    """The flag of this field must be left unset (None or False)."""
    return Conflict("--" + field.replace("_", "-"), lambda args: getattr(args, field), why)


def _above_one(field: str, why: str) -> Conflict:
    return Conflict("--" + field.replace("_", "-"), lambda args: getattr(args, field) > 1, why)


def _other_than(field: str, value: str, why: str) -> Conflict:
    flag = "--" + field.replace("_", "-")
    return Conflict(flag, lambda args: getattr(args, field) != value, why)


CONFLICTS: Final = (
    _other_than("disaggregation_mode", "null", TWO_ENGINES),
    _given("enable_pd_role_switch", TWO_ENGINES),
    _given("encoder_only", "an encoder has no scheduler"),
    _given("language_only", UNTESTED),
    _above_one("pp_size", "several batches are in flight, and calls in them cannot be preempted"),
    _above_one("dp_size", ONE_SCHEDULER),
    _given("enable_dp_attention", ONE_SCHEDULER),
    _given("ep_join_mode", ONE_SCHEDULER),
    _above_one("nnodes", UNTESTED),
    _above_one("attn_cp_size", UNTESTED),
    _above_one("dcp_size", UNTESTED),
    _above_one("tokenizer_worker_num", "idle programs are forgotten by the clock of one process"),
    _given("use_ray", "Ray starts the schedulers, and would start the stock one"),
    _given("grpc_mode", NO_HEADERS),
    _given("smg_grpc_mode", NO_HEADERS),
    _given("grpc_port", NO_HEADERS),
    _given("enable_priority_scheduling", "it orders and preempts calls by its own rules"),
    _other_than("schedule_policy", "fcfs", "--program-policy decides the order of calls"),
    _given("disable_radix_cache", NO_CACHE),
    _given("prefill_only_disable_kv_cache", NO_CACHE),
    _given("is_embedding", "embedding requests do not decode, so there is nothing to schedule"),
    _given("dllm_algorithm", "a diffusion LLM does not decode token by token"),
    _given("speculative_algorithm", UNTESTED),
    _other_than("decoupled_spec_role", "null", UNTESTED),
    _given("enable_pdmux", "prefill and decode run at the same time, on batches of their own"),
    _given("enable_hisparse", UNTESTED),
    _given("enable_hierarchical_cache", UNTESTED),
    _given("enable_lora", UNTESTED),
    _given("lora_paths", UNTESTED),
    _given("enable_lmcache", UNTESTED),
    _given("enable_flexkv", UNTESTED),
    _given("radix_cache_backend", UNTESTED),
    _given("enable_unified_cache_external_linker", UNTESTED),
    _given("enable_session_radix_cache", UNTESTED),
    _given("enable_streaming_session", UNTESTED),
    _given("enable_unified_memory", UNTESTED),
    _given("enable_kv_cache_sharding", UNTESTED),
    _other_than("kv_canary", "none", UNTESTED),
    _given("enable_prefill_delayer", UNTESTED),
    _given("min_free_slots_delay", UNTESTED),
    _given("enable_two_batch_overlap", UNTESTED),
    _given("enable_deterministic_inference", UNTESTED),
)


def check_supported(server_args: Any, environ: Mapping[str, str] = os.environ) -> None:
    """Raise `UnsupportedModeError` for the first conflict; call it before any model is loaded.

    `server_args` may be raw or resolved: what resolution has decided so far counts.
    """
    from sglang.srt.arg_groups.overrides import resolving_view

    check(resolving_view(server_args), environ)


def installed_version() -> str | None:
    """SGLang's version; None where there is none, as with the router's extra alone."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_installed() -> None:
    """Raise `ActivationError` where there is no SGLang."""
    if installed_version() is None:
        raise ActivationError(
            "sglang is not installed: install this package with its extra gpu or cpu"
        )


def check_version(installed: str | None = None) -> None:
    """Raise `ActivationError` unless SGLang is the version whose internals were verified."""
    installed = installed or metadata.version("sglang")
    if installed.partition("+")[0] != SGLANG_VERSION:
        raise ActivationError(
            f"sglang {installed} is installed, and this release relies on internals of"
            f" {SGLANG_VERSION}: pip install sglang=={SGLANG_VERSION}, or --program-policy off"
        )


def check(args: Any, environ: Mapping[str, str]) -> None:
    """`check_supported` for any object with the attributes of SGLang's `ServerArgs`."""
    if environ.get("SGLANG_RUST_SERVER", "").lower() in ("1", "true", "yes", "y", "on"):
        raise _unsupported("SGLANG_RUST_SERVER", NO_HEADERS)
    for conflict in CONFLICTS:
        if conflict.is_set(args):
            raise _unsupported(conflict.flag, conflict.why)


def _unsupported(flag: str, why: str) -> UnsupportedModeError:
    return UnsupportedModeError(
        flag, f"not supported with program scheduling: {why} (--program-policy off serves it)"
    )
