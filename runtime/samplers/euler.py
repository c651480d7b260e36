"""The Euler solver of a flow's probability path."""

from torch import Tensor

from .state import Level, check_state


def euler_step(x: Tensor, velocity: Tensor, sigma: Level, sigma_next: Level) -> Tensor:
    """One Euler step, x + (sigma_next - sigma) * velocity (Liu et al. 2023, "Flow straight and fast").

    Args:
        x: the sample at `sigma`, any shape, fp32 or fp64.
        velocity: the predicted eps - x0 at `sigma`, shape of `x`, any floating dtype; it is widened to that of `x`.
        sigma, sigma_next: in [0, 1].

    Returns:
        The sample at `sigma_next`, shape and dtype of `x`.

    Raises:
        TypeError: where `x` is of less than fp32.
        ValueError: where the shapes differ.
    """
    (velocity,) = check_state(x, velocity=velocity)
    return x + (sigma_next - sigma) * velocity
