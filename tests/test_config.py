"""The settings: their checks, their help, and their way to other processes."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest

from autellix_sglang.config import (
    ENV_VAR,
    POLICY_CHOICES,
    ProgramConfig,
    add_arguments,
    flag_of,
    from_arguments,
)
from autellix_sglang.core.kv import KV_CHOICES
from autellix_sglang.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """A parser with nothing but our flags."""
    made = argparse.ArgumentParser(prog="test", allow_abbrev=False)
    add_arguments(made)
    return made


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("policy", "sjf", ", ".join(POLICY_CHOICES)),
        ("levels", 0, "from 1"),
        ("levels", 65, "to 64"),
        ("quantum", -1.0, "from 0 (learn it) to 1e9"),
        ("quantum", float("nan"), "from 0 (learn it) to 1e9"),
        ("quantum", float("inf"), "from 0 (learn it) to 1e9"),
        ("factor", 1.0, "above 1"),
        ("beta", -1.0, "from 0 (off) to 1e9"),
        ("min_run", -0.5, "from 0 to 1e9"),
        ("schedule_interval", 0, "from 1"),
        ("prefill_weight", -0.1, "from 0 (measure) to 1000"),
        ("ttl", 0.0, "above 0"),
        ("infer", 1, "of type bool"),
        ("levels", True, "of type int"),
        ("kv", "copy", ", ".join(KV_CHOICES)),
        ("kv_break_even", -1, "from 0 (measure) to 1e9"),
        ("host_memory", -2.0, "from 0 to 1e9, or -1"),
        ("quantum", 10**400, "from 0 (learn it) to 1e9"),
        ("prefill_weight", 1e308, "from 0 (measure) to 1000"),
        ("schedule_interval", 2**62, "an integer from 1 to 1e9"),
        ("ttl", 1e308, "above 0, at most 1e9"),
    ],
)
def test_bad_value_names_flag_and_allowed_values(field, value, allowed):
    """A value that cannot work is refused with its flag and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        ProgramConfig(**{field: value})
    assert caught.value.field == flag_of(field)
    assert allowed in str(caught.value)


def test_defaults_are_valid_and_on():
    """The defaults pass their own checks and switch program scheduling on."""
    assert ProgramConfig().is_enabled
    assert not ProgramConfig(policy="off").is_enabled


def test_help_shows_every_flag_with_its_default():
    """--help lists one flag per field and reads its default from the dataclass."""
    text = " ".join(parser().format_help().split())
    for f in dataclasses.fields(ProgramConfig):
        assert flag_of(f.name) in text
        assert f"{f.metadata['help']} (default: {f.default})" in text


def test_no_arguments_give_the_defaults():
    """An empty command line is the default configuration."""
    assert from_arguments(parser().parse_args([])) == ProgramConfig()


def test_arguments_set_their_fields():
    """Each flag sets the field of its name, with the field's type."""
    argv = ["--program-policy", "atlas", "--program-levels", "3", "--program-min-run", "2"]
    argv.append("--program-infer")
    expected = ProgramConfig(policy="atlas", levels=3, min_run=2.0, infer=True)
    assert from_arguments(parser().parse_args(argv)) == expected


def test_json_round_trip():
    """A configuration survives its JSON form."""
    config = ProgramConfig(policy="mlfq", quantum=0.1, levels=2)
    assert ProgramConfig.from_json(config.to_json()) == config
    assert ProgramConfig.from_env({ENV_VAR: config.to_json()}) == config


def test_unknown_key_is_an_error():
    """A setting that does not exist is refused by name."""
    values = json.loads(ProgramConfig().to_json()) | {"quantums": 1}
    with pytest.raises(ConfigError, match="quantums"):
        ProgramConfig.from_json(json.dumps(values))


def test_empty_environment_is_off():
    """Without a launcher's settings a process runs stock SGLang."""
    assert ProgramConfig.from_env({}) == ProgramConfig(policy="off")


def test_config_is_frozen():
    """Nobody can change the settings under a running scheduler."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        ProgramConfig().levels = 3
