"""How good generated samples are: PSNR, SSIM, Fréchet distance, stillness of the background, accuracy.

Everything is computed in fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def psnr(sample: Tensor, reference: Tensor, *, value_range: float) -> Tensor:
    """Peak signal-to-noise ratio of each sample, 10 log10(range² / mean squared error), in dB.

    Args:
        sample, reference: (B, ...), floating point, of equal shape.
        value_range: the largest possible difference: 2 for values in [-1, 1].

    Returns:
        (B,) fp64; infinity where a sample equals its reference.
    """
    _check_pair(sample, reference)
    _check_range(value_range)
    error = (sample.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(value_range**2 / error)


def ssim(sample: Tensor, reference: Tensor, *, value_range: float) -> Tensor:
    """Structural similarity of each sample, the mean over its frames and channels (Wang et al. 2004).

    Gaussian window of sigma 1.5, as in the paper; computed by scikit-image.

    Args:
        sample, reference: (B, C, F, H, W) or (B, C, H, W), floating point, of equal shape, H and W at least 11.
        value_range: the largest possible difference: 2 for values in [-1, 1].

    Returns:
        (B,) fp64, at most 1.
    """
    _check_pair(sample, reference)
    _check_range(value_range)
    if sample.ndim not in (4, 5) or min(sample.shape[-2:]) < 11:
        raise ValueError(f"SSIM needs (B, C[, F], H, W) with H and W at least 11; got {tuple(sample.shape)}")
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM is computed by scikit-image: pip install 'ditc[demo]'") from error
    images = sample.double().cpu().flatten(1, -3).numpy()
    references = reference.double().cpu().flatten(1, -3).numpy()
    values = [
        sum(
            float(
                structural_similarity(
                    x, y, data_range=value_range, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
                )
            )
            for x, y in zip(frames, others, strict=True)
        )
        / len(frames)
        for frames, others in zip(images, references, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features, each taken for a Gaussian (Dowson & Landau 1982; Heusel et al. 2017).

    |m1 - m2|² + tr(C1 + C2 - 2 (C1^½ C2 C1^½)^½): the square of the Wasserstein-2 distance. The symmetric form has real
    eigenvalues, unlike C1 C2, so no imaginary part has to be thrown away. The estimate is biased upward, the more the
    fewer samples there are: compare numbers of equal size only, and against the distance of real data from itself.

    Args:
        features, reference: (N, D) and (M, D), floating point, finite; more samples than dimensions, or the covariance
            would be singular.

    Returns:
        The distance, at least 0, in units of the features squared.
    """
    for name, values in (("features", features), ("reference", reference)):
        if values.ndim != 2 or not values.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape (N, D); got {values.dtype} {tuple(values.shape)}")
        if len(values) <= values.shape[1]:
            raise ValueError(f"{name}: {len(values)} samples of {values.shape[1]} dimensions; more samples are needed")
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} hold NaN or infinity")
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"both sets must have the same dimensions; got {features.shape[1]} and {reference.shape[1]}")
    a, b = features.double().cpu(), reference.double().cpu()
    mean_gap = (a.mean(0) - b.mean(0)).square().sum()
    dims = (a.shape[1], a.shape[1])
    cov_a, cov_b = torch.cov(a.T).view(dims), torch.cov(b.T).view(dims)
    root = _square_root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(mean_gap + cov_a.trace() + cov_b.trace() - 2 * cross))


def background_motion(video: Tensor, subject: Tensor) -> Tensor:
    """How much the background of each clip moves: the standard deviation over time where the subject is not.

    Args:
        video: (B, C, F, H, W), floating point.
        subject: (B, 1, F, H, W) bool, where the subject, or its soft edge, is. A pixel that is free of it in fewer than
            two frames says nothing and is left out.

    Returns:
        (B,) fp64 in units of `video`, the mean over pixels; 0 is perfectly still. NaN where no pixel is left.
    """
    if video.ndim != 5 or subject.dtype != torch.bool or subject.shape != (video.shape[0], 1, *video.shape[2:]):
        raise ValueError(
            f"video must be (B, C, F, H, W) and subject bool (B, 1, F, H, W); "
            f"got {tuple(video.shape)} and {subject.dtype} {tuple(subject.shape)}"
        )
    free = (~subject).double()
    values = video.double()
    count = free.sum(2, keepdim=True)
    mean = (values * free).sum(2, keepdim=True) / count.clamp_min(1)
    variance = ((values - mean).square() * free).sum(2) / (count.squeeze(2) - 1).clamp_min(1)
    seen = (count.squeeze(2) >= 2).double().expand_as(variance)
    return (variance.sqrt() * seen).flatten(1).sum(1) / seen.flatten(1).sum(1)


def accuracy(predicted: Tensor, asked: Tensor) -> float:
    """Share, in [0, 1], of `predicted` (N,) that equals `asked` (N,), both integers."""
    if predicted.shape != asked.shape or predicted.ndim != 1 or len(asked) == 0:
        raise ValueError(
            f"predicted and asked must have one equal, non-empty shape (N,); "
            f"got {tuple(predicted.shape)} and {tuple(asked.shape)}"
        )
    if predicted.is_floating_point() or asked.is_floating_point():
        raise ValueError("accuracy compares classes: integers are needed, not scores")
    return float((predicted == asked).double().mean())


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _check_pair(sample: Tensor, reference: Tensor) -> None:
    if sample.shape != reference.shape or sample.ndim < 2 or sample.numel() == 0:
        raise ValueError(
            f"sample and reference must have one shape (B, ...), not empty; "
            f"got {tuple(sample.shape)} and {tuple(reference.shape)}"
        )
    if not sample.is_floating_point() or not reference.is_floating_point():
        raise ValueError(f"images must be floating point; got {sample.dtype} and {reference.dtype}")


def _check_range(value_range: float) -> None:
    if not math.isfinite(value_range) or value_range <= 0:
        raise ValueError(f"value_range must be positive: 2 for values in [-1, 1]; got {value_range}")
