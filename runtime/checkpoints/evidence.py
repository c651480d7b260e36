"""In which order 4-bit codes and scales of blocks lie: from what the metadata say, from shapes, or from the caller.

A wrong guess gives a model that runs and draws noise, so where nothing decides, nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ditc.kernels.errors import CheckpointError

from .stored import StoredWeight

BLOCK = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
"""Values that share a scale, for the formats that have blocks."""

SCALE_LAYOUTS = ("linear", "swizzled")
NIBBLES = ("even-low", "even-high")


@dataclass(frozen=True)
class Choice:
    """What the caller says about the layout; it goes before what the metadata say."""

    scale_layout: str | None = None
    nibbles: str | None = None

    def __post_init__(self) -> None:
        if self.scale_layout not in (None, *SCALE_LAYOUTS):
            raise CheckpointError(f"scale_layout is one of {', '.join(SCALE_LAYOUTS)}; got {self.scale_layout!r}")
        if self.nibbles not in (None, *NIBBLES):
            raise CheckpointError(f"nibbles is one of {', '.join(NIBBLES)}; got {self.nibbles!r}")


def decide(weights: Mapping[str, StoredWeight], choice: Choice) -> dict[str, StoredWeight]:
    """The weights with their layouts decided.

    One exporter writes all layers of a checkpoint alike: where the metadata are silent and one layer's shape admits
    both readings, the layers whose shape admits one only speak for it.

    Raises:
        CheckpointError: both readings fit and nothing decides, or none fits.
    """
    blocked = {module: weight for module, weight in weights.items() if weight.format in BLOCK}
    fitting = {module: _fitting(module, weight) for module, weight in blocked.items()}
    witnesses = {next(iter(fits)): module for module, fits in fitting.items() if len(fits) == 1}
    decided = dict(weights)
    for module, weight in blocked.items():
        said = choice.scale_layout or weight.scale_layout
        layout = said or _undisputed(module, weight, fitting[module], witnesses)
        if layout not in fitting[module]:
            by = "the keyword scale_layout" if choice.scale_layout else "the metadata" if said else "another layer"
            raise CheckpointError(
                f"{module}: {weight.scale} is {fitting[module].pop()} by its shape, but {layout} by {by}"
            )
        nibbles = choice.nibbles or weight.nibbles
        if nibbles is None and weight.format != "mxfp8":
            raise CheckpointError(
                f"{module}: {weight.q} holds two 4-bit codes a byte, and no metadata say which comes first. Either "
                "the even element is in the low nibble (modelopt, torchao) or in the high one (ComfyUI, FLUX.2-NVFP4): "
                'say nibbles="even-low" or nibbles="even-high"'
            )
        decided[module] = replace(weight, scale_layout=layout, nibbles=nibbles)
    return decided


def swizzled_shape(rows: int, columns: int) -> tuple[int, int]:
    """The padded shape that swizzled scales of ``[rows, columns]`` blocks have."""
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def _undisputed(module: str, weight: StoredWeight, fits: set[str], witnesses: Mapping[str, str]) -> str:
    if len(fits) == 1:
        return next(iter(fits))
    if len(witnesses) == 1:
        return next(iter(witnesses))
    rows, columns = _blocks(weight)
    if witnesses:
        others = f", and the layers {witnesses['linear']} and {witnesses['swizzled']} contradict each other"
    else:
        others = " and no other layer decides"
    raise CheckpointError(
        f"{module}: {weight.scale} can be read as {rows} x {columns} scales in rows (linear) or in the tiles of "
        f"128 x 4 that cuBLAS wants (swizzled); the metadata do not say which{others}: say "
        'scale_layout="linear" or scale_layout="swizzled"'
    )


def _blocks(weight: StoredWeight) -> tuple[int, int]:
    values = weight.q.shape[1] * (1 if weight.format == "mxfp8" else 2)
    return weight.q.shape[0], values // BLOCK[weight.format]


def _fitting(module: str, weight: StoredWeight) -> set[str]:
    """The layouts in which the stored scales have the right shape."""
    if len(weight.q.shape) != 2:
        raise CheckpointError(f"{module}: {weight.q} is no matrix")
    rows, columns = _blocks(weight)
    padded_rows, padded_columns = swizzled_shape(rows, columns)
    tiles = padded_rows // 128 * (padded_columns // 4)
    swizzled = (
        (padded_rows, padded_columns),
        (padded_rows * padded_columns,),
        (padded_rows // 4, padded_columns * 4),  # as torchao stores them
        (tiles, 32, 16),
    )
    fits = {"linear"} if weight.scale.shape == (rows, columns) else set()
    fits |= {"swizzled"} if weight.scale.shape in swizzled else set()
    if not fits:
        raise CheckpointError(
            f"{module}: {weight.scale} fits {weight.q} in no layout: {[rows, columns]} in rows or "
            f"{[padded_rows, padded_columns]} swizzled are wanted"
        )
    return fits
