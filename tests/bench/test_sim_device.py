"""Step times: presets against published figures, closed forms against sums, fits against truth."""

import json

import pytest

from bench.sim_device import (
    PRESETS,
    DeviceError,
    Point,
    attention_pairs,
    fit,
    fitted,
    load_device,
    pooled,
)

A100 = PRESETS["a100-8b"]


def test_many_decode_steps_take_the_sum_of_single_ones():
    """The closed form of n steps with a growing context is the sum over the steps."""
    single = [A100.decode_time_s(8, 1000 + 8 * i) for i in range(50)]

    assert A100.decode_time_s(8, 1000, 50) == pytest.approx(sum(single))


@pytest.mark.parametrize("steps", [1, 2, 7, 500])
def test_steps_until_a_moment_is_the_inverse_of_their_time(steps):
    """Exactly at the end of n steps n suffice; an instant later one more is needed."""
    seconds = A100.decode_time_s(32, 40_000, steps)

    assert A100.decode_steps_until(32, 40_000, seconds) == steps
    assert A100.decode_steps_until(32, 40_000, seconds * (1 + 1e-6)) == steps + 1


def test_a_call_alone_on_an_a100_runs_at_the_published_speed():
    """The source's A100 40GB has 1,555 GB/s and decodes 75 tokens/s; ours has 2,039 GB/s."""
    published = 75 * 2039 / 1555

    assert 1 / A100.decode_time_s(1, 1100) == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(
    ("name", "kv_tokens"),
    [("a100-8b", 450_000), ("a100-70b", 490_000), ("h200-8b", 824_000), ("h200-70b", 326_000)],
)
def test_kv_room_is_what_weights_leave_of_the_memory(name, kv_tokens):
    """Memory x 0.88 less two bytes per parameter, over 128 KiB (8B) or 320 KiB (70B) a token."""
    assert PRESETS[name].kv_tokens == pytest.approx(kv_tokens, rel=0.01)


def test_prefill_weight_is_near_what_engines_measure():
    """One prefill token costs about a hundredth of a decode step of one call alone."""
    assert all(0.003 < device.prefill_weight < 0.03 for device in PRESETS.values())


def test_pooled_devices_split_every_batch():
    """Four times the batch takes as long as on one device, and four times as much KV fits."""
    four = pooled(A100, 4)

    assert four.decode_time_s(32, 40_000) == pytest.approx(A100.decode_time_s(8, 10_000))
    assert four.prefill_time_s(8, 36) == pytest.approx(A100.prefill_time_s(8, 36) / 4)
    assert four.kv_tokens == 4 * A100.kv_tokens


def test_attention_pairs_count_every_position_a_token_sees():
    """Three tokens after ten cached ones see 11, 12 and 13 positions."""
    assert attention_pairs(10, 3) == 11 + 12 + 13


def test_a_fit_finds_the_coefficients_that_made_the_points():
    """Noise-free points give back the device they came from."""
    decode = [
        Point(b, kv, A100.decode_time_s(b, kv)) for b in (1, 8, 64) for kv in (100, 9000, 70_000)
    ]
    prefill = [Point(n, 0.0, 0.002 + n * 1e-4) for n in (64, 512, 4096)]
    found = fitted("mine", decode, prefill, kv_tokens=1000)

    assert found.decode_time_s(32, 5000) == pytest.approx(A100.decode_time_s(32, 5000))
    assert found.prefill_time_s(1000, 0.0) == pytest.approx(0.102)


def test_a_fit_never_has_negative_costs():
    """Points that fall with the batch fit a constant, not a reward for more calls."""
    fixed, *others = fit([Point(1, 0, 3.0), Point(2, 0, 2.0), Point(3, 0, 1.0)])

    assert 1.0 < fixed < 3.0 and others == [0.0, 0.0, 0.0]


def test_a_fit_finds_what_is_computed_again_and_what_is_outside():
    """Attention over a cached prefix is told from new tokens', the round trip from the batch.

    A prefill batch takes 2 ms, 0.1 ms a token and 3 us per pair in the cache; 5 ms are outside.
    """
    lone = [
        Point(new, 0.0, 0.007 + new * 1e-4 + cached * 3e-6, cached)
        for new in (16, 256)
        for cached in (0.0, 1000.0, 9000.0)
    ]
    found = fitted("mine", lone, lone, kv_tokens=1000, short=Point(10, 0.0, 0.003))

    assert found.prefill_time_s(100, 0.0, 2000.0) == pytest.approx(0.002 + 0.01 + 0.006)
    assert found.call_s == pytest.approx(0.005)


def test_a_fit_of_too_few_points_is_refused():
    """Two points do not determine three coefficients."""
    with pytest.raises(ValueError, match="three points or more, got 2"):
        fit([Point(1, 0, 3.0), Point(2, 0, 2.0)])


def test_a_device_is_read_from_a_file_of_points(tmp_path):
    """Rows of the file are batches; the fit gives their times back."""
    path = tmp_path / "points.json"
    rows = [[1, 10, 0.002], [4, 100, 0.005], [8, 50, 0.009]]
    path.write_text(json.dumps({"name": "x", "kv_tokens": 9, "decode": rows, "prefill": rows}))
    device = load_device(path)

    assert (device.name, device.kv_tokens) == ("x", 9)
    assert device.decode_time_s(4, 100) == pytest.approx(0.005, rel=0.2)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"decode": [[1]], "prefill": []}'])
def test_a_file_that_is_not_points_is_refused_by_name(tmp_path, text):
    """The error names the file."""
    path = tmp_path / "points.json"
    path.write_text(text)

    with pytest.raises(DeviceError, match=r"points\.json"):
        load_device(path)
