"""Linear layers on integers for CPUs with AVX512-VNNI: schemas and shapes; the code is C++ (``kernel.h``).

The recipe is that of the INT8 ops: exact int32 sums of ``q`` and ``weight_q``, times ``scale[m] * weight_scale[n]``.
What differs from a GEMM with an epilogue beside it: the weight is packed once, a float input is quantised on its way
into the GEMM, and everything behind the sum happens while the tile is in cache, so no int32 matrix reaches memory.

An op is there to be called once :func:`ditc.kernels.linear.vnni.vnni_reason` has returned ``None``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import define, register_fake

COLUMNS = 32
"""Columns of a panel of a packed weight."""

_STEP = 16
_TRAILER = COLUMNS * 8
_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_EPILOGUE = "Tensor? bias=None, str activation='none', Tensor? gate=None, Tensor? residual=None"

define("ditc::vnni_pack", "(Tensor weight_q, Tensor weight_scale) -> Tensor", tags=_TAGS)
define(
    "ditc::vnni_linear",
    f"(Tensor x, Tensor? scale, Tensor weight, SymInt N, {_EPILOGUE}, ScalarType out_dtype=float) -> Tensor",
    tags=_TAGS,
)
define(
    "ditc::vnni_norm_linear",
    "(Tensor x, str norm, float eps, Tensor? norm_weight, Tensor? norm_bias, Tensor? multiplier, Tensor? shift, "
    f"Tensor weight, SymInt N, {_EPILOGUE}, ScalarType out_dtype=float) -> Tensor",
    tags=_TAGS,
)
define(
    "ditc::vnni_linear_quantize",
    "(Tensor x, Tensor? scale, Tensor weight, SymInt N, Tensor? bias=None, str activation='none') -> (Tensor, Tensor)",
    tags=_TAGS,
)
define(
    "ditc::vnni_weight_linear",
    "(Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias=None) -> Tensor",
    tags=_TAGS,
)


def pack(weight_q: Tensor, weight_scale: Tensor) -> Tensor:
    """Packs a quantised weight for the other ops.

    Args:
        weight_q: int8 ``[N, K]``.
        weight_scale: float32, ``N`` numbers.

    Returns:
        int8 ``[ceil(N / 32), ceil(K / 16) * 16 * 32 + 256]``: panels of 32 columns with ``k`` in groups of four, each
        followed by its columns' compensations and scales. Only these ops read it.
    """
    packed: Tensor = torch.ops.ditc.vnni_pack(weight_q, weight_scale)
    return packed


def linear(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    N: int,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``activation(x @ w.T + bias) * gate + residual``, rounded once to ``out_dtype``.

    Args:
        x: ``[..., K]``; int8 with its ``scale``, or float32, bfloat16 or float16, then quantised row by row here.
        scale: float32 ``[..., 1]`` for an int8 ``x``, else ``None``.
        weight: from :func:`pack`, of a weight ``[N, K]``.
        N: columns of the result.
        bias: ``[N]``.
        activation: ``none``, ``gelu`` (exact), ``gelu_tanh``, ``silu`` or ``relu``.
        gate: broadcasts against the result: ``[N]``, ``[B, 1, N]``, ``[..., N]``.
        residual: shaped like the result.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., N]``, contiguous.
    """
    y: Tensor = torch.ops.ditc.vnni_linear(x, scale, weight, N, bias, activation, gate, residual, out_dtype)
    return y


def norm_linear(
    x: Tensor,
    norm: str,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    N: int,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`linear` of ``norm(x) * norm_weight + norm_bias) * multiplier + shift``, quantised row by row.

    Args:
        x: float ``[..., K]``.
        norm: ``layer`` or ``rms``, over the last dimension, with ``eps`` in the root.
        norm_weight, norm_bias: ``[K]``.
        multiplier, shift: broadcast against ``x``, as the gate against the result.
        weight, N, bias, activation, gate, residual, out_dtype: as in :func:`linear`.
    """
    front = (x, norm, eps, norm_weight, norm_bias, multiplier, shift)
    y: Tensor = torch.ops.ditc.vnni_norm_linear(*front, weight, N, bias, activation, gate, residual, out_dtype)
    return y


def linear_quantize(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    N: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """:func:`linear` in float32, its rows quantised: int8 ``[..., N]`` and float32 scales ``[..., 1]``."""
    q, own_scale = torch.ops.ditc.vnni_linear_quantize(x, scale, weight, N, bias, activation)
    return q, own_scale


def weight_linear(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x @ weight_q.T) * weight_scale + bias`` for few rows: the weight ``[N, K]``, not packed, is read once.

    ``x`` is a float ``[..., K]``; summed in float32, returned in the type of ``x``.
    """
    y: Tensor = torch.ops.ditc.vnni_weight_linear(x, weight_q, weight_scale, bias)
    return y


def _out(x: Tensor, N: int, weight: Tensor, activation: str, out_dtype: torch.dtype) -> Tensor:
    K = x.shape[-1]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
    if out_dtype not in _FLOATS:
        raise TypeError(f"out_dtype is one of {_FLOATS}, got {out_dtype}")
    panels, width = (N + COLUMNS - 1) // COLUMNS, (K + _STEP - 1) // _STEP * _STEP * COLUMNS + _TRAILER
    if weight.dim() != 2 or weight.shape[0] != panels or weight.shape[1] != width:
        raise ValueError(f"weight is not packed for [{N}, {K}]: it has shape {tuple(weight.shape)}")
    return x.new_empty((*x.shape[:-1], N), dtype=out_dtype)


@register_fake("ditc::vnni_pack")  # type: ignore[untyped-decorator]
def _(weight_q: Tensor, weight_scale: Tensor) -> Tensor:
    N, K = weight_q.shape
    return weight_q.new_empty(((N + COLUMNS - 1) // COLUMNS, (K + _STEP - 1) // _STEP * _STEP * COLUMNS + _TRAILER))


@register_fake("ditc::vnni_linear")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    N: int,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return _out(x, N, weight, activation, out_dtype)


@register_fake("ditc::vnni_norm_linear")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    norm: str,
    eps: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    N: int,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    return _out(x, N, weight, activation, out_dtype)


@register_fake("ditc::vnni_linear_quantize")  # type: ignore[untyped-decorator]
def _(
    x: Tensor, scale: Tensor | None, weight: Tensor, N: int, bias: Tensor | None = None, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    y = _out(x, N, weight, activation, torch.float32)
    return torch.empty_like(y, dtype=torch.int8), y.new_empty((*x.shape[:-1], 1))


@register_fake("ditc::vnni_weight_linear")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))
