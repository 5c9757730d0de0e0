"""SGLang on a plain CPU build of PyTorch: a platform plugin, and a tiny model to serve on it.

SGLang's own CPU platform needs a CPU build of `sgl_kernel` or vLLM. This out-of-tree platform needs
neither. SGLang finds `activate` by the entry point group `sglang.srt.platforms` and calls it in
every process it starts, before anything device-specific is imported.
"""

import os
from pathlib import Path

from autellix_sglang.patches import torchvision_ops

ENV_SWITCH = "AUTELLIX_CPU_PLATFORM"
NVIDIA_CONTROL = Path("/dev/nvidiactl")  # there once the driver is loaded
PLATFORM_CLASS = "autellix_sglang.platform.cpu.PlainCpuPlatform"


def activate() -> str | None:
    """The platform's class path, or None where SGLang should choose for itself.

    None when any accelerator is usable, when AUTELLIX_CPU_PLATFORM=0, when the user has chosen
    SGLang's own CPU engine, and when there is a GPU that PyTorch cannot use, unless
    AUTELLIX_CPU_PLATFORM=1. Otherwise this also puts the torchvision patch in force, because no
    code of ours runs earlier in each process.
    """
    switch = os.environ.get(ENV_SWITCH)
    has_own_engine = os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1"
    if switch == "0" or has_own_engine or has_accelerator():
        return None
    if switch != "1" and has_unusable_gpu():
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


def has_unusable_gpu() -> bool:
    """Whether an NVIDIA GPU is here that this CUDA build of PyTorch fails to use, unasked.

    Its driver is too old, as a rule. A GPU that `CUDA_VISIBLE_DEVICES` hides is none.
    """
    import torch

    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if torch.version.cuda is None or torch.cuda.is_available() or is_hidden:
        return False
    return NVIDIA_CONTROL.exists()
