"""The platform class: SGLang on the CPU with nothing but PyTorch operators.

SGLang imports this module while `import sglang` runs. Code that wants it earlier must import sglang
first: the other way round SGLang would look for the class in a half-imported module.
"""

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

# KV cache rows when the user sets no size. SGLang would take most of the machine's memory, as on a
# GPU of one's own, and write it once at start: 15 GB and 43 s on a machine with 24 GB.
DEFAULT_KV_TOKENS = 65_536
# SGLang's default of 4096 means a request table of 4096 x context length: 0.5 GB for 32768.
DEFAULT_RUNNING_REQUESTS = 256


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang is untyped
    """A CPU without kernels: every operator takes SGLang's `forward_native` path.

    Start the server with `--device cpu`; nothing else is needed.
    """

    # OOT, not CPU: SGLang reads CPU as "sgl_kernel's CPU build is installed".
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    # Without Triton and graph capture SGLang chooses its torch-native allocators and eager runner.
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what suits a CPU where the user gave nothing; their own flags stay."""
        # SGLang's own CPU rule ran before and put `intel_amx`, which is sgl_kernel's, for nothing.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = self.get_default_attention_backend()
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = DEFAULT_KV_TOKENS
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_RUNNING_REQUESTS
        # Never useful off: an idle scheduler would spin on a core that the work needs.
        server_args.sleep_on_idle = True

    def get_default_attention_backend(self) -> str:
        """The only attention backend that needs nothing but PyTorch."""
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """`eager`: inductor would need a C++ compiler on the user's machine."""
        return "eager"

    def is_pin_memory_available(self, device: object = None) -> bool:
        """False: there is no device to pin host memory for."""
        return False
