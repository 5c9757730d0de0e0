"""A tiny Llama with random weights and a byte-level tokenizer, made on the user's machine.

It is what we serve where no model is given, and what tests and benchmarks run: a real model of a
real architecture whose outputs mean nothing but do depend on every token in the KV cache.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from autellix_sglang.errors import ModelCacheError

# Part of the directory's name: raise it with any change to what is written here.
VERSION = 1
SEED = 20250219
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
BOS_ID, EOS_ID = 256, 257
MAX_POSITIONS = 32768
# The default 0.02 makes a random model repeat itself whatever it has read; 0.08 does not.
WEIGHT_STD = 0.08
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 256 + len(SPECIAL_TOKENS),
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": WEIGHT_STD,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# <|bos|>, then each turn as its role's token, the text and <|eos|>. The dashes keep newlines out.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- elif message['content'] %}
        {%- for part in message['content'] if part['type'] == 'text' %}
            {{- part['text'] }}
        {%- endfor %}
    {%- endif %}
    {{- eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


def ensure_tiny_model(directory: Path | None = None) -> Path:
    """The model's directory, written on first use; `directory` replaces the user's cache.

    Several processes may call this at once: each writes a private directory and the first to rename
    it wins. A directory that exists is complete.
    """
    parent = directory if directory is not None else cache_directory()
    target = parent / f"tiny-llama-{VERSION}"
    if not target.is_dir():
        _write_atomically(target)
    return target


def cache_directory() -> Path:
    """`autellix_sglang` in the user's cache, or in the temporary directory if that is read-only."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(home) / "autellix_sglang"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError):  # read-only, or no home at all
        fallback = Path(tempfile.gettempdir()) / f"autellix_sglang-{os.getuid()}"
        fallback.mkdir(mode=0o700, exist_ok=True)
        found = fallback.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise ModelCacheError(
                f"{fallback} is writable for others; set XDG_CACHE_HOME"
            ) from None
        return fallback


def _write_atomically(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write_tokenizer(draft)
        _write_model(draft)
        draft.chmod(0o755)  # mkdtemp makes it private
        draft.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_model(directory: Path) -> None:
    """config.json, generation_config.json and model.safetensors (float32).

    Written by hand: transformers takes seconds to import, and its versions write different bytes.
    """
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(SEED)
    weights = {
        name: np.ones(shape, np.float32) if len(shape) == 1 else _normal(rng, shape)
        for name, shape in _weight_shapes().items()
    }
    _speak_ascii(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", CONFIG)
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": True}
    _write_json(directory / "generation_config.json", generation)


def _normal(rng: Any, shape: tuple[int, ...]) -> Any:
    return rng.standard_normal(shape, dtype="float32") * WEIGHT_STD


def _speak_ascii(weights: dict[str, Any]) -> None:
    """Make every token but printable ASCII, newline and <|eos|> practically impossible.

    Llama has no output bias, so channel 0 is made one: each embedding writes 0.1 there (large
    enough to survive, small enough to leave the layers alone), no layer touches it, and the
    unwanted rows of the head weigh it down. Random bytes are seldom valid UTF-8, and a detokenizer
    holds text back until they are: streams would stall for no reason of ours.
    """
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0, :] = 0
    weights["model.embed_tokens.weight"][:, 0] = 0.1
    wanted = {*range(0x20, 0x7F), ord("\n"), EOS_ID}
    for token in range(CONFIG["vocab_size"]):
        weights["lm_head.weight"][token, 0] = 0 if token in wanted else -1000


def _weight_shapes() -> dict[str, tuple[int, ...]]:
    """Each parameter of a LlamaForCausalLM by its name; the one-dimensional ones are norms."""
    hidden, inner, vocab = (CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = hidden * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for index in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{k}.weight": shape for k, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: one token per byte, then `SPECIAL_TOKENS`."""
    _byte_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "pad_token": "<|eos|>",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _byte_tokenizer() -> Any:
    """Token i is byte i; text is split nowhere and nothing is merged or added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself if printable, else U+0100 and upwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = (chr(0x100 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(stand_ins) for byte in range(256)]
