"""Pictures of clips for people: a contact sheet and an animation, labelled and enlarged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

_PAPER = (250, 250, 248)
_INK = (40, 40, 44)
_MARGIN = 14
_GAP = 3
_GROUP_GAP = 22
_LABEL = 16
_TINT = (235, 110, 40)
_TINTED = 110


def contact_sheet(
    groups: Mapping[str, Tensor], rows: Sequence[str], *, frames: Sequence[int], scale: int = 3
) -> Image.Image:
    """One row for each clip, one block of columns for each group, showing `frames` of the clips.

    Args:
        groups: title -> clips (N, 1, F, H, W) in [-1, 1]; the same N everywhere.
        rows: N labels.
        frames: indices of the frames to show.
        scale: enlargement, in pixels for a pixel.
    """
    clips = _check(groups, rows)
    if not frames or max(frames) >= clips[0].shape[2] or min(frames) < 0:
        raise ValueError(f"frames must be indices below {clips[0].shape[2]}, at least one; got {list(frames)}")
    height, width = (scale * n for n in clips[0].shape[-2:])
    font = ImageFont.load_default(_LABEL)
    gutter = _MARGIN + max(int(font.getlength(row)) for row in rows) + 10
    block = len(frames) * (width + _GAP) - _GAP
    top = _MARGIN + _LABEL + 10
    sheet = Image.new(
        "RGB",
        (
            gutter + len(clips) * (block + _GROUP_GAP) - _GROUP_GAP + _MARGIN,
            top + len(rows) * (height + _GAP) + _MARGIN,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(rows):
        draw.text((gutter - 10, top + row * (height + _GAP) + height // 2), label, _INK, font, anchor="rm")
    for group, (title, video) in enumerate(zip(groups, clips, strict=True)):
        left = gutter + group * (block + _GROUP_GAP)
        draw.text((left, _MARGIN), title, _INK, font)
        pixels = enlarge(video, scale)
        for row in range(len(rows)):
            for column, frame in enumerate(frames):
                image = Image.fromarray(pixels[row, frame].numpy())
                sheet.paste(image, (left + column * (width + _GAP), top + row * (height + _GAP)))
    return sheet


def animate(groups: Mapping[str, Tensor], columns: Sequence[str], *, scale: int = 4) -> list[Image.Image]:
    """The frames of an animation: one row for each group, one column for each of its clips.

    Args:
        groups: title -> clips (N, 1, F, H, W) in [-1, 1]; the same N and F everywhere.
        columns: N labels.
        scale: enlargement, in pixels for a pixel.
    """
    clips = _check(groups, columns)
    height, width = (scale * n for n in clips[0].shape[-2:])
    font = ImageFont.load_default(_LABEL)
    gutter = _MARGIN + max(int(font.getlength(title)) for title in groups) + 10
    top = _MARGIN + _LABEL + 8
    size = (gutter + len(columns) * (width + _GAP) + _MARGIN, top + len(clips) * (height + _GAP) + _MARGIN)
    pixels = [enlarge(video, scale) for video in clips]
    pictures = []
    for frame in range(clips[0].shape[2]):
        picture = Image.new("RGB", size, _PAPER)
        draw = ImageDraw.Draw(picture)
        for column, label in enumerate(columns):
            draw.text((gutter + column * (width + _GAP) + width // 2, _MARGIN), label, _INK, font, anchor="mt")
        for row, title in enumerate(groups):
            upper = top + row * (height + _GAP)
            draw.text((gutter - 10, upper + height // 2), title, _INK, font, anchor="rm")
            for column in range(len(columns)):
                image = Image.fromarray(pixels[row][column, frame].numpy())
                picture.paste(image, (gutter + column * (width + _GAP), upper))
        pictures.append(picture)
    return pictures


def overlay_chunks(clip: Tensor, maps: Mapping[str, Tensor], *, frames: Sequence[int], scale: int = 4) -> Image.Image:
    """A clip with the chunks that were computed in a tint: one row for each map, one column for each frame.

    Args:
        clip: (1, F, H, W) in [-1, 1].
        maps: label, such as a step, -> bool (frames, height, width) in chunks, which divide the clip's axes.
        frames: indices of the frames to show.
        scale: enlargement, in pixels for a pixel.
    """
    if not maps or clip.ndim != 4 or clip.shape[0] != 1:
        raise ValueError(f"one clip (1, F, H, W) and at least one map are wanted; got {tuple(clip.shape)}, {len(maps)}")
    if not frames or max(frames) >= clip.shape[1] or min(frames) < 0:
        raise ValueError(f"frames must be indices below {clip.shape[1]}, at least one; got {list(frames)}")
    height, width = (scale * n for n in clip.shape[-2:])
    font = ImageFont.load_default(_LABEL)
    gutter = _MARGIN + max(int(font.getlength(label)) for label in maps) + 10
    size = (
        gutter + len(frames) * (width + _GAP) - _GAP + _MARGIN,
        2 * _MARGIN + len(maps) * (height + _GAP) - _GAP,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    pixels = enlarge(clip[None], scale)[0]
    for row, (label, chunks) in enumerate(maps.items()):
        top = _MARGIN + row * (height + _GAP)
        draw.text((gutter - 10, top + height // 2), label, _INK, font, anchor="rm")
        tinted = spread_chunks(chunks, clip.shape[1:])
        for column, frame in enumerate(frames):
            grey = Image.fromarray(pixels[frame].numpy()).convert("RGB")
            mask = Image.fromarray((tinted[frame].to(torch.uint8) * _TINTED).numpy()).resize(
                grey.size, Image.Resampling.NEAREST
            )
            grey.paste(Image.new("RGB", grey.size, _TINT), mask=mask)
            sheet.paste(grey, (gutter + column * (width + _GAP), top))
    return sheet


def spread_chunks(chunks: Tensor, sizes: Sequence[int]) -> Tensor:
    """A map of chunks (f, h, w), bool, as one of pixels (F, H, W)."""
    if chunks.ndim != 3 or any(size % part for size, part in zip(sizes, chunks.shape, strict=True)):
        raise ValueError(f"chunks (f, h, w) must divide a clip's {tuple(sizes)}; got {tuple(chunks.shape)}")
    for dim, size in enumerate(sizes):
        chunks = chunks.repeat_interleave(size // chunks.shape[dim], dim)
    return chunks


def save_animation(pictures: Sequence[Image.Image], path: Path, *, milliseconds: int = 130) -> None:
    """Write an endless GIF that plays forward and then backward, so that the digits do not jump."""
    if len(pictures) < 2:
        raise ValueError(f"an animation needs at least 2 frames; got {len(pictures)}")
    there_and_back = [*pictures, *pictures[-2:0:-1]]
    shades = [picture.quantize(64, dither=Image.Dither.NONE) for picture in there_and_back]
    shades[0].save(path, save_all=True, append_images=shades[1:], duration=milliseconds, loop=0)


def enlarge(video: Tensor, scale: int) -> Tensor:
    """Clips (N, 1, F, H, W) in [-1, 1] -> (N, F, scale*H, scale*W) uint8, bicubic."""
    smooth = F.interpolate(video.float().cpu().squeeze(1), scale_factor=scale, mode="bicubic", align_corners=False)
    return ((smooth.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _check(groups: Mapping[str, Tensor], labels: Sequence[str]) -> list[Tensor]:
    clips = list(groups.values())
    if not clips or not labels:
        raise ValueError("a picture needs at least one group of clips and one label")
    for title, video in groups.items():
        if video.ndim != 5 or video.shape[1] != 1 or len(video) != len(labels) or video.shape != clips[0].shape:
            raise ValueError(
                f"every group must be ({len(labels)}, 1, F, H, W), one clip for each label and all alike; "
                f"{title!r} is {tuple(video.shape)}"
            )
    return clips
