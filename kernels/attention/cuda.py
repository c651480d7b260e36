"""Quantised attention on CUDA: which implementation runs where. Importing this module registers it.

Triton is imported when a call needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..hardware import ADA, AMPERE, BLACKWELL, NVFP4_TRITON, installed_triton
from .quantized import attention_quantized, attention_quantized_reference
from .recipe import recipe_of

Implementation = Literal["native", "triton", "decoded", "reference"]


def implementation(
    recipe: str, capability: tuple[int, int], triton_version: tuple[int, int] = NVFP4_TRITON
) -> Implementation:
    """How attention in ``recipe`` runs on a device of ``capability``.

    =========  ================  =============  ============  =========
    recipe     sm_100 and later  sm_89, sm_90   sm_80, sm_86  before
    =========  ================  =============  ============  =========
    int8_fp16  triton            triton         triton        reference
    int8_fp8   triton            triton         decoded       reference
    fp8        triton            triton         decoded       reference
    nvfp4      native (1)        triton         triton        reference
    =========  ================  =============  ============  =========

    - ``native``: Triton, both products block-scaled ones of the tensor cores. (1) From Triton 3.8 on, else ``triton``.
    - ``triton``: Triton; INT8 and FP8 are multiplied as they are, NVFP4 is decoded to float16 tile by tile. It saves
      memory there, not time: scores are as exact as the format, products as fast as float16's.
    - ``decoded``: Triton, FP8 decoded to float16 in the same way.
    - ``reference``: torch's operators, where the hardware has no such numbers. Right and slow.

    Raises:
        ValueError: an unknown recipe.
    """
    found = recipe_of(recipe)
    if capability < AMPERE:
        return "reference"
    if found.qk == "nvfp4":
        return "native" if capability >= BLACKWELL and triton_version >= NVFP4_TRITON else "triton"
    return "decoded" if capability < ADA and "fp8" in (found.qk, found.pv) else "triton"


@attention_quantized.register_kernel("cuda")
def attention_quantized_cuda(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    recipe: str,
    scale: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    blocks: Tensor | None = None,
    window: int = -1,
) -> Tensor:
    """``ditc::attention_quantized`` by the :func:`implementation` for the device.

    Raises:
        ImportError: Triton is wanted and missing.
    """
    capability = torch.cuda.get_device_capability(q[0].device)
    version = installed_triton() if recipe == "nvfp4" and capability >= BLACKWELL else NVFP4_TRITON
    chosen = implementation(recipe, capability, version)
    arguments = (q, k, v, recipe, scale, dtype, bias, mask, causal, blocks, window)
    if chosen == "reference":
        return attention_quantized_reference(*arguments)
    from .triton import attention_triton

    with torch.cuda.device(q[0].device):  # Triton launches on the current one
        # NVFP4's weights have scales in E4M3: before sm_89 those too are rounded without it
        fp8 = "cast" if capability >= ADA else "decode"
        return attention_triton(*arguments, native=chosen == "native", fp8=fp8)
