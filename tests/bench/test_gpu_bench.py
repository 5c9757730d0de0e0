"""The GPU benchmark: planning, the dummy model, and how results are put together."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from bench import gpu, serve, synthetic
from bench.replay import ReplayOptions, replay
from bench.server import STOCK
from bench.sim import Setup, capacity, simulate
from bench.sim_device import PRESETS
from bench.sim_engine import blueprint
from bench.stats import wait_share
from bench.testing import FakeServer
from bench.trace import sample

CPU = gpu.cpu_device()


def test_stock_orders_have_a_server_each_and_ours_share_one():
    """Servers run one after the other; ours come last, on a server whose policy is switched."""
    assert gpu.stages(("off", "lpm", "plas", "hrrn", "mlfq")) == [
        ("off",),
        ("lpm",),
        ("hrrn",),
        ("plas", "mlfq"),
    ]
    assert gpu.stages(("lpm",)) == [("lpm",)]


def test_all_runs_fit_the_minutes():
    """Starts, calibration, and every run with its drain at the largest load are within them."""
    options = gpu.GpuOptions()

    window = gpu.window_s(options, spent_s=200.0, starts_s=270.0)

    num_runs = len(options.policies) * len(options.loads)
    run_s = window * max(options.loads) * (1 + gpu.DRAIN_SHARE)
    total_s = 200 + 270 + num_runs * run_s
    assert total_s == pytest.approx(60 * options.minutes)
    assert window > 10


def test_too_little_time_is_an_error_that_says_what_to_change():
    """A benchmark that could not measure anything is not started."""
    with pytest.raises(ValueError, match="give more --minutes"):
        gpu.window_s(gpu.GpuOptions(minutes=1.0), 10.0, 50.0)


@pytest.mark.parametrize("preset", ["a100-8b", "h200-8b"])
def test_the_default_has_a_queue_and_fits_its_minutes(preset, monkeypatch):
    """On a simulated GPU stock order waits above capacity, and all runs end in what is left."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "ensure_dummy_8b", lambda: "unused")
    options, device = gpu.GpuOptions(), gpu.cuda_device()
    common = gpu.serve_options(options, device)
    candidates = serve.sample_workload(
        serve.load_corpora(common), common, serve.Limits(device.slots, gpu.CONTEXT_TOKENS)
    )
    plans = [blueprint(program) for program in candidates.programs]
    setup = Setup(device=PRESETS[preset], num_slots=device.slots, gap_scale=0.0)
    tokens = sum(program.output_tokens for program in candidates.programs) / len(plans)
    spent_s, starts_s = device.start_s + options.calibration_s, 3 * device.start_s

    window = gpu.window_s(options, spent_s, starts_s)
    full = capacity(setup, plans) * tokens
    plan = gpu.make_plan(candidates, full, options.loads, window, common)

    total_s = spent_s + starts_s
    for load in options.loads:
        arrivals = plan.arrivals[load]
        run = simulate(setup, setup.scheduling("fcfs"), plans[: len(arrivals)], arrivals)
        end_s = max(program.arrival_s + program.response_s for program in run.programs)
        total_s += len(options.policies) * end_s
        assert wait_share(run) > (0.3 if load > 1 else 0.1 if load == 1 else 0.03)
    assert total_s < 60 * options.minutes


def test_the_default_compares_stock_orders_and_ours_at_three_loads():
    """What is promised is the default: three loads, below capacity and above it."""
    options, places = gpu.parse_options([])

    assert set(STOCK) == {"off", "lpm", "hrrn"}
    assert set(STOCK) < set(options.policies) and "plas" in options.policies
    assert len(options.loads) == 3 and options.minutes < 20
    assert min(options.loads) < 1 < max(options.loads)
    assert places.json.parent.name == "results"


def test_quick_changes_defaults_and_writes_no_result_to_keep():
    """A preset yields to what is given, and its numbers stay out of bench/results."""
    options, places = gpu.parse_options(["--quick", "--loads", "1.5,0.5", "--device", "cpu"])

    assert (options.minutes, options.loads) == (gpu.QUICK["minutes"], (0.5, 1.5))
    assert places.json.parent.name == "out"


@pytest.mark.parametrize("line", ["--loads 0,1", "--policies off,off", "--device tpu"])
def test_options_that_make_no_sense_end_with_a_message(line, capsys):
    """A wrong value is refused before any server is started."""
    with pytest.raises(SystemExit):
        gpu.parse_options(line.split())

    assert line.split()[0] in capsys.readouterr().err


def test_higher_loads_take_the_same_programs_faster_and_more_of_them():
    """Programs at a load are a beginning of those at a higher one; rates follow capacity."""
    candidates = sample(synthetic.corpora("react", 40, 0), 40, 0, factor=0.1)
    options = gpu.serve_options(gpu.GpuOptions(device="cpu"), CPU)

    plan = gpu.make_plan(candidates, 100.0, (0.5, 2.0), 20.0, options)

    low, high = plan.mixes[0.5].programs, plan.mixes[2.0].programs
    assert low == high[: len(low)] and len(low) < len(high)
    assert plan.offered[2.0].rate == pytest.approx(4 * plan.offered[0.5].rate)
    assert len(plan.arrivals[2.0]) == len(high)
    tokens = sum(p.output_tokens for p in candidates.programs) / 40
    assert plan.offered[0.5].rate * tokens == pytest.approx(0.5 * 100.0)


def test_the_dummy_model_is_a_configuration_and_a_byte_level_tokenizer(tmp_path):
    """8B shapes without a weight: grouped-query heads that divide, ids inside the vocabulary."""
    directory = gpu.ensure_dummy_8b(tmp_path)

    config = json.loads((directory / "config.json").read_text())
    assert {path.name for path in directory.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["eos_token_id"] < config["vocab_size"]
    assert gpu.ensure_dummy_8b(tmp_path) == directory


async def _runs(policies, mix, **server):
    runs = {}
    for policy in policies:
        async with FakeServer(token_s=0.0005, **server).listen() as url:
            count = len(mix.programs)
            runs[policy] = [
                await replay(policy, mix.programs, [0.0] * count, ReplayOptions(base_url=url))
            ]
    return runs


async def test_results_of_all_loads_make_one_object_and_one_page():
    """Each load holds what `bench.serve` prints, policies in the order asked for; nothing lost."""
    options = gpu.GpuOptions(device="cpu", policies=("off", "hrrn", "plas"), loads=(0.5, 1.0))
    common = gpu.serve_options(options, CPU)
    candidates = sample(synthetic.corpora("react", 4, 0), 4, 0, factor=0.05, max_calls=3)
    plan = gpu.make_plan(candidates, 100.0, options.loads, 1.0, common)
    runs = {
        load: await _runs(("plas", "off", "hrrn"), plan.mixes[load], slots=4)
        for load in options.loads
    }

    result = json.loads(json.dumps(gpu.make_result(options, plan, runs)))
    html = gpu.render(result, runs)

    assert list(result["loads"]) == ["0.5", "1"]
    assert [e["policy"] for e in result["loads"]["1"]["results"]] == ["off", "hrrn", "plas"]
    assert (result["lost"], result["baseline"]) == (0, "off")
    assert ["At load 1 calls" in caveat for caveat in result["caveats"]] == [True]
    assert "though they should" in html
    assert len(serve.result_table(result["loads"]["1"]).splitlines()) == 7
    body = html[html.index("<main>") : html.index("</body>")]
    ElementTree.fromstring(body)
    assert 'id="load-0.5"' in html and "hrrn" in html


async def test_what_a_failed_server_leaves_is_a_result():
    """Servers that ran before one that failed are reported, and what is missing is named."""
    options = gpu.GpuOptions(device="cpu", policies=("plas", "off"), loads=(1.0,))
    common = gpu.serve_options(options, CPU)
    candidates = sample(synthetic.corpora("react", 4, 0), 4, 0, factor=0.05, max_calls=1)
    plan = gpu.make_plan(candidates, 100.0, options.loads, 1.0, common)

    result = gpu.make_result(options, plan, {1.0: await _runs(("off",), plan.mixes[1.0])})

    assert (result["missing"], result["baseline"]) == (["plas"], "off")
    assert result["loads"]["1"]["baseline"] == "off"
    assert [entry["policy"] for entry in result["loads"]["1"]["results"]] == ["off"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    """Nothing is started where there is no GPU, and the message names the way out."""
    assert gpu.main([]) == 1
    assert "no CUDA device; --device cpu" in capsys.readouterr().err


async def test_a_lost_call_is_counted():
    """Every call that got no full answer is in `lost`, whatever the policy."""
    options = gpu.GpuOptions(device="cpu", policies=("off",), loads=(1.0,))
    common = gpu.serve_options(options, CPU)
    candidates = sample(synthetic.corpora("react", 4, 0), 4, 0, factor=0.05, max_calls=1)
    plan = gpu.make_plan(candidates, 100.0, options.loads, 1.0, common)
    runs = {1.0: await _runs(("off",), plan.mixes[1.0], fail=lambda call: 500)}

    assert gpu.make_result(options, plan, runs)["lost"] == len(plan.mixes[1.0].programs)
