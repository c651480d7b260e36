"""Trajectory consistency distillation (Zheng et al. 2024): jump to a time s below the next one, then noise up to it."""

import math

from torch import Tensor

from .state import Level, check_state, sqrt
from .vp import VpPrediction, vp_mix, vp_parts


def tcd_landing(timestep_next: int, eta: float) -> int:
    """The timestep s = floor((1 - eta) t') that a step jumps to; eta 0 is deterministic, 1 jumps to 0 each time."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
    # 0.7 * 10 k is an integer on paper: do not let rounding take one off
    return math.floor(round((1 - eta) * timestep_next, 4))


def tcd_step(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    alpha_bar: Level,
    alpha_bar_landing: Level,
    alpha_bar_next: Level,
    prediction: VpPrediction = "eps",
) -> Tensor:
    """One step: x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps, then sqrt(a'/a_s) x_s + sqrt(1 - a'/a_s) noise.

    Args:
        x: the sample at `alpha_bar`, any shape, fp32 or fp64.
        output: the model's, shape of `x`, as `prediction` says (see :func:`vp_parts`).
        noise: fresh standard normal noise, shape of `x`; None on the last step, and where eta is 0: x_s is returned.
        alpha_bar, alpha_bar_landing, alpha_bar_next: of t, of s (:func:`tcd_landing`), and of t'; a_s >= a'.

    Returns:
        Shape and dtype of `x`.
    """
    x0, eps = vp_parts(x, output, alpha_bar, prediction)
    landed = vp_mix(x0, eps, alpha_bar_landing)
    if noise is None:
        return landed
    (noise,) = check_state(x, noise=noise)
    kept = alpha_bar_next / alpha_bar_landing
    return sqrt(kept) * landed + sqrt(1 - kept) * noise
