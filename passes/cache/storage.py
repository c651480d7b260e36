"""How what is kept of the exits is stored: as it is, or in few bits with scales of each row or block.

Policies never read any of it: what they look at keeps its precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# registers the quantising operators
import ditc.kernels.quantize  # noqa: F401
from ditc.kernels.formats import format_of

from ..base import Skip
from ..rewrite import size_hint

ROW = 32
"""Values that a row should have at least: its float32 scale then costs at most a bit a value."""

Part = tuple[tuple[Any, ...], torch.dtype]


@dataclass(frozen=True)
class Storage:
    """How one exit is stored.

    Attributes:
        format: of :mod:`ditc.kernels.formats`; ``None`` for the exit's own dtype.
        shape, dtype: of the exit.
        joined: how many of the last dimensions make a row.
    """

    format: str | None
    shape: tuple[Any, ...]
    dtype: torch.dtype
    joined: int = 1

    @property
    def parts(self) -> tuple[Part, ...]:
        """Shape and dtype of each tensor that holds one value of the exit; 8-bit floats as plain bytes, which every
        operator knows."""
        if self.format is None:
            return ((self.shape, self.dtype),)
        rows, K = self.shape[: len(self.shape) - self.joined], math.prod(self.shape[len(self.shape) - self.joined :])
        if self.format == "nvfp4":
            return (((*rows, K // 2), torch.uint8), ((*rows, K // 16), torch.uint8), ((*rows, 1), torch.float32))
        codes = torch.int8 if self.format == "int8" else torch.uint8
        return (((*rows, K), codes), ((*rows, 1), torch.float32))

    def sizes(self, part: Tensor) -> tuple[Any, ...]:
        """The exit's shape, by the first part of a value: sizes that only a call knows are those of the part."""
        return tuple(part.shape) if self.format is None else (*part.shape[:-1], *self.shape[-self.joined :])

    def write(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The parts of each value, one after the other."""
        if self.format is None:
            return list(values)
        found: list[Tensor] = []
        for value in values:
            for part in torch.ops.ditc.quantize(
                value.flatten(-self.joined) if self.joined > 1 else value, self.format, None
            ):
                found.append(part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part)
        return found

    def read(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The values, in the exit's shape and dtype, of all their parts."""
        if self.format is None:
            return list(parts)
        found = []
        for i in range(0, len(parts), len(self.parts)):
            own = list(parts[i : i + len(self.parts)])
            if self.format == "fp8":
                own[0] = own[0].view(torch.float8_e4m3fn)
            elif self.format == "nvfp4":
                own[1] = own[1].view(torch.float8_e4m3fn)
            value: Tensor = torch.ops.ditc.dequantize(own, self.format, self.dtype)
            found.append(torch.unflatten(value, -1, self.shape[-self.joined :]) if self.joined > 1 else value)
        return found


def storage_of(exit: fx.Node, format: str) -> tuple[Storage, str | None]:
    """How an exit is stored, and why it keeps its own dtype although ``format`` is asked for."""
    value: Tensor = exit.meta["val"]
    shape: tuple[Any, ...] = tuple(value.shape)
    dtype = value.dtype
    native = Storage(None, shape, dtype)
    if format == "native":
        return native, None
    if len(shape) < 2 or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return native, f"a value of {dtype} with {len(shape)} dimensions has no rows of numbers to quantise"
    joined, K = 1, shape[-1]
    while joined < len(shape) - 1 and isinstance(K, int) and K < ROW and isinstance(shape[-joined - 1], int):
        joined, K = joined + 1, K * shape[-joined - 1]
    if not isinstance(K, int):
        return native, "the size of its rows is known only when it is called"
    reason = format_of(format).unsupported(K)
    return (native, reason) if reason is not None else (Storage(format, shape, dtype, joined), None)


def stored_as(
    found: Sequence[tuple[Storage, str | None]], exits: Sequence[fx.Node], orders: int
) -> tuple[tuple[str, ...], tuple[Skip, ...]]:
    """What the report says of exits that are stored in few bits, with ``orders`` values each, and of those that are
    not."""
    skips = tuple(Skip(exit.name, why) for (_, why), exit in zip(found, exits, strict=True) if why is not None)
    few = [(storage, exit.meta["val"]) for (storage, _), exit in zip(found, exits, strict=True) if storage.format]
    if not few:
        return (), skips
    own = sum(orders * size_hint(value.numel()) * value.dtype.itemsize for _, value in few)
    bytes = sum(
        orders * size_hint(math.prod(shape)) * dtype.itemsize for storage, _ in few for shape, dtype in storage.parts
    )
    return (f"{bytes} bytes kept in {few[0][0].format} instead of {own}",), skips
