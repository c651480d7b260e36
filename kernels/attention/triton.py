"""Launching the Triton attention: from the parts of quantised operands to the arguments of the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hardware import capability
from .quantized import check_quantized
from .recipe import KEYS, Recipe, recipe_of
from .triton_kernel import attention_kernel
from .triton_tiles import block_of, tile_for


def attention_triton(
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
    *,
    native: bool = False,
    fp8: str = "cast",
) -> Tensor:
    """As :func:`.quantized.attention_quantized_reference`, on a CUDA device or in Triton's interpreter.

    What no tile looks at has no say: a NaN among the values of a key that causality, a window or blocks hide with its
    whole tile does not reach the result, where the reference multiplies it by zero.

    Args:
        native: multiply NVFP4 by block-scaled products (sm_100, sm_120; Triton 3.8).
        fp8: how FP8 is multiplied and rounded to, see :func:`.triton_weights.fp8_weights`. In the interpreter, whose
            casts are wrong, "cast" becomes "encode".

    Raises:
        TypeError, ValueError: types or shapes do not fit, a head has no features, or there are no keys.
    """
    found = recipe_of(recipe)
    B, H, Lq, DV = check_quantized(q, k, v, found, dtype, bias, mask, causal, blocks, window)
    out = torch.empty((B, Lq, H, DV), dtype=dtype, device=q[0].device)
    if out.numel():
        if fp8 == "cast" and not out.is_cuda:
            fp8 = "encode"
        _launch(q, k, v, found, scale, bias, mask, causal, blocks, window, out, native, fp8)
    return out.transpose(1, 2)


def _launch(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], recipe: Recipe, scale: float,
    bias: Tensor | None, mask: Tensor | None, causal: bool, blocks: Tensor | None, window: int, out: Tensor,
    native: bool, fp8: str,
) -> None:  # fmt: skip
    B, Lq, H, DV = out.shape
    G, Lk = k[0].shape[1:3]
    D = k[0].shape[3] * (2 if recipe.qk == "nvfp4" else 1)
    (queries, q_blocks, q_scale), (keys, k_blocks, k_scale) = (_tokens(part, recipe.qk, fp8) for part in (q, k))
    values, v_blocks, v_scale = _values(v, recipe.pv, fp8)
    seen, mask_strides = _mask(mask, (B, H, Lq, Lk))
    tile = tile_for(recipe.qk, native, D, Lq, capability(out))
    attention_kernel[(-(-Lq // tile.M) * B * H,)](
        queries, keys, values, q_blocks, k_blocks, v_blocks, q_scale, k_scale, v_scale,
        None if bias is None else bias.contiguous(), seen, None if blocks is None else _bytes(blocks).contiguous(), out,
        H, Lq, Lk, *values.stride()[:3], *mask_strides, scale * math.log2(math.e), min(window, Lk),
        GROUP=H // G, QK=recipe.qk, PV=recipe.pv, NATIVE=native, FP8=fp8, D=D, DV=DV, BLOCK_D=block_of(D, native),
        BLOCK_DV=block_of(DV, native), BLOCK_M=tile.M, MASK_ROWS=mask_strides[2] != 0, CAUSAL=causal,
        BANDED=window >= 0, RAGGED=Lk % KEYS != 0, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _tokens(parts: Sequence[Tensor], format: str, fp8: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Codes, NVFP4's block scales as bytes, and one scale for each token, all contiguous."""
    codes, *scales = (part.contiguous() for part in parts)
    blocks = _bytes(scales[0]) if format == "nvfp4" else None
    return _bytes(codes) if fp8 == "decode" and format == "fp8" else codes, blocks, scales[-1]


def _values(parts: Sequence[Tensor], format: str, fp8: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """As :func:`_tokens`, for values along the tokens; float16 ones are read where they lie.

    FP8 rows are padded to a multiple of 16 tokens, without which they could only be read byte by byte.
    """
    if format == "fp8" and parts[0].shape[3] % 16:
        codes = F.pad(_bytes(parts[0]), (0, -parts[0].shape[3] % 16)).view(parts[0].dtype)
        return _tokens([codes, *parts[1:]], format, fp8)
    if format != "fp16":
        return _tokens(parts, format, fp8)
    values, scale = parts
    return values if values.stride(3) == 1 else values.contiguous(), None, scale.contiguous()


def _mask(mask: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[Tensor | None, tuple[int, ...]]:
    """A mask as bytes or floats, and its strides, zero where it is broadcast."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = _bytes(mask) if mask.dtype == torch.bool else mask
    if mask.dtype == torch.float64:
        mask = mask.float()
    # a dimension of one has any stride, and that of keys is to be read as it is
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))
    return mask, (0,) * (4 - mask.dim()) + strides


def _bytes(part: Tensor) -> Tensor:
    return part.view(torch.uint8) if part.dtype in (torch.bool, torch.float8_e4m3fn) else part
