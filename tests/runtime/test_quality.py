"""Quality measures against closed forms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditc.runtime.quality import accuracy, background_motion, frechet_distance, psnr, ssim


def _exact_gaussian(count: int, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Samples whose empirical mean and covariance (root @ root.T) are exact, not only in expectation."""
    raw = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(raw.T))).T
    return white @ root.T + mean


@pytest.mark.parametrize("error", [1.0, 0.1, 1e-4])
def test_psnr_of_a_constant_error(error: float) -> None:
    reference = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    expected = 20 * math.log10(2 / error)
    torch.testing.assert_close(psnr(reference + error, reference, value_range=2), torch.full((3,), expected).double())


def test_psnr_of_equal_samples_is_infinite_and_samples_are_kept_apart() -> None:
    reference = torch.zeros(2, 4)
    sample = torch.stack((torch.zeros(4), torch.full((4,), 0.2)))
    values = psnr(sample, reference, value_range=2)
    assert values[0] == math.inf
    assert float(values[1]) == pytest.approx(20)


def test_ssim_is_one_for_equal_clips_and_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(2, 1, 3, 16, 16, generator=generator)
    noise = torch.randn(clip.shape, generator=generator)
    assert ssim(clip, clip, value_range=1).tolist() == pytest.approx([1, 1])
    little, much = ssim(clip + 0.02 * noise, clip, value_range=1), ssim(clip + 0.3 * noise, clip, value_range=1)
    assert bool((little > much + 0.2).all())


def test_ssim_of_two_constant_images_is_its_luminance_term() -> None:
    a, b, c1 = 0.6, 0.2, 0.01**2
    sample, reference = (torch.full((1, 1, 16, 16), value, dtype=torch.float64) for value in (a, b))
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert float(ssim(sample, reference, value_range=1)) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 10_000))
def test_frechet_distance_of_known_gaussians(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # covariances that commute have the closed form sum of (s1 - s2)² over the shared axes
    axes, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    s1, s2 = 0.1 + torch.rand(2, 4, dtype=torch.float64, generator=generator)
    m1, m2 = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    a = _exact_gaussian(60, m1, axes @ torch.diag(s1) @ axes.T)
    b = _exact_gaussian(90, m2, axes @ torch.diag(s2) @ axes.T)
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(300, 6, dtype=torch.float64, generator=generator) @ torch.randn(6, 6, generator=generator).double()
    b = torch.randn(200, 6, dtype=torch.float64, generator=generator) + 0.5
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    cross = linalg.sqrtm((ca @ cb).numpy()).real.trace()
    expected = float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace()) - 2 * float(cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_is_zero_for_equal_sets_symmetric_and_survives_a_singular_covariance() -> None:
    a = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    b = torch.cat((a[:, :2] + 1, torch.zeros(50, 1)), 1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert math.isfinite(frechet_distance(b, b))


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (torch.zeros(3, 3), "more samples"),
        (torch.zeros(9), "shape"),
        (torch.zeros(9, 3, dtype=torch.int64), "floating"),
        (torch.full((9, 3), torch.nan), "NaN"),
        (torch.zeros(9, 2), "same dimensions"),
    ],
)
def test_frechet_distance_refuses_what_has_none(features: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        frechet_distance(features, torch.randn(9, 3))


def test_a_still_background_has_no_motion_however_the_subject_moves() -> None:
    background = torch.rand(2, 1, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    video = background.repeat(1, 1, 4, 1, 1)
    subject = torch.zeros(2, 1, 4, 6, 6, dtype=torch.bool)
    for frame in range(4):
        subject[:, :, frame, frame] = True
    video = torch.where(subject, 5.0, video)
    assert background_motion(video, subject).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert bool((background_motion(video, torch.zeros_like(subject)) > 1).all())


def test_motion_is_the_standard_deviation_over_time() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    video = values.view(1, 1, 4, 1, 1).expand(1, 1, 4, 3, 3)
    subject = torch.zeros(1, 1, 4, 3, 3, dtype=torch.bool)
    subject[:, :, 3] = True
    assert float(background_motion(video, subject)) == pytest.approx(float(values[:3].std()))
    assert math.isnan(float(background_motion(video, torch.ones_like(subject))))


def test_accuracy() -> None:
    assert accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="non-empty"):
        accuracy(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        accuracy(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_unequal_pairs_are_refused(measure) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="one shape"):
        measure(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 17), value_range=1)
    with pytest.raises(ValueError, match="floating"):
        measure(torch.zeros(1, 1, 16, 16).int(), torch.zeros(1, 1, 16, 16), value_range=1)
    with pytest.raises(ValueError, match="positive"):
        measure(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), value_range=0)
