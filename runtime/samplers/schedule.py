"""Noise schedules of rectified flow, x = (1 - sigma) x0 + sigma eps, for sigma in [0, 1]."""

import torch
from torch import Tensor

from .shift import static_shift


def flow_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """The schedule of flow Euler: linspace(1, 1/steps, steps), shifted, and then 0.

    It is computed in fp64 and rounded once. Equal to diffusers' `FlowMatchEulerDiscreteScheduler` given the unshifted
    sigmas, to within an ulp of fp32.

    Returns:
        (steps + 1,) fp32, strictly falling from 1 to 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    # k / steps, not a running sum: every sigma is the nearest double
    unshifted = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return static_shift(unshifted, shift).to(torch.float32)


def check_sigmas(sigmas: Tensor) -> None:
    """Raise ValueError unless `sigmas` (N + 1,) is a schedule: floating point, in [0, 1], falling strictly to 0."""
    if sigmas.ndim != 1 or len(sigmas) < 2 or not sigmas.is_floating_point():
        raise ValueError(
            f"sigmas must be floating point of shape (steps + 1,), steps >= 1; got {sigmas.dtype} {tuple(sigmas.shape)}"
        )
    if not bool(torch.isfinite(sigmas).all()) or float(sigmas[0]) > 1 or float(sigmas[-1]) != 0:
        raise ValueError(f"sigmas must lie within [0, 1] and end at 0; got {sigmas.tolist()}")
    if not bool((sigmas[1:] < sigmas[:-1]).all()):
        raise ValueError(f"sigmas must fall strictly; got {sigmas.tolist()}")
