"""A linear layer whose weight is held as the parts of a quantised tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc.kernels.quantize  # noqa: F401  (registers ditc::dequantize)
from ditc.kernels.formats import format_of

PARTS = ("weight_q", "weight_scale", "weight_outer")
"""Names of the buffers that hold a weight's parts, in the order of its format."""

_FIXED = (*PARTS, "input_scale")


class QuantizedLinear(nn.Module):
    """``y = x' W^T + bias + (x' A^T) B^T`` with ``x' = x * pre_quant_scale`` and ``W`` made from its parts.

    A captured graph shows a plain linear layer behind ``ditc.dequantize``, which the compiler's quantising pass takes
    for a weight that is packed already. Run as it is, the layer decodes its weight at every call: right, but slow.

    Attributes:
        format: a name in :data:`ditc.kernels.formats.FORMATS`.
        weight_q, weight_scale, weight_outer: the parts of a weight ``[N, K]``; ``weight_outer`` where the format has
            a third part. They keep their types when the module is cast.
        bias: ``[N]`` or ``None``.
        pre_quant_scale: ``[K]``, what the input is multiplied by before anything else, or ``None``.
        input_scale: float32 ``()``, the activation's scale from a calibration (its outer scale for NVFP4), or
            ``None``; the compiler may use it, this module does not.
        lora_a, lora_b: a branch of low rank ``[r, K]`` and ``[N, r]`` beside the weight, or ``None``.
    """

    bias: nn.Parameter | None
    weight_q: Tensor
    weight_scale: Tensor
    weight_outer: Tensor | None
    pre_quant_scale: Tensor | None
    input_scale: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None

    def __init__(
        self,
        parts: Sequence[Tensor],
        format: str,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        pre_quant_scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
    ) -> None:
        """
        Args:
            parts: the parts of the weight, as ``format`` defines them.
            format: a name in :data:`ditc.kernels.formats.FORMATS`.
            bias, pre_quant_scale, input_scale, lora_a, lora_b: see the attributes.
            dtype: what :attr:`weight` decodes to, the type that the layer's plain weight would have.

        Raises:
            ValueError: an unknown format, or parts, bias or branch that do not fit together.
        """
        super().__init__()
        self.format, self.dtype = format_of(format).name, dtype
        self.out_features, self.in_features = _check_parts(parts, format)
        _check_sides(self.out_features, self.in_features, bias, pre_quant_scale, input_scale, lora_a, lora_b)
        for name, part in zip(PARTS, parts, strict=False):
            self.register_buffer(name, part)
        if len(parts) < len(PARTS):
            self.register_buffer("weight_outer", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.register_buffer("pre_quant_scale", pre_quant_scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("lora_a", lora_a)
        self.register_buffer("lora_b", lora_b)

    @property
    def parts(self) -> list[Tensor]:
        """The parts of the weight, in the order of the format."""
        return [part for part in (self.weight_q, self.weight_scale, self.weight_outer) if part is not None]

    @property
    def weight(self) -> Tensor:
        """The weight ``[N, K]`` that the parts stand for, decoded anew; without the branch of low rank."""
        return self._decoded(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``, in the type of ``x``."""
        if self.pre_quant_scale is not None:
            x = x * _cast(self.pre_quant_scale, x.dtype)
        y = F.linear(x, self._decoded(x.dtype), None if self.bias is None else _cast(self.bias, x.dtype))
        if self.lora_a is None or self.lora_b is None:
            return y
        return y + F.linear(F.linear(x, _cast(self.lora_a, x.dtype)), _cast(self.lora_b, x.dtype))

    def _decoded(self, dtype: torch.dtype) -> Tensor:
        weight: Tensor = torch.ops.ditc.dequantize(self.parts, self.format, dtype)
        return weight

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        # a cast of the module must not touch codes and scales: torch counts float8 among the types to convert
        kept = {name: self._buffers.pop(name) for name in _FIXED}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in kept.items():
            moved = None if part is None else fn(part)
            self._buffers[name] = moved if part is None or moved is None else _as(moved, part)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        rank = "" if self.lora_a is None else f", rank={self.lora_a.shape[0]}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}{rank}"
        )


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a cast to the same type clutters a captured graph


def _as(moved: Tensor, part: Tensor) -> Tensor:
    return moved if moved.dtype == part.dtype else part.to(moved.device)


def _check_parts(parts: Sequence[Tensor], format: str) -> tuple[int, int]:
    q = parts[0]
    if q.dim() != 2:
        raise ValueError(f"a linear layer's weight has 2 dimensions, its codes have shape {tuple(q.shape)}")
    N, K = q.shape[0], q.shape[1] * (2 if format in ("mxfp4", "nvfp4") else 1)
    reason = format_of(format).unsupported(K)
    if reason is not None:
        raise ValueError(reason)
    wanted = [(tuple(shape), dtype) for shape, dtype in format_of(format).part_types((N, K))]
    found = [(tuple(part.shape), part.dtype) for part in parts]
    if found != wanted:
        raise ValueError(f"a {format} weight [{N}, {K}] has the parts {wanted}, got {found}")
    return N, K


def _check_sides(N: int, K: int, *sides: Any) -> None:
    bias, pre_quant_scale, input_scale, lora_a, lora_b = sides
    rank = None if lora_a is None else lora_a.shape[0]
    wanted = {"bias": (N,), "pre_quant_scale": (K,), "input_scale": (), "lora_a": (rank, K), "lora_b": (N, rank)}
    for (name, shape), tensor in zip(wanted.items(), (bias, pre_quant_scale, input_scale, lora_a, lora_b), strict=True):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, a layer of [{N}, {K}] needs {shape}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("a branch of low rank needs both lora_a and lora_b")
