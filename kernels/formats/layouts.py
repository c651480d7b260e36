"""The same quantised tensor laid out otherwise: each conversion has a name and an inverse, and none rounds.

The canonical layout is :class:`~.format.Format`'s. Checkpoints and GEMMs know others: codes with the even element in
the high nibble, block scales in the tiles that cuBLAS reads, one outer scale of shape ``()``, and the weights of
several layers stacked into one. Nothing here guesses which layout a tensor has.

All but :func:`tensor_outer`, which looks at values, can be traced.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .format import format_of

TILE_ROWS, TILE_COLUMNS = 128, 4
"""cuBLAS reads block scales in tiles of 128 rows by 4 blocks."""
_GROUP = 32


def swap_nibbles(q: Tensor) -> Tensor:
    """Bytes of two FP4 codes with the two exchanged: even-low to even-high and back; its own inverse.

    Raises:
        TypeError: ``q`` is not uint8.
    """
    if q.dtype != torch.uint8:
        raise TypeError(f"bytes of two codes are uint8, got {q.dtype}")
    return (q << 4) | (q >> 4)


def swizzle_scales(scale: Tensor) -> Tensor:
    """Row-major block scales ``[rows, blocks]`` in the order of cuBLAS, padded with zero bytes to whole tiles.

    In a tile, the four scales of row r stand at ``16 * (r % 32) + 4 * (r // 32)``; tiles follow each other along the
    blocks, then along the rows.

    Args:
        scale: uint8 or float8_e4m3fn.

    Returns:
        One dimension, ``128 * ceil(rows / 128) * 4 * ceil(blocks / 4)`` elements of the same type, contiguous.

    Raises:
        TypeError: scales of another type.
        ValueError: ``scale`` is not a matrix.
    """
    if scale.dim() != 2:
        raise ValueError(f"scales are a matrix [rows, blocks], got shape {tuple(scale.shape)}")
    rows, blocks = scale.shape
    tiles_down, tiles_across = -(-rows // TILE_ROWS), -(-blocks // TILE_COLUMNS)
    padding = (0, tiles_across * TILE_COLUMNS - blocks, 0, tiles_down * TILE_ROWS - rows)
    tiles = F.pad(_bytes(scale), padding).view(tiles_down, TILE_ROWS // _GROUP, _GROUP, tiles_across, TILE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, blocks: int) -> Tensor:
    """The inverse of :func:`swizzle_scales`: row-major ``[rows, blocks]`` without the padding, contiguous.

    Args:
        swizzled: uint8 or float8_e4m3fn, any shape with the elements in that order.
        rows: Rows of the quantised tensor.
        blocks: Block scales of a row.

    Raises:
        TypeError: scales of another type.
        ValueError: the number of elements is not that of ``rows`` by ``blocks`` padded to tiles.
    """
    tiles_down, tiles_across = -(-rows // TILE_ROWS), -(-blocks // TILE_COLUMNS)
    expected = tiles_down * TILE_ROWS * tiles_across * TILE_COLUMNS
    if swizzled.numel() != expected:
        raise ValueError(f"[{rows}, {blocks}] scales swizzle to {expected} elements, got {swizzled.numel()}")
    tiles = _bytes(swizzled).reshape(tiles_down, tiles_across, _GROUP, TILE_ROWS // _GROUP, TILE_COLUMNS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(tiles_down * TILE_ROWS, tiles_across * TILE_COLUMNS)
    return padded[:rows, :blocks].contiguous().view(swizzled.dtype)


def row_outer(outer: Tensor, rows: Sequence[int | torch.SymInt]) -> Tensor:
    """A tensor's scale ``()`` (NVFP4's outer, or that of per-tensor INT8 and FP8) at each of its rows.

    Args:
        outer: float32, one element.
        rows: Shape of the quantised tensor without K.

    Returns:
        ``[*rows, 1]``, contiguous.

    Raises:
        ValueError: ``outer`` has more or less than one element.
    """
    if outer.numel() != 1:
        raise ValueError(f"a tensor has one outer scale, got shape {tuple(outer.shape)}")
    return outer.reshape(()).expand(*rows, 1).clone(memory_format=torch.contiguous_format)


def tensor_outer(outer: Tensor) -> Tensor:
    """The inverse of :func:`row_outer`: the one scale ``()`` that all rows of ``outer [..., 1]`` have.

    Raises:
        ValueError: there is no row, or two rows differ; each then needs its own.
    """
    if outer.numel() == 0:
        raise ValueError("no rows, so no outer scale")
    flat = outer.flatten()
    same = (flat == flat[0]) | (flat.isnan() & flat[0].isnan())
    if not bool(same.all()):
        row = int((~same).nonzero()[0, 0])
        raise ValueError(f"outer scales differ: {float(flat[0])} in row 0, {float(flat[row])} in row {row}")
    return flat[0].clone()


def concatenate(format: str, weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The parts of several weights stacked along N, as if one layer had their outputs side by side.

    Args:
        format: Their format's name.
        weights: The parts of each, rows ``[N_i, K]``; K is common.

    Returns:
        The parts of a weight ``[sum(N_i), K]``, contiguous.

    Raises:
        ValueError: unknown format, no weights, a wrong number of parts, or parts that do not fit together.
    """
    _check_parts(format, weights)
    return [_cat(parts) for parts in zip(*weights, strict=True)]


def split(format: str, parts: Sequence[Tensor], rows: Sequence[int]) -> list[list[Tensor]]:
    """The inverse of :func:`concatenate`: the parts of weights with ``rows`` rows each, contiguous copies.

    Raises:
        ValueError: unknown format, a wrong number of parts, or ``rows`` do not add up to those there are.
    """
    _check_parts(format, [parts])
    if sum(rows) != parts[0].shape[0]:
        raise ValueError(f"{parts[0].shape[0]} rows cannot be split into {list(rows)}")
    pieces = [[piece.clone() for piece in _bytes(part).split_with_sizes(list(rows))] for part in parts]
    return [
        [piece.view(part.dtype) for piece, part in zip(weight, parts, strict=True)]
        for weight in zip(*pieces, strict=True)
    ]


def _check_parts(format: str, weights: Sequence[Sequence[Tensor]]) -> None:
    described = format_of(format)
    if not weights or not all(weights):
        raise ValueError("no weights, or one without parts")
    K = weights[0][0].shape[-1] * (2 if format in ("mxfp4", "nvfp4") else 1)
    for i, parts in enumerate(weights):
        types = described.part_types((parts[0].shape[0], K))
        found = [(tuple(part.shape), part.dtype) for part in parts]
        if found != types:
            raise ValueError(f"weight {i} is no {format} weight with K = {K}: {types} expected, got {found}")


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([_bytes(part) for part in parts]).view(parts[0].dtype)


def _bytes(part: Tensor) -> Tensor:
    """Few operations know eight-bit floats; what only moves them takes their bytes."""
    return part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
