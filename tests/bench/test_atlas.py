"""`bench.atlas`, run small, and the variants that exist there only."""

from __future__ import annotations

import json

import pytest

from autellix_sglang.core.policy import POLICIES, Levels
from autellix_sglang.core.program import Call
from bench import atlas


def table_of(name: str) -> atlas.SimTable:
    variant = atlas.VARIANTS[name]
    return variant.table(POLICIES[variant.policy], Levels(2, 1000.0, 2.0), 0.0, 1.0)


def chains(table: atlas.SimTable) -> list[Call]:
    """A long and a short chain of one program, and a waiting call that follows each."""
    for rid, steps in (("long", 50), ("short", 5)):
        call = table.open_call(rid, program_id="p", parent_call_ids=())
        table.start(call)
        table.charge(call, steps)
        table.finish(call)
    return [
        table.open_call(f"after-{rid}", program_id="p", parent_call_ids=(rid,))
        for rid in ("long", "short")
    ]


@pytest.mark.parametrize(
    ("name", "paths"), [("atlas", [50, 5]), ("atlas-scalar", [55, 55]), ("plas-long", [50, 5])]
)
def test_the_scalar_knows_of_no_parents(name: str, paths: list[float]) -> None:
    """Told of parents, a call stands on its own path; else each continues the longest."""
    assert [call.base_path for call in chains(table_of(name))] == paths


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("plas", ["after-long", "after-short"]),
        ("plas-short", ["after-short", "after-long"]),
        ("plas-long", ["after-long", "after-short"]),
    ],
)
def test_paths_order_the_calls_of_one_program_only(name: str, order: list[str]) -> None:
    """Inside a program the path decides; between programs of one level arrival, as before."""
    table = table_of(name)
    first = table.open_call("first", program_id="a")
    chains(table)
    last = table.open_call("last", program_id="z", parent_call_ids=())
    assert [call.rid for call in table.queue] == [first.rid, *order, last.rid]
    table.check_integrity()


def test_prints_the_promised_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line is one JSON object with every variant of every workload asked for."""
    argv = ["--workloads", "map_reduce", "--minutes", "0.3", "--loads", "1.2"]
    assert atlas.main(argv) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert {"command", "commit", "hardware", "versions", "seconds"} <= result.keys()
    found = result["results"]["map_reduce"]["1.2"]
    assert found.keys() == atlas.VARIANTS.keys()
    means = {name: row["program_response_s"]["mean"] for name, row in found.items()}
    assert len(set(means.values())) >= 3
    assert "as ratios to plas" in out
