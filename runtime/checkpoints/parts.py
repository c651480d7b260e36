"""The parts of a stored weight: their shapes checked by header, their values checked and put in ditc's order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ditc.kernels.errors import CheckpointError
from ditc.kernels.formats import format_of, fp8_from_mxfp4, fp8_from_nvfp4, row_outer, swap_nibbles, unswizzle_scales

from .evidence import BLOCK
from .files import Checkpoint
from .module import QuantizedLinear
from .stored import StoredWeight

_FP4 = ("mxfp4", "nvfp4")
_PADDING = 16
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_RANGE = {"nvfp4": 6.0 * 448.0, "fp8": 448.0}


def check_shapes(module: str, weight: StoredWeight, N: int, K: int) -> None:
    """Refuses a stored weight that does not fit a linear layer of ``[N, K]``; looks at headers only.

    Some exporters pad the rows of a weight to a multiple of 16.

    Raises:
        CheckpointError: another shape, or a format that does not admit ``K``.
    """
    reason = format_of(weight.format).unsupported(K)
    if reason is not None:
        raise CheckpointError(f"{module} cannot be {weight.format}: {reason}")
    columns = K // 2 if weight.format in _FP4 else K
    heights = {N, -(-N // _PADDING) * _PADDING} if weight.format in BLOCK else {N}
    if len(weight.q.shape) != 2 or weight.q.shape[0] not in heights or weight.q.shape[1] != columns:
        raise CheckpointError(f"{weight.q} does not fit {module}, a {weight.format} layer of [{N}, {K}]")
    if weight.format not in BLOCK and weight.scale.shape not in {(), (1,), (1, 1), (N,), (N, 1)}:
        raise CheckpointError(f"{weight.scale} is no scale of {module}: one number or {N} are wanted")
    if weight.outer is not None and (weight.outer.dtype != torch.float32 or weight.outer.shape not in {(), (1,)}):
        raise CheckpointError(f"{weight.outer} is no second scale of {module}: one float32 number is wanted")
    _check_sides(module, weight, N, K)


def _check_sides(module: str, weight: StoredWeight, N: int, K: int) -> None:
    sides = dict(weight.sides)
    if ("lora_a" in sides) != ("lora_b" in sides):
        raise CheckpointError(
            f"{module} has one half of a branch of low rank: {(sides.get('lora_a') or sides['lora_b'])}"
        )
    rank = sides["lora_a"].shape[0] if "lora_a" in sides else None
    wanted: dict[str, tuple[tuple[int | None, ...], ...]] = {
        "input_scale": ((), (1,), (1, 1)),
        "pre_quant_scale": ((K,),),
        "lora_a": ((rank, K),),
        "lora_b": ((N, rank),),
        "zero_point": ((), (1,), (1, 1), (N,), (N, 1)),
    }
    for name, tensor in sides.items():
        if tensor.shape not in wanted[name]:
            raise CheckpointError(f"{tensor} does not fit {module}, a layer of [{N}, {K}]")
        if name != "zero_point" and tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{tensor} should hold floating point numbers")


def read_layer(
    checkpoint: Checkpoint,
    weight: StoredWeight,
    shape: tuple[int, int],
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    reencode: str | None,
) -> QuantizedLinear:
    """One quantised layer, its tensors read and checked.

    Args:
        checkpoint: where they are.
        weight: how they are stored; its shapes are checked and its layouts decided.
        shape: ``(N, K)`` of the layer.
        bias: ``[N]`` on ``device``.
        dtype: type of the layer that it replaces.
        device: where to put it.
        reencode: ``fp8`` turns 4-bit weights into row-wise FP8.

    Raises:
        CheckpointError: values that no quantiser writes: scales that are zero, negative or no number.
    """
    N, K = shape
    parts = _read_parts(checkpoint, weight, N, K)
    check_values(weight.q.key, weight.format, parts)
    sides = {name: checkpoint.read(tensor) for name, tensor in weight.sides.items()}
    if (zero_point := sides.pop("zero_point", None)) is not None and bool(zero_point.any()):
        raise CheckpointError(f"{weight.sides['zero_point']} is not zero: ditc reads symmetric quantisation only")
    for name, side in sides.items():
        positive = name in ("input_scale", "pre_quant_scale")
        _check_numbers(weight.sides[name].key, side, positive=positive)
    if "input_scale" in sides:
        sides["input_scale"] = sides["input_scale"].reshape(()).to(torch.float32)
    format, parts = weight.format, [part.to(device) for part in parts]
    if reencode is not None and format in _FP4:
        parts = _as_fp8(weight.q.key, format, parts)
        if "input_scale" in sides:  # the same range, with the other format's largest value
            sides["input_scale"] = sides["input_scale"] * (_RANGE[format] / _RANGE["fp8"])
        format = "fp8"
    return QuantizedLinear(parts, format, bias, dtype=dtype, **{name: side.to(device) for name, side in sides.items()})


def _read_parts(checkpoint: Checkpoint, weight: StoredWeight, N: int, K: int) -> list[Tensor]:
    q, scale = checkpoint.read(weight.q), checkpoint.read(weight.scale)
    if weight.format not in BLOCK:
        return [q, scale.to(torch.float32).reshape(-1, 1).expand(N, 1).contiguous()]
    rows, columns = q.shape[0], K // BLOCK[weight.format]
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if weight.scale_layout == "swizzled":
        scale = unswizzle_scales(scale, rows, columns)
    if q[N:].view(torch.uint8).any():
        raise CheckpointError(f"{weight.q} has rows beyond {N} that are not padding")
    q, scale = q[:N], scale[:N]
    if weight.nibbles == "even-high" and weight.format in _FP4:
        q = swap_nibbles(q)
    parts = [q.contiguous(), scale.contiguous()]
    if weight.format == "nvfp4":
        outer = torch.ones(()) if weight.outer is None else checkpoint.read(weight.outer)
        parts.append(row_outer(outer, (N,)))
    return parts


def _as_fp8(key: str, format: str, parts: Sequence[Tensor]) -> list[Tensor]:
    if format == "nvfp4":
        return fp8_from_nvfp4(parts)
    try:
        return fp8_from_mxfp4(parts)
    except ValueError as error:
        raise CheckpointError(f"{key} cannot become FP8 without loss: {error}") from error


def check_values(key: str, format: str, parts: Sequence[Tensor]) -> None:
    """Refuses parts of a weight that stand for no number.

    A block of NVFP4 may have a scale of zero where all its codes are zero: some quantisers store zeros so.

    Raises:
        CheckpointError: scales that are zero, negative or no number; codes that are no number.
    """
    q, scale = parts[0], parts[1]
    if q.dtype == torch.float8_e4m3fn and ((q.view(torch.uint8) & 0x7F) == 0x7F).any():
        raise CheckpointError(f"{key} holds codes that are no number")
    if format in ("mxfp4", "mxfp8"):
        if (scale == 255).any():
            raise CheckpointError(f"{key} has scales that are no number")
        return
    if format == "nvfp4":
        empty = (q.reshape(*scale.shape, -1) & 0x77).amax(dim=-1) == 0
        bits = scale.view(torch.uint8)
        if ((bits & 0x7F) == 0x7F).any() or (bits > 0x80).any() or (((bits & 0x7F) == 0) & ~empty).any():
            raise CheckpointError(f"{key} has scales of blocks that are zero, negative or no number")
    _check_numbers(f"the scale of {key}", parts[-1], positive=True)


def _check_numbers(what: str, tensor: Tensor, positive: bool) -> None:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{what} holds NaN or infinity")
    if positive and not (tensor > 0).all():
        raise CheckpointError(f"{what} is zero or negative: {tensor.min().item():g}")
