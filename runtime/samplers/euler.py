"""The Euler solver of a flow's probability path."""

import torch
from torch import Tensor


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
    """One Euler step, x + (sigma_next - sigma) * velocity (Liu et al. 2023, "Flow straight and fast").

    Args:
        x: the sample at `sigma`, any shape, fp32 or fp64.
        velocity: the predicted eps - x0 at `sigma`, shape of `x`, any floating dtype; it is widened to that of `x`.
        sigma, sigma_next: scalars in [0, 1].

    Returns:
        The sample at `sigma_next`, shape and dtype of `x`.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a trajectory is kept in fp32 or fp64, since rounding adds up over steps; got {x.dtype}")
    if velocity.shape != x.shape:
        raise ValueError(f"velocity must have the sample's shape {tuple(x.shape)}; got {tuple(velocity.shape)}")
    return x + (sigma_next - sigma) * velocity.to(x.dtype)
