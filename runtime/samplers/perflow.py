"""PeRFlow (Yan et al. 2024): a flow that is straight within each of a few windows of time.

Times run from 1, noise, to 0. Within a window the trajectory is the line between the samples at its two ends, so an
Euler step is exact as long as it does not leave the window.
"""

from itertools import pairwise
from typing import Literal

from torch import Tensor

from .state import Level, check_state, sqrt


def perflow_times(steps: int, windows: int = 4) -> tuple[float, ...]:
    """The published grid: `windows` equal windows, each cut into equal steps, the first ones into one more if need be.

    Returns:
        steps + 1 times from 1 to 0, among them every end of a window.

    Raises:
        ValueError: fewer steps than windows: one would have to cross an end.
    """
    if windows < 1 or steps < windows:
        raise ValueError(f"there must be at least one step in each window; got {steps} steps, {windows} windows")
    short, longer = divmod(steps, windows)
    times = []
    for window in range(windows):
        cuts = short + (window < longer)
        times += [1 - (window + cut / cuts) / windows for cut in range(cuts)]
    return (*times, 0.0)


def perflow_window(time: float, windows: int = 4) -> tuple[float, float]:
    """(start, end) of the window that a step from `time` belongs to: end < time <= start."""
    if not 0 < time <= 1:
        raise ValueError(f"a step starts at a time in (0, 1]; got {time}")
    # the last end below the time, but not one that rounding puts a hair below it
    index = max(k for k in range(windows) if time <= 1 - k / windows + 1e-4)
    return 1 - index / windows, 1 - (index + 1) / windows


def check_windows(times: tuple[float, ...], windows: int) -> None:
    """Raise ValueError where a step of `times`, from 1 to 0, crosses the end of a window."""
    for time, following in pairwise(times):
        start, end = perflow_window(time, windows)
        if following < end - 1e-4:
            raise ValueError(
                f"the step from {time:g} to {following:g} leaves its window ({start:g} to {end:g}): with "
                f"{windows} windows every one of their ends must be a step"
            )


def perflow_velocity(
    x: Tensor,
    eps: Tensor,
    time: Level,
    window: tuple[Level, Level],
    alpha_bars: tuple[Level, Level],
    form: Literal["ddim", "diffusion"] = "ddim",
) -> Tensor:
    """The velocity dx/dtime within a window, from a model of the noise.

    The end of a window is affine in its start, x_e = l x_s + n eps: by DDIM's step ("ddim"; SDXL checkpoints), or by
    undoing the forward process ("diffusion"; SD 1.5 checkpoints). Since x lies on the line between both, x and eps
    give x_e, and with it the slope.

    Args:
        x: the sample at `time`, any shape, fp32 or fp64.
        eps: the model's output, shape of `x`.
        time: end < time <= start.
        window: times (start, end).
        alpha_bars: of the variance-preserving process at `window`.

    Returns:
        Shape and dtype of `x`.
    """
    (eps,) = check_state(x, eps=eps)
    (start, end), (at_start, at_end) = window, alpha_bars
    factor = sqrt(at_end / at_start)
    if form == "ddim":
        shift = sqrt(1 - at_end) - factor * sqrt(1 - at_start)
    elif form == "diffusion":
        shift = -factor * sqrt(1 - at_start / at_end)
    else:
        raise ValueError(f"form must be 'ddim' or 'diffusion'; got {form!r}")
    left, done = time - end, start - time
    x_end = (factor * (start - end) * x + shift * left * eps) / (factor * done + left)
    return (x - x_end) / left
