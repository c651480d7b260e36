"""How much of a signal an approximation keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantisation noise of the whole tensor in dB: ``10 log10(sum(r**2) / sum((r - a)**2))``.

    Summed in float64. Infinity where the two are equal, minus infinity where the signal is zero or the noise infinite,
    NaN where either holds NaN or both hold the same infinity.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != approximation.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(approximation.shape)}")
    wide = reference.to(torch.float64)
    signal = float(wide.square().sum())
    noise = float((wide - approximation.to(torch.float64)).square().sum())
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)
