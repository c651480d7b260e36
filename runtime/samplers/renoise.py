"""Re-noising: predict the data, then noise it afresh to the next level (DMD2, Yin et al. 2024, section 4.5).

Consistency models of a flow are sampled the same way: diffusers calls it `FlowMatchLCMScheduler`, and
`stochastic_sampling` of its Euler scheduler.
"""

from torch import Tensor

from .flow import flow_mix, flow_x0
from .state import Level
from .vp import VpPrediction, vp_mix, vp_parts


def renoise_flow_step(x: Tensor, velocity: Tensor, noise: Tensor | None, sigma: Level, sigma_next: Level) -> Tensor:
    """One step of a flow: x0 = x - sigma * velocity, then (1 - sigma_next) x0 + sigma_next noise.

    Args:
        x: the sample at `sigma`, any shape, fp32 or fp64.
        velocity: the predicted eps - x0, shape of `x`.
        noise: fresh standard normal noise, shape of `x`; None on the last step, which returns x0.
        sigma, sigma_next: in [0, 1]; `sigma_next` is not read on the last step.

    Returns:
        The sample at `sigma_next`, shape and dtype of `x`.
    """
    x0 = flow_x0(x, velocity, sigma)
    return x0 if noise is None else flow_mix(x0, noise, sigma_next)


def renoise_vp_step(
    x: Tensor,
    output: Tensor,
    noise: Tensor | None,
    alpha_bar: Level,
    alpha_bar_next: Level,
    prediction: VpPrediction = "eps",
) -> Tensor:
    """One step of a variance-preserving process: predict x0, then sqrt(a') x0 + sqrt(1 - a') noise.

    Args and result are those of :func:`renoise_flow_step`, with alpha-bar for the level and `output` as `prediction`
    says (see :func:`vp_parts`).
    """
    x0, _ = vp_parts(x, output, alpha_bar, prediction)
    return x0 if noise is None else vp_mix(x0, noise, alpha_bar_next)
