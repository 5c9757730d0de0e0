"""The command line: whose flag is whose, and what stops a launch before a model is loaded."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import socket
from types import SimpleNamespace

import pytest

from autellix_sglang import __version__, launch
from autellix_sglang.config import ENV_VAR, ProgramConfig, from_arguments
from autellix_sglang.engine import plugin, support
from autellix_sglang.errors import ActivationError, ConfigError, UnsupportedModeError

SUPPORTED = {
    "disaggregation_mode": "null",
    "schedule_policy": "fcfs",
    "decoupled_spec_role": "null",
    "kv_canary": "none",
    "pp_size": 1,
    "dp_size": 1,
    "nnodes": 1,
    "attn_cp_size": 1,
    "dcp_size": 1,
    "tokenizer_worker_num": 1,
}
UNSUPPORTED = {
    "--disaggregation-mode": {"disaggregation_mode": "decode"},
    "--enable-pd-role-switch": {"enable_pd_role_switch": True},
    "--encoder-only": {"encoder_only": True},
    "--language-only": {"language_only": True},
    "--pp-size": {"pp_size": 2},
    "--dp-size": {"dp_size": 2},
    "--enable-dp-attention": {"enable_dp_attention": True},
    "--ep-join-mode": {"ep_join_mode": "scale"},
    "--nnodes": {"nnodes": 2},
    "--attn-cp-size": {"attn_cp_size": 2},
    "--dcp-size": {"dcp_size": 2},
    "--tokenizer-worker-num": {"tokenizer_worker_num": 2},
    "--use-ray": {"use_ray": True},
    "--grpc-mode": {"grpc_mode": True},
    "--smg-grpc-mode": {"smg_grpc_mode": True},
    "--grpc-port": {"grpc_port": 50051},
    "--enable-priority-scheduling": {"enable_priority_scheduling": True},
    "--schedule-policy": {"schedule_policy": "lpm"},
    "--disable-radix-cache": {"disable_radix_cache": True},
    "--prefill-only-disable-kv-cache": {"prefill_only_disable_kv_cache": True},
    "--is-embedding": {"is_embedding": True},
    "--dllm-algorithm": {"dllm_algorithm": "LowConfidence"},
    "--speculative-algorithm": {"speculative_algorithm": "EAGLE"},
    "--decoupled-spec-role": {"decoupled_spec_role": "drafter"},
    "--enable-pdmux": {"enable_pdmux": True},
    "--enable-hisparse": {"enable_hisparse": True},
    "--enable-hierarchical-cache": {"enable_hierarchical_cache": True},
    "--enable-lora": {"enable_lora": True},
    "--lora-paths": {"lora_paths": ["a=b"]},
    "--enable-lmcache": {"enable_lmcache": True},
    "--enable-flexkv": {"enable_flexkv": True},
    "--radix-cache-backend": {"radix_cache_backend": "mine"},
    "--enable-unified-cache-external-linker": {"enable_unified_cache_external_linker": True},
    "--enable-session-radix-cache": {"enable_session_radix_cache": True},
    "--enable-streaming-session": {"enable_streaming_session": True},
    "--enable-unified-memory": {"enable_unified_memory": True},
    "--enable-kv-cache-sharding": {"enable_kv_cache_sharding": True},
    "--kv-canary": {"kv_canary": "log"},
    "--enable-prefill-delayer": {"enable_prefill_delayer": True},
    "--min-free-slots-delay": {"min_free_slots_delay": 4},
    "--enable-two-batch-overlap": {"enable_two_batch_overlap": True},
    "--enable-deterministic-inference": {"enable_deterministic_inference": True},
}


class Arguments(SimpleNamespace):
    """Server arguments that are fine but for what a test sets; None where not named."""

    def __init__(self, **changes):
        super().__init__(**{**SUPPORTED, **changes})

    def __getattr__(self, name):
        return None


# -- arguments -----------------------------------------------------------------------------------


def test_our_flags_are_taken_and_others_left():
    """Our flags configure us; everything else goes to SGLang in order and untouched."""
    argv = ["--tp", "2", "--program-policy", "atlas", "--enable-metrics", "--program-ttl=9"]
    namespace, rest = launch.parse(argv)
    assert from_arguments(namespace) == ProgramConfig(policy="atlas", ttl=9.0)
    assert rest == ["--tp", "2", "--enable-metrics"]


def test_abbreviations_are_not_ours():
    """A prefix of one of our flags is left for SGLang to judge."""
    assert launch.parse(["--program-pol", "atlas"])[1] == ["--program-pol", "atlas"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--program-policy", "sjf"], "argument --program-policy: invalid choice: 'sjf'"),
        (["--program-quantum", "x"], "argument --program-quantum: invalid float value: 'x'"),
        (["--program-factor", "1"], "--program-factor: 1.0 is not allowed; it must be above 1"),
        (["--replicas", "-1"], "--replicas: -1 is not allowed; it must be above 0"),
    ],
)
def test_errors_are_one_line_and_status_2(argv, expected, capsys, monkeypatch):
    """A wrong value ends in status 2 and one line that names the flag."""
    monkeypatch.setattr(launch, "serve", lambda *_: pytest.fail("served"))
    try:
        status = launch.main(argv)
    except SystemExit as stop:  # argparse ends the process by itself
        status = stop.code
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"autellix_sglang: error: {expected}")


def test_help_says_that_sglang_flags_are_accepted(capsys):
    """--help shows our flags, their defaults, and where SGLang's are."""
    with pytest.raises(SystemExit):
        launch.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "All flags of `sglang serve` are accepted" in text
    assert "--help-sglang" in text
    assert f"(default: {ProgramConfig().policy})" in text


def test_given_flags_see_both_spellings_and_the_config_file(tmp_path):
    """A flag counts as given by `--flag value`, by `--flag=value` and in the --config file."""
    path = tmp_path / "server.yaml"
    path.write_text("model-path: /models/m\nattention_backend: triton\n")
    argv = ["--dtype=float16", "--device", "cpu", "--config", str(path)]
    expected = {"--dtype", "--device", "--config", "--model-path", "--attention-backend"}
    assert launch.given_flags(argv) == expected


def test_missing_config_file_is_named():
    """A --config file that cannot be read is an error that names it."""
    with pytest.raises(ConfigError, match=r"--config: .*nowhere.yaml"):
        launch.given_flags(["--config", "/nowhere.yaml"])


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    """The built-in model's place, without writing the model."""
    from autellix_sglang.platform import tiny_model

    monkeypatch.setattr(tiny_model, "ensure_tiny_model", lambda: tmp_path)
    return str(tmp_path)


def pretend_accelerator(monkeypatch, is_there: bool) -> None:
    from autellix_sglang import platform

    monkeypatch.setattr(platform, "has_accelerator", lambda: is_there)


def test_bare_command_line_serves_the_tiny_model(tiny_model, monkeypatch, caplog):
    """Without a model the built-in one is served, in float32, and the log says so."""
    pretend_accelerator(monkeypatch, False)
    with caplog.at_level(logging.INFO):
        flags = launch._default_flags(frozenset())
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    assert (settings["--model-path"], settings["--dtype"]) == (tiny_model, "float32")
    assert (settings["--device"], settings["--attention-backend"]) == ("cpu", "torch_native")
    assert "built-in tiny model" in caplog.messages[0]


def test_on_a_gpu_the_tiny_model_has_a_type_that_its_kernels_take(tiny_model, monkeypatch):
    """Attention kernels of GPUs refuse float32; everything else is left to SGLang."""
    pretend_accelerator(monkeypatch, True)
    flags = launch._default_flags(frozenset())
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    assert settings["--dtype"] == "bfloat16"
    assert settings.keys() == {"--model-path", "--dtype", "--served-model-name"}
    assert not launch._default_flags(frozenset({"--model-path"})), "a user's model is left alone"


def test_a_gpu_that_cannot_be_used_is_said_before_anything_starts(monkeypatch, capsys):
    """One line names the flag that serves on the CPU all the same."""
    monkeypatch.setattr(launch.platform, "has_unusable_gpu", lambda: True)
    assert launch.main(["--model-path", "/nowhere"]) == 2
    assert "--device: PyTorch cannot use this machine's NVIDIA GPU" in capsys.readouterr().err


def test_given_flags_are_not_overridden(tiny_model, monkeypatch):
    """Defaults fill in what the user left out and nothing else."""
    pretend_accelerator(monkeypatch, False)
    given = frozenset({"--dtype", "--attention-backend"})
    flags = launch._default_flags(given)
    assert given.isdisjoint(flags)
    assert {"--model-path", "--device"} <= set(flags)


@pytest.mark.parametrize("flag", launch.MODEL_FLAGS)
def test_given_model_on_an_accelerator_needs_no_defaults(flag, monkeypatch):
    """With a model and an accelerator the command line is SGLang's own."""
    pretend_accelerator(monkeypatch, True)
    assert launch._default_flags(frozenset({flag})) == []


def test_port_in_use_is_found_at_once():
    """A taken port stops the launch before a model is loaded; a free one is left free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {port} on 127.0.0.1 is in use"):
            launch.check_port("127.0.0.1", port)
    launch.check_port("127.0.0.1", port)
    launch.check_port("127.0.0.1", port)


# -- modes ---------------------------------------------------------------------------------------


def test_every_conflict_is_tested():
    """The list of unsupported modes here is the list in the package."""
    assert list(UNSUPPORTED) == [conflict.flag for conflict in support.CONFLICTS]


@pytest.mark.parametrize("flag", UNSUPPORTED)
def test_unsupported_mode_stops_the_launch(flag):
    """A mode that we cannot honour is refused by its flag, with the reason and the way out."""
    with pytest.raises(UnsupportedModeError) as caught:
        support.check(Arguments(**UNSUPPORTED[flag]), {})
    assert caught.value.field == flag
    assert "--program-policy off" in str(caught.value)


def test_rust_server_stops_the_launch():
    """The Rust server, an environment variable, is refused too."""
    with pytest.raises(UnsupportedModeError, match="SGLANG_RUST_SERVER"):
        support.check(Arguments(), {"SGLANG_RUST_SERVER": "1"})


def test_supported_modes_pass():
    """Tensor parallelism and everything else that is not in the table goes on."""
    support.check(Arguments(tp_size=8, enable_mixed_chunk=True), {})


def test_table_names_real_fields():
    """Each entry of the table reads fields that SGLang's server arguments have."""
    server_args = pytest.importorskip("sglang.srt.server_args")
    fields = {f for changes in UNSUPPORTED.values() for f in changes}
    assert fields <= set(server_args.ServerArgs.__struct_fields__)
    support.check_supported(server_args.ServerArgs(model_path="none"), {})


# -- plugin --------------------------------------------------------------------------------------


def test_plugin_is_off_by_default():
    """Without our variables in the environment the plugin leaves SGLang alone."""
    assert plugin.config_from_environ({"PATH": "/bin"}) == ProgramConfig(policy="off")
    environ = {"AUTELLIX_PROGRAM_POLICY": "", "AUTELLIX_PROGRAM_TTL": "5"}
    assert plugin.config_from_environ(environ).policy == "off"


def test_plugin_short_form():
    """AUTELLIX_PROGRAM_POLICY switches it on, and a variable per field sets the rest."""
    environ = {
        "AUTELLIX_PROGRAM_POLICY": "mlfq",
        "AUTELLIX_PROGRAM_MIN_RUN": "3",
        "AUTELLIX_PROGRAM_INFER": "1",
    }
    expected = ProgramConfig(policy="mlfq", min_run=3.0, infer=True)
    assert plugin.config_from_environ(environ) == expected


def test_launcher_settings_win_over_the_short_form():
    """What `launch` left in the environment is what its children read."""
    environ = {ENV_VAR: ProgramConfig(ttl=7.0).to_json(), "AUTELLIX_PROGRAM_POLICY": "off"}
    assert plugin.config_from_environ(environ) == ProgramConfig(ttl=7.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AUTELLIX_PROGRAM_POLICY", "sjf"),
        ("AUTELLIX_PROGRAM_LEVELS", "many"),
        ("AUTELLIX_PROGRAM_LEVELS", "99"),
        ("AUTELLIX_PROGRAM_LEVLES", "3"),
    ],
)
def test_bad_environment_ends_the_process(name, value, monkeypatch, capsys):
    """A wrong setting ends the process with one line: SGLang would go on without us."""
    monkeypatch.delenv(ENV_VAR, raising=False)
    monkeypatch.setenv("AUTELLIX_PROGRAM_POLICY", "plas")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        plugin.register()
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert error.startswith(f"autellix_sglang: error: {name}: ")


def test_settings_without_a_policy_are_an_error():
    """Who sets a quantum wants a policy; its misspelt name must not leave SGLang as it was."""
    with pytest.raises(ConfigError, match=r"AUTELLIX_PROGRAM_POLICY: is not set, and .*QUANTUM is"):
        plugin.config_from_environ({"AUTELLIX_PROGRAM_QUANTUM": "64"})


def test_a_port_in_use_is_told_apart_from_wrong_arguments(monkeypatch, capsys):
    """A fleet starts such a replica again, on another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(launch, "serve", lambda *_: launch.check_port("127.0.0.1", port))
        assert launch.main([]) == os.EX_TEMPFAIL
    assert f"--port: {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match="--port"):
            launch.check_port("127.0.0.1", port)


def test_without_sglang_help_and_version_work_and_serving_says_what_is_missing(monkeypatch, capsys):
    """The router's extra brings the command, and no engine."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert launch.main([]) == 2
    assert "sglang is not installed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        launch.main(["--version"])
    assert stop.value.code == 0
    assert "sglang is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "infos",
    [
        [],
        [{"status": "ready"}],
        [{"program_scheduler": {"version": __version__, "policy": "plas"}}, {}],
        [{"program_scheduler": {"version": "0.0.0", "policy": "plas"}}],
        [{"program_scheduler": {"version": __version__, "policy": "fcfs"}}],
    ],
)
def test_any_scheduler_that_is_not_ours_stops_the_server(infos, monkeypatch):
    """Serving needs the handshake of every rank, in our version and with our policy."""
    monkeypatch.setenv(ENV_VAR, ProgramConfig(policy="plas").to_json())
    with pytest.raises(ActivationError, match="a scheduler process came up as"):
        plugin.check_activation(None, infos)


def test_unknown_hook_target_is_an_error():
    """If SGLang has no such function any more, activation fails instead of passing in silence."""
    pytest.importorskip("sglang")
    with pytest.raises(AttributeError, match="not_there"):
        plugin._apply({"sglang.srt.plugins.not_there": lambda original: original()})


def test_host_memory_is_settled_before_the_ranks_start():
    """Each rank would find another amount available; what the user gave stays."""
    assert 0 < plugin.with_host_memory(ProgramConfig()).host_memory <= 32
    assert plugin.with_host_memory(ProgramConfig(host_memory=0.0)).host_memory == 0


@pytest.mark.parametrize("given", [[], ["--program-host-memory", "3"]], ids=["default", "given"])
def test_replicas_divide_the_host_memory(given, monkeypatch):
    """By default each gets its part of the share; a size the user gave is each replica's."""
    pytest.importorskip("zmq")
    from autellix_sglang.router import fleet

    served = []
    monkeypatch.setattr(fleet, "serve", lambda *args: served.append(args) or 0)
    argv = ["--replicas", "4", *given]
    namespace, sglang_argv = launch.parse(argv)
    assert launch.serve_replicas(namespace, sglang_argv, argv) == 0
    values = launch.parse(served[0][2])[0].program_host_memory
    whole = plugin.with_host_memory(ProgramConfig()).host_memory
    assert values == (3.0 if given else pytest.approx(whole / 4, rel=0.5))


def test_a_fleet_heeds_the_config_file(tmp_path, monkeypatch):
    """Port, admin key and GPUs per replica are for the fleet to know, wherever they are written."""
    from autellix_sglang.router import fleet

    path = tmp_path / "server.yaml"
    path.write_text("port: 21555\ntp-size: 2\nadmin_api_key: secret\n")
    found = {}
    monkeypatch.setattr(
        fleet, "_run", lambda config, commands: found.update(config=config, all=commands) or 0
    )
    assert launch.main(["--replicas", "2", f"--config={path}", "--host", "::1"]) == 0
    config = found["config"]
    assert (config.host, config.port, config.admin_key) == ("::1", 21555, "secret")
    gpus = [command[command.index("--base-gpu-id") + 1] for command in found["all"]]
    assert gpus == ["0", "2"]
    assert all(command[command.index("--config") + 1] == str(path) for command in found["all"])


def test_a_config_file_is_read_in_either_spelling(tmp_path):
    """SGLang passes over --config=FILE: the tiny model would be served in place of the user's."""
    path = tmp_path / "server.yaml"
    path.write_text("model-path: /my/model\n")
    for argv in ([f"--config={path}"], ["--config", str(path)]):
        assert "--model-path" in launch.given_flags(launch._with_config_apart(argv))


def test_a_config_file_that_holds_no_mapping_is_an_error(tmp_path, capsys):
    """One line names the flag and the file."""
    path = tmp_path / "server.yaml"
    path.write_text("- a\n- b\n")
    assert launch.main(["--config", str(path)]) == 2
    assert f"--config: {path} holds no mapping" in capsys.readouterr().err
