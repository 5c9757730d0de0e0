"""The CPU platform plugin, the tiny model, and the torchvision patch."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from autellix_sglang import platform
from autellix_sglang.patches import torchvision_ops
from autellix_sglang.platform import tiny_model
from autellix_sglang.platform.tiny_model import ensure_tiny_model

has_sglang = importlib.util.find_spec("sglang") is not None
needs_sglang = pytest.mark.skipif(not has_sglang, reason="SGLang is not installed")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, where nothing is imported yet."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_model(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer(model_path):
    """What SGLang loads: transformers' tokenizer of the model's directory."""
    pytest.importorskip("transformers")
    torchvision_ops.install()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path)


# The tiny model


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_model_has_the_same_bytes_wherever_it_is_made(model_path, tmp_path):
    """Two machines with the same version of this package serve the same weights."""
    assert contents(model_path) == contents(ensure_tiny_model(tmp_path))


def test_model_is_written_once(tmp_path):
    """A second call leaves the directory alone and returns the same path."""
    first = ensure_tiny_model(tmp_path)
    written = first.stat().st_mtime_ns

    assert (ensure_tiny_model(tmp_path), first.stat().st_mtime_ns) == (first, written)


def test_processes_that_race_share_one_complete_model(tmp_path):
    """Of several processes that write at once one wins, all return it, no draft stays behind."""
    code = (
        "import pathlib, sys; from autellix_sglang.platform.tiny_model import ensure_tiny_model\n"
        "print(ensure_tiny_model(pathlib.Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    returned = {racer.communicate(timeout=60)[0].strip() for racer in racers}

    assert [racer.returncode for racer in racers] == [0] * 4
    assert returned == {str(path) for path in tmp_path.iterdir()}


def test_model_goes_to_the_users_cache(tmp_path, monkeypatch):
    """Without a directory it is written under XDG_CACHE_HOME."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert ensure_tiny_model().parent == tmp_path / "autellix_sglang"


def test_model_goes_to_a_temporary_directory_if_the_cache_cannot_be_written(tmp_path, monkeypatch):
    """A read-only home is no reason not to start."""
    (tmp_path / "file").touch()  # no directory can be made below it, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))

    assert ensure_tiny_model().is_relative_to(tmp_path)


def test_model_is_written_without_torch(tmp_path):
    """Neither import nor generation needs torch, so a launcher can call it before anything else."""
    code = f"""
import pathlib, sys
sys.modules["torch"] = sys.modules["transformers"] = None
from autellix_sglang.platform.tiny_model import ensure_tiny_model
ensure_tiny_model(pathlib.Path({str(tmp_path)!r}))"""

    assert run_python(code).stderr == ""


def test_weights_are_those_the_configuration_asks_for(model_path):
    """The file holds each parameter of the architecture in its shape, and the config agrees."""
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = safetensors.load_file(model_path / "model.safetensors")
    config = json.loads((model_path / "config.json").read_text())

    assert {name: w.shape for name, w in weights.items()} == tiny_model._weight_shapes()
    assert config == tiny_model.CONFIG


@pytest.mark.parametrize(
    "text", ["", " ", "plain", "two  spaces\n\tand tabs", "žluťoučký kůň", "日本語 🙂‍↔️", "\x00\x7f"]
)
def test_tokenizer_returns_the_text_it_was_given(tokenizer, text):
    """Any text survives encoding and decoding, one token for each of its bytes."""
    ids = tokenizer.encode(text)

    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_tokenizer_knows_its_special_tokens(tokenizer):
    """Each special token is one id after the bytes, and can be left out of the text."""
    ids = tokenizer.encode("".join(tiny_model.SPECIAL_TOKENS))

    assert ids == list(range(256, 256 + len(tiny_model.SPECIAL_TOKENS)))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_chat_template_marks_each_turn(tokenizer):
    """A conversation becomes its turns in order, and the assistant's token asks for an answer."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "2"},
    ]

    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|bos|><|system|>Be brief.<|eos|><|user|>1+1?<|eos|><|assistant|><|eos|><|tool|>2<|eos|>"
        "<|assistant|>"
    )


def test_output_depends_on_every_token_of_the_prompt(model_path):
    """Greedy text changes with the prompt's first byte, is ASCII, and does not fall into a loop."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torchvision_ops.install()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path)
    prompts = torch.tensor([list(b"What is 1+1?"), list(b"That is 1+1?")])
    with torch.no_grad():
        one, other = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[:, prompts.shape[1] :].tolist()

    assert one != other
    assert all(token < 0x80 or token == tiny_model.EOS_ID for token in (*one, *other))
    assert len(set(zip(one, one[1:], one[2:], strict=False))) > 50


# The plugin


@pytest.fixture
def plain_cpu(monkeypatch):
    """A machine without accelerators, whatever this one has; the patch stays out of it."""
    torch = pytest.importorskip("torch")
    for name in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)
    monkeypatch.setattr(torchvision_ops, "install", lambda: None)
    monkeypatch.delenv(platform.ENV_SWITCH, raising=False)
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    return torch


def test_plugin_serves_a_machine_without_accelerators(plain_cpu):
    """On a plain CPU the plugin names its platform."""
    assert platform.activate() == platform.PLATFORM_CLASS


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_plugin_steps_aside_for_an_accelerator(plain_cpu, monkeypatch, name):
    """With any accelerator in working order SGLang chooses its platform itself."""
    monkeypatch.setattr(getattr(plain_cpu, name), "is_available", lambda: True)

    assert platform.activate() is None


@pytest.mark.parametrize(
    ("variable", "value"), [("AUTELLIX_CPU_PLATFORM", "0"), ("SGLANG_USE_CPU_ENGINE", "1")]
)
def test_plugin_steps_aside_when_told(plain_cpu, monkeypatch, variable, value):
    """Our switch turns the plugin off, and so does SGLang's switch for its own CPU engine."""
    monkeypatch.setenv(variable, value)

    assert platform.activate() is None


@pytest.fixture
def old_driver(plain_cpu, monkeypatch, tmp_path):
    """A CUDA build of PyTorch beside a GPU whose driver it cannot use."""
    control = tmp_path / "nvidiactl"
    control.touch()
    monkeypatch.setattr(platform, "NVIDIA_CONTROL", control)
    monkeypatch.setattr(plain_cpu.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "is_served"),
    [
        ("AUTELLIX_CPU_PLATFORM", None, False),
        ("AUTELLIX_CPU_PLATFORM", "1", True),
        ("CUDA_VISIBLE_DEVICES", "", True),
        ("CUDA_VISIBLE_DEVICES", "-1", True),
        ("CUDA_VISIBLE_DEVICES", "0", False),
    ],
)
def test_a_gpu_that_cannot_be_used_is_not_taken_for_a_cpu(
    old_driver, monkeypatch, variable, value, is_served
):
    """A model meant for a GPU does not crawl on the CPU, unless somebody asked for that."""
    if value is not None:
        monkeypatch.setenv(variable, value)

    assert (platform.activate() is not None) == is_served


def test_a_cpu_build_has_no_unusable_gpu(old_driver, monkeypatch, plain_cpu):
    """Who installed a CPU build of PyTorch beside a GPU wants the CPU."""
    monkeypatch.setattr(plain_cpu.version, "cuda", None)

    assert not platform.has_unusable_gpu()


@needs_sglang
def test_sglang_finds_the_plugin_by_its_entry_point(plain_cpu):
    """SGLang's discovery, with nothing of ours imported before, yields our platform on a CPU."""
    if platform.has_accelerator():
        pytest.skip("this machine has an accelerator")
    found = run_python(
        "from sglang.srt.platforms import current_platform as p\n"
        "print(type(p).__name__, p.is_out_of_tree(), p.get_default_attention_backend())"
    )

    assert found.stdout.split() == ["PlainCpuPlatform", "True", "torch_native"], found.stderr


class Arguments:
    """The fields of SGLang's ServerArgs that the platform looks at, as when no flag is given."""

    attention_backend: str | None = "intel_amx"
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    mem_fraction_static: float | None = None
    sleep_on_idle = False


@needs_sglang
def test_platform_fills_in_what_the_user_left_open():
    """Without flags it gets PyTorch's attention, a modest KV cache and a sleeping idle loop."""
    import sglang  # noqa: F401 - before cpu, see there

    from autellix_sglang.platform import cpu

    args = Arguments()
    cpu.PlainCpuPlatform().apply_server_args_defaults(args)

    assert vars(args) == {
        "attention_backend": "torch_native",
        "max_total_tokens": cpu.DEFAULT_KV_TOKENS,
        "max_running_requests": cpu.DEFAULT_RUNNING_REQUESTS,
        "sleep_on_idle": True,
    }


@needs_sglang
def test_platform_keeps_the_users_own_flags():
    """What the user set stays, and a memory fraction rules out a size of our own."""
    import sglang  # noqa: F401 - before cpu, see there

    from autellix_sglang.platform.cpu import PlainCpuPlatform

    args = Arguments()
    args.attention_backend = "flex_attention"
    args.mem_fraction_static = 0.5
    args.max_running_requests = 7
    PlainCpuPlatform().apply_server_args_defaults(args)

    assert (args.attention_backend, args.max_total_tokens) == ("flex_attention", None)
    assert args.max_running_requests == 7


# The torchvision patch


@pytest.fixture
def cpu_torchvision():
    """A CPU build of torch with torchvision beside it: the one case that the patch is for."""
    torch = pytest.importorskip("torch")
    if not torchvision_ops.is_cpu_build(torch):
        pytest.skip("PyTorch is built for an accelerator")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")


def test_torchvision_still_needs_the_patch(cpu_torchvision):
    """Without the patch torchvision cannot be imported; when it can, remove the patch."""
    assert "operator torchvision::nms does not exist" in run_python("import torchvision").stderr


def test_patch_lets_torchvision_be_imported(cpu_torchvision):
    """With the patch installed, twice even, torchvision imports and its transforms work."""
    code = """
from autellix_sglang.patches import torchvision_ops
torchvision_ops.install(), torchvision_ops.install()
import torch, torchvision
print(torchvision.transforms.functional.resize(torch.ones(3, 4, 4), [2, 2]).shape)"""
    done = run_python(code)

    assert done.stdout.strip() == "torch.Size([3, 2, 2])", done.stderr


def test_patch_finds_nothing_and_leaves_other_imports_alone(monkeypatch):
    """The finder answers None to every import, and acts on the one module only."""
    acted = []
    monkeypatch.setattr(torchvision_ops, "declare_missing_schemas", lambda: acted.append(True))
    finder = torchvision_ops.SchemaFinder()

    assert finder.find_spec("torchvision") is None
    assert acted == []
    assert finder.find_spec(torchvision_ops.MODULE) is None
    assert acted == [True]


def test_patch_is_installed_once(monkeypatch):
    """Installing it again adds no second finder."""
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, torchvision_ops.MODULE, raising=False)
    torchvision_ops.install()
    torchvision_ops.install()

    assert [type(finder) for finder in sys.meta_path] == [torchvision_ops.SchemaFinder]
