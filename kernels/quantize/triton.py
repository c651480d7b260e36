"""Launching the quantising kernel: from tensors of any strides to the parts of a format.

The arguments are those of the ops in :mod:`ditc.kernels.quantize.op`. Tensors are read where they lie, wherever
their leading dimensions can be walked with two strides (slices along tokens, broadcast modulation, halves of a gated
MLP); others are copied first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import format_of
from ..operands import check_float, check_rows, check_static
from .triton_kernel import quantize_kernel

MAX_K = 32768
"""The longest row that a program keeps in registers. MX formats that follow no norm have no such bound."""

_MX_CHUNK = 4096
_NORMS = ("layer", "rms")
_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "none")


def quantize_triton(x: Tensor, format: str, static: Tensor | None = None) -> list[Tensor]:
    """``ditc::quantize``: the parts of ``x [..., K]``, bit-equal to ``format_of(format).quantize(x)`` on a CPU.

    Raises:
        TypeError: ``x`` is not float32, bfloat16 or float16, or ``static`` is not float32.
        ValueError: an unknown format, a K that it or the kernel does not admit, a static range for an MX format.
    """
    return _launch(x, "none", format, static)


def norm_quantize_triton(
    x: Tensor,
    norm: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    format: str,
    static: Tensor | None = None,
) -> list[Tensor]:
    """``ditc::norm_quantize`` in one kernel: all of it in float32, the input's own type rounds nothing in between.

    Raises:
        TypeError, ValueError: as :func:`quantize_triton`; an unknown norm, a weight or bias that is not ``[K]``, a
            modulation that would widen ``x``.
    """
    if norm not in _NORMS:
        raise ValueError(f"norm is one of {', '.join(_NORMS)}; got {norm!r}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}, expected {tuple(x.shape[-1:])}")
    return _launch(x, norm, format, static, weight, bias, multiplier, shift, eps)


def activation_quantize_triton(
    x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None
) -> list[Tensor]:
    """``ditc::activation_quantize`` in one kernel, all of it in float32.

    Raises:
        TypeError, ValueError: as :func:`quantize_triton`; an unknown activation, a multiplier not shaped like ``x``.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
    if multiplier is not None and multiplier.shape != x.shape:
        raise ValueError(f"the multiplier has shape {tuple(multiplier.shape)}, expected {tuple(x.shape)}")
    return _launch(x, activation, format, static, multiplier=multiplier)


def block_and_warps(K: int, format: str, producer: str) -> tuple[int, int]:
    """How many values of a row a program takes, a power of two, and its warps: 16 values a thread, 32 at most.

    Raises:
        ValueError: the row must stay whole and is longer than ``MAX_K``.
    """
    split = format in ("mxfp8", "mxfp4") and producer not in _NORMS
    if K > MAX_K and not split:
        raise ValueError(f"{format} behind {producer!r} takes rows of at most {MAX_K} values, got K = {K}")
    block = max(32, 1 << (K - 1).bit_length())
    if split:
        block = min(block, _MX_CHUNK)
    return block, min(32, max(1, block // 512))


class _Rows(NamedTuple):
    """A tensor ``[..., K]`` as rows: row r begins at ``(r // inner) * outer + (r % inner) * row`` elements."""

    base: Tensor | None
    inner: int
    outer: int
    row: int
    col: int


def _rows(tensor: Tensor | None, name: str, x: Tensor) -> _Rows:
    """``tensor``, broadcast to the shape of ``x``, as rows; copied if two strides do not reach them all."""
    if tensor is None:
        return _Rows(None, 1, 0, 0, 1)
    check_float(tensor, name)
    try:
        view = tensor.expand(x.shape)
    except RuntimeError as error:
        raise ValueError(f"{name} {tuple(tensor.shape)} does not broadcast against x {tuple(x.shape)}") from error
    *sizes, K = x.shape
    *strides, col = view.stride()
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    # offsets within a row are 32 bits wide in the kernel
    if len(merged) > 2 or K * col >= 2**31:
        return _rows(view.contiguous(), name, x)
    (_, outer), (inner, row) = [(1, 0)] * (2 - len(merged)) + merged
    return _Rows(view, inner, outer, row, 1 if K == 1 else col)


def _launch(
    x: Tensor,
    producer: str,
    format: str,
    static: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 0.0,
) -> list[Tensor]:
    check_rows(x, "x")
    check_static(static)
    found = format_of(format)
    K = x.shape[-1]
    reason = found.unsupported(K)
    if reason is not None:
        raise ValueError(reason)
    if static is not None and format in ("mxfp8", "mxfp4"):
        raise ValueError("an MX format has no scale but its blocks': it takes no static one")
    block, warps = block_and_warps(K, format, producer)
    parts = [x.new_empty(shape, dtype=dtype) for shape, dtype in found.part_types(x.shape)]
    count = x.shape[:-1].numel()
    if count == 0:
        return parts
    q, scale, outer = (*(_bytes(part) for part in parts), None)[:3]
    at, times, plus = (_rows(t, name, x) for t, name in ((x, "x"), (multiplier, "multiplier"), (shift, "shift")))
    vectors = [None if vector is None else vector.contiguous() for vector in (weight, bias)]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        quantize_kernel[(count, max(1, -(-K // block)))](
            at.base, q, scale, outer, static, *vectors, times.base, plus.base,
            *at[1:], *times[1:], *plus[1:], K, eps,
            FORMAT=format, PRODUCER=producer, BLOCK_K=block, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return parts


def _bytes(part: Tensor) -> Tensor:
    """A float8 tensor as bytes, others as they are."""
    return part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
