"""Latent consistency models (Luo et al. 2023): re-noising with the scalings that make the model exact at time 0."""

import numpy as np
from torch import Tensor

from .state import Level, check_state, sqrt
from .vp import VpPrediction, vp_mix, vp_parts

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def lcm_scalings(timestep: Level) -> tuple[Level, Level]:
    """(c_skip, c_out) of a timestep, (1, 0) at 0: s² / ((10 t)² + s²) and 10 t / sqrt((10 t)² + s²), s = 0.5."""
    scaled = TIMESTEP_SCALING * timestep
    total = scaled * scaled + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / sqrt(total)


def lcm_denoise(
    x: Tensor, output: Tensor, timestep: Level, alpha_bar: Level, prediction: VpPrediction = "eps"
) -> Tensor:
    """The consistency function: c_out(t) x0 + c_skip(t) x, which is `x` itself at timestep 0; shape of `x`."""
    x0, _ = vp_parts(x, output, alpha_bar, prediction)
    skip, out = lcm_scalings(timestep)
    return out * x0 + skip * x


def lcm_step(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    timestep: Level,
    alpha_bar: Level,
    alpha_bar_next: Level,
    prediction: VpPrediction = "eps",
) -> Tensor:
    """One step: the consistency function, noised afresh to the next timestep.

    Args:
        x: the sample at `timestep`, any shape, fp32 or fp64.
        output: the model's, shape of `x`, as `prediction` says (see :func:`vp_parts`).
        noise: fresh standard normal noise, shape of `x`; None on the last step, which returns the denoised sample.
        timestep: discrete, 0 to 999.
        alpha_bar, alpha_bar_next: of `timestep` and of the next one; the latter is not read on the last step.

    Returns:
        Shape and dtype of `x`.
    """
    denoised = lcm_denoise(x, output, timestep, alpha_bar, prediction)
    if noise is None:
        return denoised
    (noise,) = check_state(denoised, noise=noise)
    return vp_mix(denoised, noise, alpha_bar_next)


def lcm_timesteps(steps: int, *, original_steps: int = 50, train_steps: int = 1000) -> tuple[int, ...]:
    """The published grid: `steps` of the `original_steps` timesteps k, 2k, ... - 1 that distillation used, from noise.

    Equal to what diffusers' LCM and TCD schedulers make of `set_timesteps(steps)`; a 0 for the end is appended.
    """
    if not 1 <= steps <= original_steps <= train_steps:
        raise ValueError(
            f"1 <= steps <= original_steps <= train_steps must hold; got {steps}, {original_steps}, {train_steps}"
        )
    stride = train_steps // original_steps
    grid = [stride * k - 1 for k in range(original_steps, 0, -1)]
    chosen = np.floor(np.linspace(0, original_steps, num=steps, endpoint=False)).astype(int)
    return (*(grid[index] for index in chosen), 0)
