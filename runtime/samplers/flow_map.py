"""Flow maps: models of the average velocity between two times (MeanFlow, Geng et al. 2025; AnyFlow)."""

from torch import Tensor

from .state import Level, check_state


def flow_map_step(x: Tensor, average_velocity: Tensor, sigma: Level, target: Level) -> Tensor:
    """Jump from `sigma` to `target`: x - (sigma - target) u(x, sigma, target).

    Exact for any target, not to first order as Euler's step: `average_velocity` is the mean of the velocity along the
    trajectory between both levels. One step of a generation is sigma 1, target 0.

    Args:
        x: the sample at `sigma`, any shape, fp32 or fp64.
        average_velocity: u, shape of `x`.
        sigma, target: in [0, 1], target <= sigma.

    Returns:
        The sample at `target`, shape and dtype of `x`.
    """
    (average_velocity,) = check_state(x, average_velocity=average_velocity)
    return x - (sigma - target) * average_velocity
