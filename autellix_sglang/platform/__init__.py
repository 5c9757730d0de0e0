"""SGLang on a plain CPU build of PyTorch: a platform plugin, and a tiny model to serve on it.

SGLang's own CPU platform needs a CPU build of `sgl_kernel` or vLLM. This out-of-tree platform needs
neither. SGLang finds `activate` by the entry point group `sglang.srt.platforms` and calls it in
every process it starts, before anything device-specific is imported.
"""

import os

from autellix_sglang.patches import torchvision_ops

ENV_SWITCH = "AUTELLIX_CPU_PLATFORM"
PLATFORM_CLASS = "autellix_sglang.platform.cpu.PlainCpuPlatform"


def activate() -> str | None:
    """The platform's class path, or None where SGLang should choose for itself.

    None when any accelerator is usable, when AUTELLIX_CPU_PLATFORM=0, and when the user has chosen
    SGLang's own CPU engine. Otherwise this also puts the torchvision patch in force, because no
    code of ours runs earlier in each process.
    """
    is_declined = os.environ.get(ENV_SWITCH, "1") == "0"
    has_own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
    if is_declined or has_own_engine or has_accelerator():
        return None
    torchvision_ops.install()
    return PLATFORM_CLASS


def has_accelerator() -> bool:
    """Whether PyTorch can use any device that SGLang has a platform of its own for."""
    import torch  # here, not above: `tiny_model` shares this package and must import without torch

    # `npu` and `hpu` exist on `torch` only once their own packages are installed.
    names = ("cuda", "xpu", "mps", "npu", "hpu")
    modules = (getattr(torch, name, None) for name in names)
    return any(module is not None and module.is_available() for module in modules)
