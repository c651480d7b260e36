"""TrigFlow, x = cos(t) x0 + sin(t) z with z ~ N(0, sigma_data²), and sCM on it (Lu & Song 2024).

A model trained on rectified flow is one on TrigFlow, at another time and scale (SANA-Sprint, Chen et al. 2025):
s = sin t / (cos t + sin t).
"""

import math

from torch import Tensor

from .flow import flow_noise, flow_x0
from .state import Level, check_state, cos_sin

HALF_PI = math.pi / 2
TIME_TOLERANCE = 1e-5
"""Published lists round pi/2 up to 1.5708."""


def trigflow_mix(x0: Tensor, noise: Tensor, angle: Level) -> Tensor:
    """The sample at `angle`, cos(angle) x0 + sin(angle) noise, with noise of the data's deviation; shape of `x0`."""
    (noise,) = check_state(x0, noise=noise)
    cos, sin = cos_sin(angle)
    return cos * x0 + sin * noise


def trigflow_x0(x: Tensor, output: Tensor, angle: Level, sigma_data: float = 0.5) -> Tensor:
    """The consistency function f = cos(t) x - sigma_data sin(t) F, with F = (cos(t) z - sin(t) x0) / sigma_data.

    Args:
        x: the sample at `angle` in [0, pi/2], any shape, fp32 or fp64.
        output: F, the model's, shape of `x`.

    Returns:
        Shape and dtype of `x`; `x` itself at angle 0.
    """
    (output,) = check_state(x, output=output)
    cos, sin = cos_sin(angle)
    return cos * x - sigma_data * sin * output


def trigflow_step(
    x: Tensor, output: Tensor, noise: Tensor | None, angle: Level, angle_next: Level, sigma_data: float = 0.5
) -> Tensor:
    """One step of sCM: f at `angle`, then cos(t') f + sin(t') sigma_data noise.

    Args:
        x: the sample at `angle`, any shape, fp32 or fp64.
        output: F, the model's, shape of `x`.
        noise: fresh standard normal noise, shape of `x`; None on the last step, which returns f.
        angle, angle_next: in [0, pi/2]; `angle_next` is not read on the last step.

    Returns:
        The sample at `angle_next`, shape and dtype of `x`.
    """
    x0 = trigflow_x0(x, output, angle, sigma_data)
    if noise is None:
        return x0
    (noise,) = check_state(x, noise=noise)
    return trigflow_mix(x0, sigma_data * noise, angle_next)


def trigflow_ode_step(x: Tensor, output: Tensor, angle: Level, angle_next: Level, sigma_data: float = 0.5) -> Tensor:
    """One deterministic step, cos(t' - t) x + sin(t' - t) sigma_data F: first order, exact where F is the true one."""
    (output,) = check_state(x, output=output)
    cos, sin = cos_sin(angle_next - angle)
    return cos * x + sigma_data * sin * output


def trigflow_to_flow(angle: Level) -> Level:
    """The flow's sigma at an angle: sin t / (cos t + sin t)."""
    cos, sin = cos_sin(angle)
    return sin / (cos + sin)


def trigflow_sample_to_flow(x: Tensor, angle: Level, sigma_data: float = 0.5) -> Tensor:
    """The flow's sample, of data with deviation 1, at :func:`trigflow_to_flow` of `angle`; shape of `x`."""
    check_state(x)
    cos, sin = cos_sin(angle)
    return x / (sigma_data * (cos + sin))


def trigflow_output(x: Tensor, velocity: Tensor, angle: Level, sigma_data: float = 0.5) -> Tensor:
    """F, from the velocity that a flow model predicts at :func:`trigflow_sample_to_flow`.

    Args:
        x: the TrigFlow sample at `angle`, any shape, fp32 or fp64.
        velocity: the flow model's eps - x0, shape of `x`.

    Returns:
        Shape and dtype of `x`.
    """
    sample, sigma = trigflow_sample_to_flow(x, angle, sigma_data), trigflow_to_flow(angle)
    cos, sin = cos_sin(angle)
    return cos * flow_noise(sample, velocity, sigma) - sin * flow_x0(sample, velocity, sigma)
