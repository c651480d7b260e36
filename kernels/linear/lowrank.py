"""The low-rank branch of SVDQuant: what quantisation would lose most of stays in two thin matrices.

Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operands import check_float


def lowrank_split_reference(w: Tensor, rank: int) -> list[Tensor]:
    """Splits ``w`` into its best approximation of rank ``rank`` and the rest: ``w = up @ down + residual``.

    Args:
        w: ``[N, K]``, float32, bfloat16 or float16.
        rank: at least 1; what is beyond ``min(N, K)`` is cut.

    Returns:
        ``residual [N, K]`` in float32, and ``down [rank, K]`` and ``up [N, rank]`` in the type of ``w``, with the
        singular values in ``up``. The singular value decomposition is in float64; the residual is taken from the
        rounded factors, so their rounding is no error.

    Raises:
        TypeError: ``w`` is not one of the three float types.
        ValueError: ``w`` is not a matrix, or ``rank`` is less than 1.
    """
    _check(w, rank)
    wide = w.double()
    # NaN and infinity have no decomposition; they stay visible in the residual, which is quantised next
    finite = torch.nan_to_num(wide, 0.0, 0.0, 0.0)
    U, S, V = torch.linalg.svd(finite, full_matrices=False)
    r = min(rank, *w.shape)
    down, up = V[:r].to(w.dtype).contiguous(), (U[:, :r] * S[:r]).to(w.dtype).contiguous()
    return [(wide - up.double() @ down.double()).float(), down, up]


def smoothing_scale_reference(w: Tensor, channel_amax: Sequence[float], alpha: float) -> Tensor:
    """What activations are divided by, and weights multiplied with, so that outlier channels move into the weight.

    SmoothQuant (Xiao et al. 2023): ``s[k] = amax_x[k]**alpha / amax_w[k]**(1 - alpha)``, normalised to a geometric
    mean of one; a channel that is zero on either side is left alone.

    Args:
        w: ``[N, K]``.
        channel_amax: ``K`` numbers, the largest magnitude of each input feature over a calibration.
        alpha: how much of the difficulty moves into the weight, from 0 (nothing) to 1 (all of it).

    Returns:
        float32 ``[K]``, positive.

    Raises:
        ValueError: another number of features, or ``alpha`` out of range.
    """
    _check_smoothing(w, channel_amax, alpha)
    weight_amax = w.float().abs().amax(0)
    amax = torch.tensor(channel_amax, dtype=torch.float32, device=w.device)
    live = (amax > 0) & (weight_amax > 0)
    raw = amax.clamp(min=1e-20) ** alpha / weight_amax.clamp(min=1e-20) ** (1 - alpha)
    logs = torch.where(live, raw, 1.0).log()
    return torch.where(live, (logs - logs.mean()).exp(), 1.0)


def _check_smoothing(w: Tensor, channel_amax: Sequence[float], alpha: float) -> None:
    check_float(w, "w")
    if w.dim() != 2 or len(channel_amax) != w.shape[1]:
        raise ValueError(f"{len(channel_amax)} channels were calibrated, the weight is {tuple(w.shape)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is between 0 and 1, got {alpha}")


def _check(w: Tensor, rank: int) -> None:
    check_float(w, "w")
    if w.dim() != 2 or rank < 1:
        raise ValueError(f"a matrix and a rank of at least 1 are wanted, got {tuple(w.shape)} and {rank}")


lowrank_split = torch.library.custom_op(
    "ditc::lowrank_split", lowrank_split_reference, mutates_args=(), schema="(Tensor w, int rank) -> Tensor[]"
)


@lowrank_split.register_fake
def _(w: Tensor, rank: int) -> list[Tensor]:
    _check(w, rank)
    N, K = w.shape
    r = min(rank, N, K)
    return [w.new_empty((N, K), dtype=torch.float32), w.new_empty((r, K)), w.new_empty((N, r))]


smoothing_scale = torch.library.custom_op(
    "ditc::smoothing_scale",
    smoothing_scale_reference,
    mutates_args=(),
    schema="(Tensor w, float[] channel_amax, float alpha) -> Tensor",
)


@smoothing_scale.register_fake
def _(w: Tensor, channel_amax: Sequence[float], alpha: float) -> Tensor:
    _check_smoothing(w, channel_amax, alpha)
    return w.new_empty((w.shape[1],), dtype=torch.float32)
