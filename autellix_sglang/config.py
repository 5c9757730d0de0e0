"""Every setting of the program scheduler, each default written once, here.

The command line (`launch.py`), `--help` and the docs read fields, types and texts from
`ProgramConfig`. The object is frozen, made of plain numbers and strings, and travels to SGLang's
processes as JSON in one environment variable.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from autellix_sglang.core.kv import KV_CHOICES
from autellix_sglang.core.policy import POLICIES
from autellix_sglang.errors import ConfigError
from autellix_sglang.identity import parse_flag

ENV_VAR: Final = "AUTELLIX_SGLANG_CONFIG"
OFF: Final = "off"
MAX_SETTING: Final = 10**9  # of most, in any unit; a clock of floats far beyond stands still
MAX_PREFILL_WEIGHT: Final = 1000
POLICY_CHOICES: Final = (OFF, *POLICIES)


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramConfig:
    """Settings of the program scheduler; `--program-X` on the command line sets field `X`.

    Services and waits are in steps: one generated token is 1 step, one uncached prefill token
    is `prefill_weight` steps. The defaults of `levels` to `schedule_interval` are those of a sweep
    (docs/defaults.md); docs/policies.md says why `policy` is what it is.
    """

    policy: str = _setting("gittins", "order of calls; 'off' is stock SGLang, untouched")
    levels: int = _setting(8, "number of priority levels, the last one open-ended")
    quantum: float = _setting(32.0, "service in steps that ends level 0; 0 learns it from traffic")
    factor: float = _setting(2.0, "ratio between the ends of successive levels")
    beta: float = _setting(
        8.0, "promote a program stalled for beta times its service; 0 switches promotion off"
    )
    min_run: float = _setting(
        64.0,
        "steps a call runs before it may be preempted again, more where it would have to be "
        "computed again; 0 for no such rule",
    )
    schedule_interval: int = _setting(8, "consider preemption at most every this many steps")
    prefill_weight: float = _setting(
        0.0, "steps that one uncached prefill token costs; 0 measures it at start"
    )
    prefix_wait: int = _setting(
        64,
        "least prompt tokens that a call waits for, where another is computing them at the moment, "
        "rather than compute them again; 0 never waits",
    )
    kv: str = _setting(
        "keep",
        "KV cache of preempted calls: keep (evictable), backup (keep, and copy to host memory), "
        "swap to host memory, drop, or auto (keep or backup, by cost); mixed is for tests",
    )
    kv_break_even: int = _setting(
        0, "tokens from which 'auto' makes a backup; 0 measures where that pays at start"
    )
    host_memory: float = _setting(
        -1.0,
        "GiB of host memory for swapped KV, all ranks together; -1 takes a quarter of what is "
        "available, at most 32; 0 none",
    )
    ttl: float = _setting(600.0, "seconds after its last call when a program is forgotten")
    infer: bool = _setting(
        False, "join a call that names no program to the one whose tokens it continues"
    )

    def __post_init__(self) -> None:
        """Raise `ConfigError` for the first field whose value cannot work."""
        for f in dataclasses.fields(self):
            _require_type(self, f)
        if self.policy not in POLICY_CHOICES:
            raise ConfigError(
                "--program-policy", f"{self.policy!r} is not one of {', '.join(POLICY_CHOICES)}"
            )
        if self.kv not in KV_CHOICES:
            raise ConfigError("--program-kv", f"{self.kv!r} is not one of {', '.join(KV_CHOICES)}")
        _require(self, "levels", 1 <= self.levels <= 64, "an integer from 1 to 64")
        _require(self, "quantum", 0 <= self.quantum <= MAX_SETTING, "from 0 (learn it) to 1e9")
        _require(self, "factor", 1 < self.factor <= 1000, "above 1, at most 1000")
        _require(self, "beta", 0 <= self.beta <= MAX_SETTING, "from 0 (off) to 1e9")
        _require(self, "min_run", 0 <= self.min_run <= MAX_SETTING, "from 0 to 1e9")
        _require(
            self,
            "schedule_interval",
            1 <= self.schedule_interval <= MAX_SETTING,
            "an integer from 1 to 1e9",
        )
        _require(
            self,
            "prefill_weight",
            0 <= self.prefill_weight <= MAX_PREFILL_WEIGHT,
            f"from 0 (measure) to {MAX_PREFILL_WEIGHT}",
        )
        _require(self, "prefix_wait", 0 <= self.prefix_wait <= MAX_SETTING, "from 0 (never) to 1e9")
        _require(
            self, "kv_break_even", 0 <= self.kv_break_even <= MAX_SETTING, "from 0 (measure) to 1e9"
        )
        _require(
            self,
            "host_memory",
            0 <= self.host_memory <= MAX_SETTING or self.host_memory == -1,
            "from 0 to 1e9, or -1 (a share of what is available)",
        )
        _require(self, "ttl", 0 < self.ttl <= MAX_SETTING, "above 0, at most 1e9")

    @property
    def is_enabled(self) -> bool:
        return self.policy != OFF

    def replace(self, **changes: Any) -> ProgramConfig:
        """A copy with some fields changed; raises `ConfigError` for unknown names or bad values."""
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise ConfigError(name, f"unknown setting; there are {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ProgramConfig:
        """Inverse of `to_json`; raises `ConfigError` for unknown names or bad values."""
        return cls().replace(**json.loads(text))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> ProgramConfig:
        """The settings a launcher left for this process; policy `off` where there are none."""
        text = environ.get(ENV_VAR)
        return cls.from_json(text) if text else cls(policy=OFF)


def _require_type(config: ProgramConfig, f: dataclasses.Field[Any]) -> None:
    value, wanted = getattr(config, f.name), type(f.default)
    allowed = (int, float) if wanted is float else (wanted,)
    if isinstance(value, bool) != (wanted is bool) or not isinstance(value, allowed):
        raise ConfigError(flag_of(f.name), f"{value!r} is not of type {wanted.__name__}")


def _require(config: ProgramConfig, name: str, is_ok: bool, allowed: str) -> None:
    value = getattr(config, name)
    if not is_ok or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(flag_of(name), f"{value!r} is not allowed; it must be {allowed}")


def parse_setting(name: str, text: str) -> Any:
    """The value of a field, written as text; raises `ValueError` for what is not of its type."""
    default: Any = ProgramConfig.__dataclass_fields__[name].default
    if isinstance(default, bool):
        return parse_flag(flag_of(name), text)
    return type(default)(text)


def flag_of(name: str) -> str:
    return "--program-" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one `--program-*` flag per field of `ProgramConfig`, defaults read from it."""
    group = parser.add_argument_group("program scheduling")
    choices = {"policy": POLICY_CHOICES, "kv": KV_CHOICES}
    for f in dataclasses.fields(ProgramConfig):
        text = f"{f.metadata['help']} (default: {f.default})"
        if isinstance(f.default, bool):
            group.add_argument(flag_of(f.name), action="store_true", help=text)
            continue
        group.add_argument(
            flag_of(f.name),
            type=type(f.default),
            default=f.default,
            choices=choices.get(f.name),
            metavar=None if f.name in choices else "N",
            help=text,
        )


def from_arguments(namespace: argparse.Namespace) -> ProgramConfig:
    """Read back what `add_arguments` defined; raises `ConfigError`."""
    names = [f.name for f in dataclasses.fields(ProgramConfig)]
    return ProgramConfig(**{name: getattr(namespace, "program_" + name) for name in names})
