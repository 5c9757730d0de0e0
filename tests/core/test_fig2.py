"""The paper's Fig. 2: four programs of short calls on an engine with a batch of two."""

from __future__ import annotations

from typing import Any

import pytest

from autellix_sglang.config import ProgramConfig
from autellix_sglang.testing import FakeEngine, Job

DECODE_STEPS = {"A": (4, 3, 1, 1), "B": (3, 3, 4), "C": (1, 2), "D": (4,)}


def total_waiting(**settings: Any) -> float:
    """Units that calls wait in the queue when every program starts at once."""
    engine = FakeEngine(
        ProgramConfig(beta=0, min_run=0, schedule_interval=1, **settings), num_slots=2
    )
    for program, outputs in DECODE_STEPS.items():
        for i, num_output in enumerate(outputs):
            parents = (f"{program}{i - 1}",) if i else ()
            engine.submit(
                Job(rid=f"{program}{i}", program_id=program, num_output=num_output, parents=parents)
            )
    engine.run()
    assert len(engine.ended) == sum(map(len, DECODE_STEPS.values()))
    return sum(request.call.queue_steps for request in engine.ended.values())


def test_fcfs_waits_18_units() -> None:
    """First come, first served waits the 18 units that the paper gives."""
    assert total_waiting(policy="fcfs") == 18


def test_plas_waits_the_papers_12_units() -> None:
    """PLAS with levels [0, 1), [1, 4) and [4, inf) waits the 12 units that the paper gives."""
    assert total_waiting(policy="plas", levels=3, quantum=1, factor=4) == 12


@pytest.mark.parametrize("policy", ["plas", "atlas"])
def test_two_levels_wait_less_still(policy: str) -> None:
    """On these chains PLAS and ATLAS with levels [0, 2) and [2, inf) both wait 11 units."""
    assert total_waiting(policy=policy, levels=2, quantum=2) == 11


@pytest.mark.parametrize("quantum", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [2, 3, 4, 6])
def test_plas_is_below_fcfs_for_any_small_quantum(quantum: float, levels: int) -> None:
    """The gain over first come, first served does not hang on one choice of constants."""
    assert total_waiting(policy="plas", quantum=quantum, levels=levels) < 18
