"""INT8 dynamic quantisation: schema, meaning in plain torch, and declared tolerance.

The recipe is symmetric and keeps -127..127: ``scale = amax / 127``, ``q = round(x * (1 / scale))`` with ties to even.
One scale belongs to a token (a row of the input) or to an output channel (a row of the weight), so a linear layer is
``y[m, n] = (sum_k q[m, k] * w[n, k]) * (scale[m] * weight_scale[n]) + bias[n]`` with an exact integer sum.

What is no number stays visible: a row that holds NaN or an infinity has a NaN scale, so its whole row of the output
(or, in a weight, its whole column) is NaN; the integers of such a row are unspecified.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
MAX_K = (2**31 - 1) // (INT8_MAX * INT8_MAX)
"""The longest dot product (133,143) whose sum an int32 holds whatever the integers are."""

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Scales are at least 2**-126, so that a row of zeros divides by no zero and no reciprocal overflows."""

TOLERANCE = 1e-6
"""Relative error that an implementation of ``int8_linear`` may add in float32 to the reference: the integer sum is
exact, what remains is the order in which three factors are multiplied."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The recipe for each row of the last dimension of a float ``x``: int8 like ``x``, float32 scales ``[..., 1]``.

    Plain traceable torch, in the form that inductor fuses into one loop over rows with the values kept in cache.
    """
    values = x.to(torch.float32)
    if x.shape[-1] == 0:
        return torch.empty_like(values, dtype=torch.int8), values.new_full((*x.shape[:-1], 1), SMALLEST_SCALE)
    amax = values.abs().amax(dim=-1, keepdim=True)
    scale = (amax / INT8_MAX).clamp(min=SMALLEST_SCALE)
    # |x| * (1 / scale) exceeds 127 by rounding only, so nothing needs clamping but what is no number anyway
    q = (values * (1.0 / scale)).round().to(torch.int8)
    # inf - inf is NaN: an infinite row gets a NaN scale, a finite one adds zero
    return q, scale + (amax - amax)


def quantize_int8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each token of ``x`` with its own scale.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.

    Returns:
        ``q`` int8 ``[..., K]`` and ``scale`` float32 ``[..., 1]`` with ``x ~= q * scale``; both contiguous.

    Raises:
        TypeError: ``x`` is not one of the three float types.
        ValueError: ``x`` has no dimension.
    """
    _check_float(x, "x")
    if x.dim() == 0:
        raise ValueError("quantize_int8 needs at least one dimension, got a scalar")
    q, scale = quantize_rows(x)
    return q.contiguous(), scale.contiguous()


def quantize_int8_weight_reference(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises each output channel of a linear layer's weight with its own scale.

    Args:
        w: ``[N, K]``, float32, bfloat16 or float16.

    Returns:
        ``q`` int8 ``[N, K]`` contiguous (the integer GEMM reads it as a transposed view, the layout that
        ``torch._int_mm`` wants on CUDA and that costs nothing on CPU) and ``scale`` float32 ``[N]``.

    Raises:
        TypeError: ``w`` is not one of the three float types.
        ValueError: ``w`` is not a matrix.
    """
    _check_float(w, "w")
    if w.dim() != 2:
        raise ValueError(f"a linear layer's weight has 2 dimensions [N, K], got shape {tuple(w.shape)}")
    q, scale = quantize_rows(w)
    return q.contiguous(), scale.squeeze(-1).contiguous()


def int8_linear_reference(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """A linear layer on integers: ``(q @ weight_q.T) * (scale * weight_scale) + bias``, rounded once to ``out_dtype``.

    Args:
        q: int8 ``[..., K]``.
        scale: float32 ``[..., 1]``, the scale of each token.
        weight_q: int8 ``[N, K]``.
        weight_scale: float32 ``[N]``.
        bias: ``[N]`` of any float type, or ``None``.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., N]`` of ``out_dtype``, contiguous.

    Raises:
        TypeError: an operand has the wrong type.
        ValueError: shapes disagree, or ``K`` is beyond ``MAX_K``, where the int32 sum could overflow.
    """
    check_int8_linear(q, scale, weight_q, weight_scale, bias, out_dtype)
    # float64 holds every partial sum exactly (below 2**53), so this is the integer product; int32 then float32
    # rounds as the hardware does
    accumulator = (q.to(torch.float64) @ weight_q.to(torch.float64).t()).to(torch.int32)
    y = accumulator.to(torch.float32) * (scale * weight_scale)
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)


def check_int8_linear(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> None:
    """Raises what :func:`int8_linear_reference` promises for operands that do not fit together."""
    if q.dtype != torch.int8 or weight_q.dtype != torch.int8:
        raise TypeError(f"int8_linear multiplies int8 by int8, got {q.dtype} and {weight_q.dtype}")
    if scale.dtype != torch.float32 or weight_scale.dtype != torch.float32:
        raise TypeError(f"scales are float32, got {scale.dtype} and {weight_scale.dtype}")
    if out_dtype not in _FLOATS:
        raise TypeError(f"out_dtype is one of {_FLOATS}, got {out_dtype}")
    if q.dim() == 0 or weight_q.dim() != 2 or q.shape[-1] != weight_q.shape[1]:
        raise ValueError(f"[..., K] x [N, K] expected, got {tuple(q.shape)} x {tuple(weight_q.shape)}")
    if weight_q.shape[1] > MAX_K:
        raise ValueError(f"K = {weight_q.shape[1]} is beyond {MAX_K}: an int32 sum of int8 products could overflow")
    if tuple(scale.shape) != (*q.shape[:-1], 1):
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {(*q.shape[:-1], 1)}")
    _check_columns(weight_q.shape[0], weight_scale, bias)


def int8_weight_linear_reference(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose weight alone is quantised: ``(x @ weight_q.T) * weight_scale + bias``.

    For the few rows of a conditioning vector, where reading the weight is the whole cost and rounding the vector
    would gain nothing.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        weight_q: int8 ``[N, K]``.
        weight_scale: float32 ``[N]``.
        bias: ``[N]`` of any float type, or ``None``.

    Returns:
        ``[..., N]`` in the type of ``x``; summed in float32, rounded once.

    Raises:
        TypeError: an operand has the wrong type.
        ValueError: shapes disagree.
    """
    check_int8_weight_linear(x, weight_q, weight_scale, bias)
    # float64 gives the sum itself, of which float32 implementations are within TOLERANCE * sqrt(K) of its terms
    y = (x.to(torch.float64) @ weight_q.to(torch.float64).t()) * weight_scale.to(torch.float64)
    if bias is not None:
        y = y + bias.to(torch.float64)
    return y.to(x.dtype)


def check_int8_weight_linear(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    """Raises what :func:`int8_weight_linear_reference` promises for operands that do not fit together."""
    _check_float(x, "x")
    if weight_q.dtype != torch.int8 or weight_scale.dtype != torch.float32:
        raise TypeError(f"an int8 weight with float32 scales is wanted, got {weight_q.dtype}, {weight_scale.dtype}")
    if x.dim() == 0 or weight_q.dim() != 2 or x.shape[-1] != weight_q.shape[1]:
        raise ValueError(f"[..., K] x [N, K] expected, got {tuple(x.shape)} x {tuple(weight_q.shape)}")
    _check_columns(weight_q.shape[0], weight_scale, bias)


def _check_columns(N: int, weight_scale: Tensor, bias: Tensor | None) -> None:
    if tuple(weight_scale.shape) != (N,):
        raise ValueError(f"weight_scale has shape {tuple(weight_scale.shape)}, expected {(N,)}")
    if bias is not None:
        _check_float(bias, "bias")
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(N,)}")


def _check_float(x: Tensor, name: str) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


quantize_int8 = torch.library.custom_op("ditc::quantize_int8", quantize_int8_reference, mutates_args=())
quantize_int8_weight = torch.library.custom_op(
    "ditc::quantize_int8_weight", quantize_int8_weight_reference, mutates_args=()
)
int8_linear = torch.library.custom_op("ditc::int8_linear", int8_linear_reference, mutates_args=())
int8_weight_linear = torch.library.custom_op("ditc::int8_weight_linear", int8_weight_linear_reference, mutates_args=())


@quantize_int8.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_float(x, "x")
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@quantize_int8_weight.register_fake
def _(w: Tensor) -> tuple[Tensor, Tensor]:
    _check_float(w, "w")
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty((w.shape[0],), dtype=torch.float32)


@int8_linear.register_fake
def _(
    q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    check_int8_linear(q, scale, weight_q, weight_scale, bias, out_dtype)
    return scale.new_empty((*q.shape[:-1], weight_q.shape[0]), dtype=out_dtype)


@int8_weight_linear.register_fake
def _(x: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    check_int8_weight_linear(x, weight_q, weight_scale, bias)
    return x.new_empty((*x.shape[:-1], weight_q.shape[0]))
