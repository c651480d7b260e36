"""Linear layers on quantised operands: schemas, meanings in plain torch, declared tolerances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import format_of
from ..operands import FLOATS, check_float

INT8_MAX_K = (2**31 - 1) // (127 * 127)
"""The longest dot product (133,143) whose sum an int32 holds whatever the integers are."""

TOLERANCE = 1e-6
"""Relative error that an implementation may add in float32: for int8 to the result, whose integer sum is exact; for
the others to the sum of the products' magnitudes, because a float sum has an order."""


def quantized_linear_reference(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """A linear layer on quantised operands, with what follows it in a block: ``residual + gate * (x @ w.T + bias)``.

    Args:
        x: parts of ``[..., K]``.
        weight: parts of ``[N, K]``, of the same format.
        bias: ``[N]`` of any float type, or ``None``.
        gate: of any float type, broadcasting against ``[..., N]`` without widening it, or ``None``.
        residual: ``[..., N]`` of any float type, or ``None``.
        format: the format of both operands.
        out_dtype: float32, bfloat16 or float16.

    Returns:
        ``[..., N]``, contiguous, rounded once. INT8 sums are exact in int32; the others are summed in float64 here,
        of which float32 implementations are within :data:`TOLERANCE` of the terms' magnitudes.

    Raises:
        TypeError: an operand has the wrong type.
        ValueError: shapes disagree, or an INT8 ``K`` is beyond :data:`INT8_MAX_K`.
    """
    check_quantized_linear(x, weight, bias, gate, residual, format, out_dtype)
    if format == "int8":
        # float64 holds every partial sum exactly (below 2**53); int32 then float32 rounds as the hardware does
        accumulator = (x[0].to(torch.float64) @ weight[0].to(torch.float64).t()).to(torch.int32)
        y = accumulator.to(torch.float32) * (x[1] * weight[1].t())
    else:
        found = format_of(format)
        y = found.dequantize(list(x)).double() @ found.dequantize(list(weight)).double().t()
    return epilogue(y, bias, gate, residual, out_dtype).contiguous()


def epilogue(
    y: Tensor, bias: Tensor | None, gate: Tensor | None, residual: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``residual + gate * (y + bias)`` in the type of ``y``, rounded once."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if gate is not None:
        y = y * gate.to(y.dtype)
    if residual is not None:
        y = residual.to(y.dtype) + y
    return y.to(out_dtype)


def check_quantized_linear(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> None:
    """Raises what :func:`quantized_linear_reference` promises for operands that do not fit together."""
    if out_dtype not in FLOATS:
        raise TypeError(f"out_dtype is one of {FLOATS}, got {out_dtype}")
    K, N = check_weight(weight, format), weight[0].shape[0]
    shape = check_parts(x, format, "x")
    if shape[-1] != K:
        raise ValueError(f"x has {shape[-1]} features and the weight {K}")
    if format == "int8" and K > INT8_MAX_K:
        raise ValueError(f"K = {K} is beyond {INT8_MAX_K}: an int32 sum of int8 products could overflow")
    check_bias(bias, N)
    y_shape = (*shape[:-1], N)
    for value, name in ((gate, "gate"), (residual, "residual")):
        if value is not None:
            check_float(value, name)
    if gate is not None and not broadcasts(gate, y_shape):
        raise ValueError(f"a gate of shape {tuple(gate.shape)} does not broadcast to {y_shape}")
    if residual is not None and tuple(residual.shape) != y_shape:
        raise ValueError(f"the residual has shape {tuple(residual.shape)}, expected {y_shape}")


def broadcasts(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``value`` broadcasts to ``shape`` without widening it."""
    return tuple(torch.broadcast_shapes(value.shape, shape)) == shape  # type: ignore[no-untyped-call]


def check_parts(parts: Sequence[Tensor], format: str, name: str) -> tuple[int, ...]:
    """The shape ``[..., K]`` that ``parts`` stand for.

    Raises:
        TypeError: a part has the wrong type.
        ValueError: an unknown format, or parts that do not belong together.
    """
    found = format_of(format)
    if not parts or parts[0].dim() == 0:
        raise ValueError(f"{name} has no parts of format {format!r} with at least one dimension")
    codes = parts[0].shape
    # two 4-bit codes share a byte
    shape = (*codes[:-1], codes[-1] * 2) if found.bits < 8 else tuple(codes)
    wanted = found.part_types(shape)
    if len(parts) != len(wanted):
        raise ValueError(f"{name} has {len(parts)} parts, format {format!r} has {len(wanted)}")
    for part, (part_shape, dtype) in zip(parts, wanted, strict=True):
        if part.dtype != dtype:
            raise TypeError(f"a part of {name} is {part.dtype}; format {format!r} wants {dtype}")
        if tuple(part.shape) != tuple(part_shape):
            raise ValueError(f"a part of {name} has shape {tuple(part.shape)}, expected {tuple(part_shape)}")
    return shape


def check_weight(weight: Sequence[Tensor], format: str) -> int:
    """The ``K`` of a quantised weight ``[N, K]``; raises as :func:`check_parts`, and ValueError for no matrix."""
    shape = check_parts(weight, format, "weight")
    if len(shape) != 2:
        raise ValueError(f"a linear layer's weight has 2 dimensions [N, K], got shape {shape}")
    return shape[1]


def check_bias(bias: Tensor | None, N: int) -> None:
    """Raises unless ``bias`` is ``None`` or a float ``[N]``."""
    if bias is not None:
        check_float(bias, "bias")
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected {(N,)}")


def weight_linear_reference(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    """A linear layer whose weight alone is quantised: ``x @ w.T + bias``.

    For the few rows of a conditioning vector, where reading the weight is the whole cost, and wherever memory is
    short and rounding the activations would gain nothing.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16.
        weight: parts of ``[N, K]``.
        bias: ``[N]`` of any float type, or ``None``.
        format: the weight's format.

    Returns:
        ``[..., N]`` in the type of ``x``, rounded once.

    Raises:
        TypeError: an operand has the wrong type.
        ValueError: shapes disagree.
    """
    check_weight_linear(x, weight, bias, format)
    y = x.double() @ format_of(format).dequantize(list(weight)).double().t()
    return epilogue(y, bias, None, None, x.dtype).contiguous()


def check_weight_linear(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> None:
    """Raises what :func:`weight_linear_reference` promises for operands that do not fit together."""
    check_float(x, "x")
    K = check_weight(weight, format)
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"[..., K] x [N, K] expected, got {tuple(x.shape)} x {(weight[0].shape[0], K)}")
    check_bias(bias, weight[0].shape[0])


quantized_linear = torch.library.custom_op(
    "ditc::quantized_linear",
    quantized_linear_reference,
    mutates_args=(),
    schema="(Tensor[] x, Tensor[] weight, Tensor? bias, Tensor? gate, Tensor? residual, str format, "
    "ScalarType out_dtype) -> Tensor",
)
weight_linear = torch.library.custom_op(
    "ditc::weight_linear",
    weight_linear_reference,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weight, Tensor? bias, str format) -> Tensor",
)


@quantized_linear.register_fake
def _(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    format: str,
    out_dtype: torch.dtype,
) -> Tensor:
    check_quantized_linear(x, weight, bias, gate, residual, format, out_dtype)
    return x[1].new_empty((*x[0].shape[:-1], weight[0].shape[0]), dtype=out_dtype)


@weight_linear.register_fake
def _(x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, format: str) -> Tensor:
    check_weight_linear(x, weight, bias, format)
    return x.new_empty((*x.shape[:-1], weight[0].shape[0]))
