"""Shifts: warps of a flow's schedule toward noise, for resolutions above those of pretraining."""

import math

from torch import Tensor


def static_shift(sigmas: Tensor, shift: float) -> Tensor:
    """Warp a schedule toward noise: shift * sigma / (1 + (shift - 1) * sigma) (Esser et al. 2024, eq. 23).

    Args:
        sigmas: any shape, floating point, within [0, 1]; 0 and 1 stay where they are.
        shift: positive; 1 changes nothing, and 1 / shift undoes it.
    """
    if not math.isfinite(shift) or shift <= 0:
        raise ValueError(f"shift must be positive and finite; got {shift}")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def exponential_shift(sigmas: Tensor, mu: float) -> Tensor:
    """FLUX's dynamic shift, e^mu / (e^mu + 1 / sigma - 1): the static one by e^mu, written so that 0 stays 0."""
    if not math.isfinite(mu) or abs(mu) > 50:
        raise ValueError(f"mu must be a small number (FLUX.1's are 0.5 to 1.15); got {mu}")
    return static_shift(sigmas, math.exp(mu))


def linear_shift(sigmas: Tensor, mu: float) -> Tensor:
    """The dynamic shift that is linear in mu, mu / (mu + 1 / sigma - 1): the static one by mu."""
    if not math.isfinite(mu) or mu <= 0:
        raise ValueError(f"mu of a linear shift must be positive and finite; got {mu}")
    return static_shift(sigmas, mu)


def token_mu(
    tokens: int, *, base: float = 0.5, highest: float = 1.15, base_tokens: int = 256, highest_tokens: int = 4096
) -> float:
    """mu of a sample by its number of image tokens: the line through (base_tokens, base), (highest_tokens, highest).

    The defaults are FLUX.1's. The line goes on beyond both points.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1; got {tokens}")
    if highest_tokens == base_tokens:
        raise ValueError(f"base_tokens and highest_tokens must differ; both are {base_tokens}")
    return base + (highest - base) * (tokens - base_tokens) / (highest_tokens - base_tokens)


def terminal_shift(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch a schedule so that its last level before 0 is `terminal` (LTX-Video): distances from 1 are scaled.

    Args:
        sigmas: (steps + 1,), floating point, falling from 1 to 0; the final 0 stays.
        terminal: in (0, 1).

    Returns:
        Shape and dtype of `sigmas`.
    """
    if not 0 < terminal < 1:
        raise ValueError(f"the terminal sigma must be in (0, 1); got {terminal}")
    if sigmas.ndim != 1 or len(sigmas) < 3:
        raise ValueError("a terminal shift needs at least two steps: one step cannot begin at 1 and at the terminal")
    stretched = 1 - (1 - sigmas) * ((1 - terminal) / (1 - sigmas[-2]))
    stretched[-1] = 0
    return stretched
