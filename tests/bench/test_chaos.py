"""`bench.chaos`, as far as it needs no engine."""

from __future__ import annotations

import json

import pytest

from bench import chaos


def test_prompts_are_the_same_for_a_seed_and_share_beginnings() -> None:
    """A third continues one of four beginnings, so that calls share rows."""
    prompts = chaos.prompts(3)
    assert prompts == chaos.prompts(3) != chaos.prompts(4)
    beginnings = [prompt.input_ids[:120] for prompt in prompts]
    assert len(set(beginnings)) < len(prompts)


def test_without_a_model_it_ends_in_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A few simulated seconds of random events on SGLang's own cache."""
    assert chaos.main(["--no-model", "--minutes", "0.05"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["steps"], result["host_pool_used_bytes"]) == (120, 0)
    assert result["preempted"] > 0
