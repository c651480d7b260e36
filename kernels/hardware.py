"""What the ops' CUDA implementations choose by: compute capabilities, and the version of Triton."""

from __future__ import annotations

import torch
from torch import Tensor

BLACKWELL, ADA, AMPERE = (10, 0), (8, 9), (8, 0)
"""The least compute capability with block-scaled products, with FP8, and with bfloat16."""

NVFP4_TRITON = (3, 8)
"""The first Triton that compiles native NVFP4."""


def installed_triton() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed; it is imported here.

    Raises:
        ImportError: it is missing.
    """
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def capability(tensor: Tensor) -> tuple[int, int]:
    """The compute capability of the tensor's device; in the interpreter, Hopper's."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)
