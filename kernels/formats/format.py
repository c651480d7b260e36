"""A quantised tensor is a list of parts; a :class:`Format` says which, and makes and reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from .fp8 import E4M3, dequantize_fp8, quantize_fp8
from .int8 import dequantize_int8, quantize_int8
from .mx import dequantize_mxfp4, dequantize_mxfp8, quantize_mxfp4, quantize_mxfp8
from .nvfp4 import dequantize_nvfp4, quantize_nvfp4
from .ranges import Granularity, check_range


class _Quantize(Protocol):
    def __call__(self, x: Tensor, *, granularity: Granularity = ..., static: Tensor | None = ...) -> list[Tensor]: ...


class _Dequantize(Protocol):
    def __call__(self, parts: Sequence[Tensor], dtype: torch.dtype = ...) -> Tensor: ...


@dataclass(frozen=True)
class Format:
    """How the rows (the last dimension, K) of a float tensor are stored.

    ======  =================================  ===========================  =====================
    name    first part                         scale                        third part
    ======  =================================  ===========================  =====================
    int8    q int8 [..., K]                    float32 [..., 1]
    fp8     q float8_e4m3fn [..., K]           float32 [..., 1]
    mxfp8   q float8_e4m3fn [..., K]           uint8 E8M0 [..., K/32]
    mxfp4   q uint8 [..., K/2]                 uint8 E8M0 [..., K/32]
    nvfp4   q uint8 [..., K/2]                 float8_e4m3fn [..., K/16]    outer float32 [..., 1]
    ======  =================================  ===========================  =====================

    A value is ``decode(q) * scale * outer``. Bytes of two codes hold the even index in the low nibble; scales are
    row-major. A row that holds NaN or an infinity reads as NaN (in an MX format, its block does).
    """

    name: str
    block: int | None
    """Values that share a block scale; ``None`` where a row has one scale."""
    bits: float
    """Stored bits per value, block scales included, row scales not."""
    _quantize: _Quantize = field(repr=False, compare=False)
    _dequantize: _Dequantize = field(repr=False, compare=False)
    _parts: tuple[tuple[int | None, torch.dtype], ...] = field(repr=False, compare=False)

    def unsupported(self, K: int) -> str | None:
        """Why rows of ``K`` values cannot be stored so; ``None`` when they can."""
        if self.block is not None and (self.block > K or K % self.block):
            return f"{self.name} needs rows of a positive multiple of {self.block} values, got K = {K}"
        return None

    def quantize(self, x: Tensor, *, granularity: Granularity = "row", static: Tensor | None = None) -> list[Tensor]:
        """The parts of ``x``, each contiguous. Plain torch on any device, traceable; arithmetic in float32.

        Args:
            x: ``[..., K]``, float32, bfloat16 or float16, any strides.
            granularity: Whether the float32 scale (in nvfp4, the outer one) covers a row or the whole tensor, in which
                case it stands at every row. The MX formats have none.
            static: float32 ``()`` from calibration: the scale itself (int8, fp8) or the outer scale (nvfp4). What
                lies beyond its range saturates.

        Raises:
            TypeError: ``x`` or ``static`` has another type.
            ValueError: ``x`` is a scalar, K is :meth:`unsupported`, ``static`` is no scalar or is given to an MX
                format, or the granularity is unknown.
        """
        return self._quantize(x, granularity=granularity, static=static)

    def dequantize(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor ``[..., K]`` that ``parts`` hold, computed in float32 and rounded once to ``dtype``."""
        if len(parts) != len(self._parts):
            raise ValueError(f"{self.name} has {len(self._parts)} parts, got {len(parts)}")
        return self._dequantize(parts, dtype)

    def part_types(
        self, shape: Sequence[int | torch.SymInt]
    ) -> list[tuple[tuple[int | torch.SymInt, ...], torch.dtype]]:
        """Shape and type of each part of a tensor of ``shape``, which may be symbolic."""
        *rows, K = shape
        return [((*rows, 1 if values is None else K // values), dtype) for values, dtype in self._parts]


def _mx(quantize: Callable[[Tensor], list[Tensor]]) -> _Quantize:
    def checked(x: Tensor, *, granularity: Granularity = "row", static: Tensor | None = None) -> list[Tensor]:
        check_range(granularity, None)
        if static is not None:
            raise ValueError("an MX format has no scale but its blocks': it takes no static one")
        return quantize(x)

    return checked


_ROW, _PAIR = None, 2
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            Format("int8", None, 8.0, quantize_int8, dequantize_int8, ((1, torch.int8), (_ROW, torch.float32))),
            Format("fp8", None, 8.0, quantize_fp8, dequantize_fp8, ((1, E4M3), (_ROW, torch.float32))),
            Format("mxfp8", 32, 8.25, _mx(quantize_mxfp8), dequantize_mxfp8, ((1, E4M3), (32, torch.uint8))),
            Format("mxfp4", 32, 4.25, _mx(quantize_mxfp4), dequantize_mxfp4, ((_PAIR, torch.uint8), (32, torch.uint8))),
            Format(
                "nvfp4", 16, 4.5, quantize_nvfp4, dequantize_nvfp4,
                ((_PAIR, torch.uint8), (16, E4M3), (_ROW, torch.float32)),
            ),
        )
    }
)  # fmt: skip
"""Every format by its name."""


def format_of(name: str) -> Format:
    """The format called ``name``; ValueError, naming those there are, for any other."""
    if name not in FORMATS:
        raise ValueError(f"no format {name!r}: there are {', '.join(FORMATS)}")
    return FORMATS[name]
