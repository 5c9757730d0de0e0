"""Measuring an engine for the simulator, tried on a simulated engine of known speed."""

import json

import pytest

from bench.sim_device import PRESETS, attention_pairs, fitted, load_device
from bench.sim_points import as_rows, errors, measure, report

TRUE = PRESETS["a100-8b"]


def generate(prompts, num_output):
    """What a batch of the true device takes, HTTP included: 3 ms."""
    batch, length = len(prompts), len(prompts[0])
    prefill = TRUE.prefill_time_s(batch * length, batch * attention_pairs(0, length))
    return 0.003 + prefill + TRUE.decode_time_s(batch, batch * (length + 1), num_output - 1)


def test_the_fit_of_measured_batches_is_the_device_that_was_measured():
    """Decode steps come out within 1 %; prefill batches with what a request costs on top."""
    decode, prefill = measure(generate, repeats=1, max_batch=12, max_prompt=1024)
    found = fitted("again", decode, prefill, TRUE.kv_tokens)

    assert found.decode_time_s(6, 600) == pytest.approx(TRUE.decode_time_s(6, 600), rel=0.01)
    assert len(errors(found, decode, prefill)) == len(decode) + len(prefill)


def test_only_batches_that_the_engine_takes_are_tried():
    """A smaller batch or context leaves out the points beyond it."""
    decode, prefill = measure(generate, repeats=1, max_batch=4, max_prompt=256)

    assert max(point.count for point in decode) == 4
    assert max(point.count for point in prefill) == 256


def test_what_is_written_is_what_the_simulator_reads(tmp_path, capsys):
    """The points make the same device through the file, and the result's line repeats them."""
    decode, prefill = measure(generate, repeats=1, max_batch=12, max_prompt=1024)
    points = {"name": "x", "kv_tokens": 9, "decode": as_rows(decode), "prefill": as_rows(prefill)}
    path = tmp_path / "points.json"
    path.write_text(json.dumps(points))

    assert load_device(path) == fitted("x", decode, prefill, 9)
    assert report(points, load_device(path), started=0.0) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decode"] == points["decode"]
