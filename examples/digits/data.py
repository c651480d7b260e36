"""Moving handwritten digits: short clips made on the fly from scikit-learn's 8x8 digits.

A clip is one digit, enlarged to half the frame, that moves at constant speed and bounces off the borders of a static
textured background. Everything random about a clip comes from one generator, so a seed is a clip.

The 1797 images are divided once, by their rank within their class, so the three parts are disjoint, balanced and the
same everywhere: the teacher learns from one, the classifier that judges it from another, and both are measured on the
third, which neither has seen.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES = 8
SIZE = 24
SUBJECT = 12
CLASSES = 10
CLIP_SHAPE = (1, FRAMES, SIZE, SIZE)

Split = Literal["teacher", "classifier", "held-out"]

# rank within the class, modulo ten: neighbours are by the same hand, so every part sees every writer
_PARTS: dict[Split, tuple[int, ...]] = {"teacher": (0, 2, 4, 6, 8), "classifier": (1, 5, 7), "held-out": (3, 9)}


@dataclass(frozen=True)
class Digits:
    """Handwritten digits: `images` (N, 8, 8) fp32 ink in [0, 1], `labels` and source `index` (N,) int64."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        n = len(self.labels)
        if n == 0:
            raise ValueError("digits are empty: at least one image is needed")
        if self.images.shape != (n, 8, 8) or not self.images.is_floating_point():
            raise ValueError(
                f"digit images must be floating point of shape ({n}, 8, 8), one per label; "
                f"got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if not bool(torch.isfinite(self.images).all()):
            raise ValueError("digit images hold NaN or infinity: ink must be finite, in [0, 1]")
        if float(self.images.min()) < 0 or float(self.images.max()) > 1:
            raise ValueError("digit images must be ink in [0, 1]; divide scikit-learn's 0..16 by 16")
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= CLASSES:
            raise ValueError(f"labels must be digits 0..{CLASSES - 1}")


@dataclass(frozen=True)
class Clips:
    """A batch of clips: `video` (B, 1, F, H, W) fp32 in [-1, 1], `labels` (B,) int64.

    `corners` (B, F, 2) fp32 is the top left corner (y, x) of the digit's box in pixels, `background` (B, 1, 1, H, W) is
    what lies behind it.
    """

    video: Tensor
    labels: Tensor
    corners: Tensor
    background: Tensor


@cache
def load_digits(split: Split) -> Digits:
    """The images of one part of scikit-learn's digits (UCI "Optical Recognition of Handwritten Digits", test half)."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {', '.join(get_args(Split))}; got {split!r}")
    try:
        from sklearn.datasets import load_digits as load_source
    except ImportError as error:
        raise ImportError("the digits come from scikit-learn: pip install 'ditc[demo]'") from error
    source = load_source()
    images = torch.from_numpy(source.images).to(torch.float32) / 16
    labels = torch.from_numpy(source.target).to(torch.int64)
    rank = torch.zeros_like(labels)
    for digit in range(CLASSES):
        of_class = labels == digit
        rank[of_class] = torch.arange(int(of_class.sum()))
    index = torch.isin(rank % 10, torch.tensor(_PARTS[split])).nonzero().squeeze(1)
    return Digits(images[index], labels[index], index)


def make_clips(
    digits: Digits, count: int, generator: torch.Generator, *, balanced: bool = False, warp: Tensor | None = None
) -> Clips:
    """Draw `count` clips of digits taken at random, or, `balanced`, of class i % 10 for clip i; see `draw_digits`."""
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    chosen = torch.randint(len(digits.labels), (count,), generator=generator)
    if balanced:
        pick = torch.rand(count, generator=generator)
        for i in range(count):
            of_class = (digits.labels == i % CLASSES).nonzero().squeeze(1)
            if len(of_class) == 0:
                raise ValueError(f"no image of the digit {i % CLASSES}: balanced clips need all ten")
            chosen[i] = of_class[int(pick[i] * len(of_class))]
    corners = _draw_paths(count, generator)
    background = _draw_backgrounds(count, generator)
    ink = 0.8 + 0.2 * torch.rand(count, 1, 1, 1, 1, generator=generator)
    alpha = draw_digits(digits.images[chosen], corners, warp).unsqueeze(1)
    video = background * (1 - alpha) + ink * alpha
    return Clips(video, digits.labels[chosen], corners, background)


def draw_digits(images: Tensor, corners: Tensor, warp: Tensor | None = None) -> Tensor:
    """Opacity (B, F, H, W) in [0, 1] of 8x8 `images` (B, 8, 8), bicubically enlarged, at `corners` (B, F, 2) in pixels.

    `warp` (B, 2, 2), for augmentation, maps offsets (x, y) from the centre of the drawn digit to those in its image.
    """
    count, frames = corners.shape[:2]
    pixel = torch.arange(SIZE, dtype=torch.float32) + 0.5
    # grid_sample's coordinates: -1 and 1 are the outer edges of the source image
    along = (pixel - corners.unsqueeze(-1)) * (2 / SUBJECT) - 1
    y, x = along[:, :, 0, :, None], along[:, :, 1, None, :]
    grid = torch.stack((x.expand(-1, -1, SIZE, -1), y.expand(-1, -1, -1, SIZE)), -1)
    # every frame of a clip shares its image: frames go below each other in one sampling grid
    grid = grid.reshape(count, frames * SIZE, SIZE, 2)
    if warp is not None:
        grid = torch.einsum("bhwj,bij->bhwi", grid, warp)
    alpha = F.grid_sample(images.unsqueeze(1), grid, mode="bicubic", align_corners=False)
    # the enlargement softens thin strokes: some gain keeps them opaque
    return (1.25 * alpha).clamp(0, 1).reshape(count, frames, SIZE, SIZE)


def _draw_paths(count: int, generator: torch.Generator) -> Tensor:
    room = float(SIZE - SUBJECT)
    start = room * torch.rand(count, 2, generator=generator)
    speed = 1.0 + 1.5 * torch.rand(count, 1, generator=generator)
    angle = 2 * math.pi * torch.rand(count, 1, generator=generator)
    velocity = speed * torch.cat((angle.sin(), angle.cos()), 1)
    straight = start.unsqueeze(1) + velocity.unsqueeze(1) * torch.arange(FRAMES).view(1, -1, 1)
    # bouncing between two walls is a triangle wave of the unbounded path
    return room - (straight.remainder(2 * room) - room).abs()


def _draw_backgrounds(count: int, generator: torch.Generator) -> Tensor:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angle, wavelength, phase = uniform(0, math.pi, 2, 1, 1), uniform(7, 18, 2, 1, 1), uniform(0, 2 * math.pi, 2, 1, 1)
    wave = torch.sin(2 * math.pi / wavelength * (x * angle.cos() + y * angle.sin()) + phase).sum(1)
    coarse = torch.randn(count, 1, 6, 6, generator=generator)
    cloud = F.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True).squeeze(1)
    level, contrast = uniform(-0.7, -0.35, 1, 1), uniform(0.06, 0.14, 1, 1)
    texture = level + contrast * (0.7 * wave + cloud)
    return texture.clamp(-1, 0).view(count, 1, 1, SIZE, SIZE)
