"""The variance-preserving process, x = sqrt(a) x0 + sqrt(1 - a) eps, with a = alpha-bar of a discrete timestep."""

from typing import Literal

import torch
from torch import Tensor

from .state import Level, check_state, sqrt

BetaSchedule = Literal["linear", "scaled_linear"]
VpPrediction = Literal["eps", "x0", "v"]


def alpha_bars(
    schedule: BetaSchedule = "scaled_linear", start: float = 0.00085, end: float = 0.012, steps: int = 1000
) -> Tensor:
    """Alpha-bar of every timestep: the running product of 1 - beta (Ho et al. 2020).

    Args:
        schedule: "linear" in beta, or "scaled_linear" in its square root, as Stable Diffusion's (the defaults).
        start, end: the first and last beta, 0 < start <= end < 1.
        steps: how many timesteps the model was trained on.

    Returns:
        (steps,) fp64 on the CPU, falling. diffusers keeps the same table in fp32.
    """
    if not 0 < start <= end < 1:
        raise ValueError(f"betas must satisfy 0 < start <= end < 1; got start={start}, end={end}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    if schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    else:
        raise ValueError(f"the schedule of betas must be 'linear' or 'scaled_linear'; got {schedule!r}")
    return (1 - betas).cumprod(0)


def vp_mix(x0: Tensor, noise: Tensor, alpha_bar: Level) -> Tensor:
    """The sample at `alpha_bar`: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise; shape and dtype of `x0`."""
    (noise,) = check_state(x0, noise=noise)
    return sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * noise


def vp_parts(x: Tensor, output: Tensor, alpha_bar: Level, prediction: VpPrediction = "eps") -> tuple[Tensor, Tensor]:
    """Data and noise, as a model's output says them.

    Args:
        x: the sample at `alpha_bar`, any shape, fp32 or fp64.
        output: shape of `x`: the noise ("eps"), the data ("x0"), or "v" = sqrt(a) eps - sqrt(1 - a) x0 (Salimans &
            Ho 2022).
        alpha_bar: in (0, 1): at 0 the sample says nothing of the data, at 1 nothing of the noise.

    Returns:
        (x0, eps), each of the shape and dtype of `x`.
    """
    (output,) = check_state(x, output=output)
    signal, spread = sqrt(alpha_bar), sqrt(1 - alpha_bar)
    if prediction == "eps":
        return (x - spread * output) / signal, output
    if prediction == "x0":
        return output, (x - signal * output) / spread
    if prediction == "v":
        return signal * x - spread * output, spread * x + signal * output
    raise ValueError(f"prediction must be 'eps', 'x0' or 'v'; got {prediction!r}")
