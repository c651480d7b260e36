"""Rectified flow, x = (1 - sigma) x0 + sigma eps: its parts, and what one of them says of the others."""

from torch import Tensor

from .state import Level, check_state


def flow_mix(x0: Tensor, noise: Tensor, sigma: Level) -> Tensor:
    """The sample at `sigma`, (1 - sigma) x0 + sigma noise; shapes and dtype of `x0`."""
    (noise,) = check_state(x0, noise=noise)
    return (1 - sigma) * x0 + sigma * noise


def flow_x0(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """The data end of the line through `x`: x - sigma * velocity, with velocity = eps - x0."""
    (velocity,) = check_state(x, velocity=velocity)
    return x - sigma * velocity


def flow_noise(x: Tensor, velocity: Tensor, sigma: Level) -> Tensor:
    """The noise end of the line through `x`: x + (1 - sigma) * velocity."""
    (velocity,) = check_state(x, velocity=velocity)
    return x + (1 - sigma) * velocity


def flow_velocity(x: Tensor, x0: Tensor, sigma: Level) -> Tensor:
    """The velocity that leads from `x` to `x0`: (x - x0) / sigma; `sigma` must not be 0."""
    (x0,) = check_state(x, x0=x0)
    return (x - x0) / sigma
