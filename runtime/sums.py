"""What is compared to notice edits of weights: samples, sums over bits, version counters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

SAMPLES = 16
"""Elements of each weight that are compared at every call."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(weight: torch.Tensor) -> torch.Tensor:
    """The weight's elements as integers in memory order, so that NaN equals itself; a view where that is possible."""
    return weight.detach().reshape(-1).view(_INTEGERS[weight.element_size()])


def sample(bits: torch.Tensor) -> torch.Tensor:
    """About ``SAMPLES`` of the elements, as a view."""
    # an odd stride visits different columns in different rows
    return bits[:: max(1, bits.numel() // SAMPLES) | 1]


def version_of(weight: torch.Tensor) -> int:
    """The version counter; tensors made in inference mode count none, and samples and checksums watch those."""
    return -1 if weight.is_inference() else weight._version


def checksum(bits: Sequence[torch.Tensor]) -> torch.Tensor:
    """One int64 sum per weight, ``[len(bits)]``."""
    sums = [_wide(b).sum(dtype=torch.int64) for b in bits]
    return torch.stack(sums) if sums else torch.empty(0, dtype=torch.int64)


def _wide(bits: torch.Tensor) -> torch.Tensor:
    # as many bytes per element as there are: sums of narrow integers convert each of them first
    size = bits.element_size()
    aligned = bits.is_contiguous() and bits.data_ptr() % 8 == 0 and bits.storage_offset() * size % 8 == 0
    return bits.view(torch.int64) if aligned and bits.numel() * size % 8 == 0 else bits
