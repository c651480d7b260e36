"""The clips: deterministic, in range, of disjoint images, and what they are said to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn")

from ditc.distill.seeds import mix_seed, seeded
from ditc.examples.digits.data import (
    CLIP_SHAPE,
    FRAMES,
    SIZE,
    SUBJECT,
    Digits,
    draw_digits,
    load_digits,
    make_clips,
)
from ditc.examples.digits.evaluate import find_subject
from ditc.runtime.quality import background_motion


def test_the_parts_are_disjoint_complete_and_balanced() -> None:
    parts = [load_digits("teacher"), load_digits("classifier"), load_digits("held-out")]
    every = torch.cat([part.index for part in parts])
    assert sorted(every.tolist()) == list(range(1797))
    for part in parts:
        counts = torch.bincount(part.labels, minlength=10)
        assert int(counts.max() - counts.min()) <= 5


def test_no_image_of_one_part_is_a_copy_of_one_in_another() -> None:
    seen = {image.numpy().tobytes() for image in load_digits("teacher").images}
    assert not any(image.numpy().tobytes() in seen for image in load_digits("held-out").images)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher, classifier, held-out"):
        load_digits("test")  # type: ignore[arg-type]


@settings(max_examples=20)
@given(st.integers(0, 2**40), st.integers(1, 5))
def test_a_seed_is_a_clip(seed: int, count: int) -> None:
    digits = load_digits("teacher")
    clips, again = (make_clips(digits, count, seeded(seed)) for _ in range(2))
    assert torch.equal(clips.video, again.video)
    assert clips.video.shape == (count, *CLIP_SHAPE)
    assert clips.video.dtype == torch.float32
    assert float(clips.video.abs().max()) <= 1
    assert bool((clips.corners >= 0).all())
    assert bool((clips.corners <= SIZE - SUBJECT).all())
    # the digit is brighter than any background, so it can be told from it
    assert float(clips.background.max()) <= 0
    assert float(clips.video.amax((1, 2, 3, 4)).min()) > 0.5


def test_other_seeds_are_other_clips() -> None:
    digits = load_digits("teacher")
    assert not torch.equal(make_clips(digits, 2, seeded(0)).video, make_clips(digits, 2, seeded(1)).video)
    assert len({mix_seed(a, b) for a in range(40) for b in range(40)}) == 1600
    assert mix_seed(1, 2) != mix_seed(2, 1)


def test_making_clips_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    make_clips(load_digits("teacher"), 3, seeded(0))
    assert torch.equal(before, torch.get_rng_state())


def test_the_digit_moves_by_at_least_a_pixel_a_frame_unless_it_bounces_and_never_more_than_it_may() -> None:
    corners = make_clips(load_digits("teacher"), 200, seeded(4)).corners
    distance = corners.diff(dim=1).norm(dim=-1)
    assert float(distance.max()) <= 2.5 + 1e-4
    assert float(distance.median()) > 1
    turned = (corners.diff(dim=1).sign().diff(dim=1).abs() > 1).any(-1).any(-1)
    assert 0.3 < float(turned.float().mean()) < 1


def test_the_background_stands_still_and_balanced_clips_show_every_class() -> None:
    clips = make_clips(load_digits("held-out"), 40, seeded(5), balanced=True)
    assert torch.equal(clips.labels, torch.arange(40) % 10)
    subject = find_subject(clips.video)
    assert float(background_motion(clips.video, subject).max()) < 0.02
    assert 0.05 < float(subject.float().mean()) < 0.5
    outside = clips.video.masked_fill(subject, 0) - clips.background.expand_as(clips.video).masked_fill(subject, 0)
    assert float(outside.abs().max()) < 0.3


def test_moving_by_whole_pixels_shifts_the_picture() -> None:
    image = load_digits("teacher").images[:1]
    corners = torch.zeros(1, FRAMES, 2)
    corners[0, :, 0] = torch.arange(FRAMES)
    alpha = draw_digits(image, corners)
    for frame in range(1, FRAMES):
        torch.testing.assert_close(alpha[0, frame, frame:], alpha[0, 0, :-frame], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (torch.zeros(0, 8, 8), torch.zeros(0, dtype=torch.int64), "empty"),
        (torch.zeros(2, 8, 7), torch.zeros(2, dtype=torch.int64), "shape"),
        (torch.zeros(2, 8, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "floating"),
        (torch.full((2, 8, 8), torch.nan), torch.zeros(2, dtype=torch.int64), "NaN"),
        (torch.full((2, 8, 8), 16.0), torch.zeros(2, dtype=torch.int64), "divide"),
        (torch.zeros(2, 8, 8), torch.full((2,), 10), "0..9"),
    ],
)
def test_bad_digits_are_refused(images: torch.Tensor, labels: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Digits(images, labels, torch.arange(len(labels)))


def test_balanced_clips_of_incomplete_digits_are_refused() -> None:
    only_zero = Digits(torch.rand(3, 8, 8), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    with pytest.raises(ValueError, match="all ten"):
        make_clips(only_zero, 10, seeded(0), balanced=True)
    with pytest.raises(ValueError, match="at least 1"):
        make_clips(only_zero, 0, seeded(0))
