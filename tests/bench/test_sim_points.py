"""Measuring an engine for the simulator, tried on a simulated engine of known speed."""

import json
import time

import pytest

from bench.sim_device import PRESETS, attention_pairs, load_device
from bench.sim_points import Prober, errors, measure, medians, report

TRUE = PRESETS["a100-8b"]


def generate(prompts, num_output):
    """What a batch of the true device takes, HTTP included: 3 ms."""
    batch, length = len(prompts), len(prompts[0])
    prefill = TRUE.prefill_time_s(batch * length, batch * attention_pairs(0, length))
    return 0.003 + prefill + TRUE.decode_time_s(batch, batch * (length + 1), num_output - 1)


class BusyEngine:
    """In real time: 1 ms a step; a call of one token costs 1 ms of it, and takes 4 ms outside."""

    def __init__(self):
        self._num_short = 0

    def generate(self, prompts, num_output):
        if num_output == 1:
            time.sleep(0.005)
            self._num_short += 1
            return 0.005
        started, self._num_short = time.perf_counter(), 0
        for _ in range(num_output):
            time.sleep(0.001)
        time.sleep(0.001 * self._num_short)
        return time.perf_counter() - started


def test_the_fit_of_measured_batches_is_the_device_that_was_measured():
    """Decode steps come out within 1 %; a point for every batch that was timed."""
    points = measure(generate, repeats=1, max_batch=12, max_prompt=1024)
    found = points.device("again", TRUE.kv_tokens)

    assert found.decode_time_s(6, 600) == pytest.approx(TRUE.decode_time_s(6, 600), rel=0.01)
    assert len(errors(found, points)) == len(points.decode) + len(points.lone) + 1


def test_a_short_call_costs_a_busy_engine_less_than_its_round_trip():
    """Only the time that the engine works on it is in the way of the calls that decode."""
    generate = BusyEngine().generate
    short = medians([Prober(generate, 4, 64).round() for _ in range(3)]).short

    assert 0.0002 < short.seconds < 0.003 < generate([[0]], 1)


def test_only_batches_that_the_engine_takes_are_tried():
    """A smaller batch or context leaves out the points beyond it."""
    points = measure(generate, repeats=1, max_batch=4, max_prompt=256)

    assert max(point.count for point in points.decode) == 4
    assert max(point.count for point in points.lone) == 256


def test_what_is_written_is_what_the_simulator_reads(tmp_path, capsys):
    """The points make the same device through the file, and the result's line repeats them."""
    points = measure(generate, repeats=1, max_batch=12, max_prompt=1024)
    result = {"name": "x", "kv_tokens": 9, **points.as_json()}
    path = tmp_path / "points.json"
    path.write_text(json.dumps(result))

    assert load_device(path) == points.device("x", 9)
    assert report(result, points, load_device(path), started=0.0) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decode"] == result["decode"]
