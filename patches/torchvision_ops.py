"""Lets `import torchvision` succeed when its compiled operators do not fit a CPU build of PyTorch.

The wheel on PyPI is linked to CUDA PyTorch. On a CPU build its extension fails to load, quietly,
and then `torchvision._meta_registrations` raises `operator torchvision::nms does not exist`: it
registers shapes for operators that nobody declared. Declaring their schemas just before is enough,
as SGLang imports torchvision for its image processors and calls neither operator on text.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODULE = "torchvision._meta_registrations"
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A declaration lives as long as its `torch.library.Library`: held here until the process ends.
_declared: list[Any] = []


class SchemaFinder:
    """A meta-path finder that finds nothing: it acts as `MODULE` is about to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None always, so the ordinary finders go on to load the module."""
        if fullname == MODULE:
            declare_missing_schemas()
        return None


def install() -> None:
    """Watch for torchvision's import; does nothing when it is imported or watched already."""
    if MODULE in sys.modules or any(isinstance(finder, SchemaFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, SchemaFinder())


def declare_missing_schemas() -> None:
    """Declare the operators once, unless torchvision did or PyTorch is built for an accelerator.

    There, a torchvision that does not load is a broken installation, which the user should hear of.
    """
    import torch
    import torchvision.extension

    if _declared or torchvision.extension._has_ops() or not is_cpu_build(torch):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)


def is_cpu_build(torch: ModuleType) -> bool:
    """Whether this PyTorch was built for neither CUDA nor ROCm nor XPU."""
    version = torch.version
    return not any(getattr(version, name, None) for name in ("cuda", "hip", "xpu"))
