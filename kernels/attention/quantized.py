"""``ditc::attention_quantized``: attention on operands that are quantised already, and what quantises them.

The operands are parts of formats (:mod:`ditc.kernels.formats`), made by ``ditc::quantize`` in the graph, in front of
the attention: where a compiler takes that op apart, it fuses with the norm and RoPE that make queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import format_of
from ..formats.e2m1 import decode, encode
from ..formats.fp8 import E4M3_MAX, to_e4m3
from ..formats.ranges import SMALLEST_SCALE
from ..operands import FLOATS, check_float
from ..quantize import quantize as _registers_the_op  # noqa: F401
from .recipe import KEYS, QUERIES, VALUE_BLOCK, Recipe, recipe_of
from .visible import check_visible, hidden

_EXPONENT = 0x7F800000


class Operands(NamedTuple):
    """What :func:`attention_quantized` reads, for queries ``[B, H, Lq, D]`` and keys, values ``[B, G, Lk, D]``.

    ``q`` and ``k`` are parts along D (for NVFP4 padded with zeros to a multiple of 16); ``v`` parts along the tokens
    of ``[B, G, D, Lk]`` (for NVFP4 padded likewise), or for ``fp16`` float16 ``[B, G, Lk, D]`` and the power of two
    that each channel was divided by, float32 ``[B, G, D, 1]``. Scales are contiguous.

    ``bias`` is float32 ``[B, H, ceil(Lq / QUERIES), Lk]`` where queries are smoothed, added to the unscaled scores.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    bias: Tensor | None


def quantize_operands(q: Tensor, k: Tensor, v: Tensor, recipe: Recipe) -> Operands:
    """Smooths and quantises, in traceable torch: float32 arithmetic on ``ditc::quantize`` and what is around it.

    What is no number, NaN or an infinity, makes its query NaN, all keys of its head, or its channel of values.

    Args:
        q: ``[B, H, Lq, D]``, float32, bfloat16 or float16, any strides.
        k, v: ``[B, G, Lk, D]`` of the same dtype; ``G`` divides ``H``.
        recipe: one of :data:`RECIPES`, or a variant of one.

    Raises:
        TypeError: the dtypes differ or are none of the three.
        ValueError: shapes do not fit, a head has no features, or there are no keys.
    """
    _check_operands(q, k, v)
    wide_k = k.float() - k.float().mean(-2, keepdim=True) if recipe.smooth_keys else k.float()
    wide_q, bias = q.float(), None
    if recipe.smooth_queries:
        means = block_means(wide_q)
        wide_q = wide_q - repeat_blocks(means, q.shape[-2])
        bias = means @ heads_of(wide_k, q.shape[1]).mT
    values = quantize_values(v, recipe)
    return Operands(_quantize(wide_q, recipe.qk), _quantize(wide_k, recipe.qk), values, bias)


def quantize_values(v: Tensor, recipe: Recipe) -> list[Tensor]:
    """The values' part of :func:`quantize_operands`."""
    return _half(v) if recipe.pv == "fp16" else _quantize(v.mT, recipe.pv)


def block_means(q: Tensor) -> Tensor:
    """The mean of each :data:`QUERIES` tokens of float32 ``[B, H, L, D]``: ``[B, H, ceil(L / QUERIES), D]``.

    What is no number counts as zero: a bad query must not spoil those beside it, and any mean will do.
    """
    L = q.shape[-2]
    count = -(-L // QUERIES)
    finite = torch.where(q.isfinite(), q, 0.0)
    padded = torch.unflatten(F.pad(finite, (0, 0, 0, count * QUERIES - L)), -2, (count, QUERIES))
    sizes = (L - QUERIES * torch.arange(count, device=q.device)).clamp(max=QUERIES)
    return padded.sum(-2) / sizes.unsqueeze(-1)


def repeat_blocks(x: Tensor, L: int) -> Tensor:
    """``[..., ceil(L / QUERIES), n]`` with each row standing for its queries: ``[..., L, n]``."""
    wide = x.unsqueeze(-2).expand(*x.shape[:-1], QUERIES, x.shape[-1])
    return wide.flatten(-3, -2)[..., :L, :]


def heads_of(x: Tensor, H: int) -> Tensor:
    """``[B, G, L, D]`` with each of its heads repeated for the ``H / G`` query heads that share it."""
    return x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], 1)


def _check_operands(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_float(q, "q")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}: one type is wanted")
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError("queries, keys and values have four dimensions [B, H, L, D]")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit each other"
        )
    _check_sizes(q.shape[1], k.shape[1], k.shape[2], q.shape[3])


def _check_sizes(H: int, G: int, Lk: int, D: int) -> None:
    if G == 0 or H % G:
        raise ValueError(f"{H} heads of queries cannot share {G} heads of keys")
    if D == 0 or Lk == 0:
        raise ValueError("attention needs keys, and heads with features")


def _half(v: Tensor) -> list[Tensor]:
    """The values in float16, and what each channel was divided by: the power of two below its largest magnitude."""
    wide = v.float()
    amax = wide.abs().amax(-2, keepdim=True)
    scale = (amax.view(torch.int32) & _EXPONENT).view(torch.float32).clamp(min=SMALLEST_SCALE)
    # inf - inf is NaN: the channel of what is no number has a NaN scale
    return [(wide * (1.0 / scale)).half(), (scale + (amax - amax)).mT.contiguous()]


def _quantize(x: Tensor, format: str) -> list[Tensor]:
    block = format_of(format).block
    if block is not None and x.shape[-1] % block:
        x = F.pad(x, (0, -x.shape[-1] % block))
    parts: list[Tensor] = torch.ops.ditc.quantize(x, format)
    return parts


def attention_quantized_reference(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    recipe: str,
    scale: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    blocks: Tensor | None = None,
    window: int = -1,
) -> Tensor:
    """``softmax(q k^T * scale) v`` with weights rounded to the recipe's format, tile of :data:`KEYS` keys by tile.

    Weights are ``exp(score - largest score of the row so far)``, so at most one, times what fills their format
    (448 for FP8; 448 * 6 for NVFP4, whose blocks of 16 keys have an E4M3 scale each). What they are divided by in the
    end is the sum of the weights as rounded. A row that sees no key is zero, as in torch.

    Args:
        q, k, v, bias: as in :class:`Operands`.
        recipe: a name in :data:`RECIPES`.
        scale: what scores are multiplied by.
        dtype: of the result.
        mask, causal, blocks, window: what is seen, see :func:`ditc.kernels.attention.visible.check_visible`; a mask
            is added to the scaled scores.

    Returns:
        ``[B, H, Lq, D]`` in ``dtype``, laid out ``[B, Lq, H, D]``.

    Raises:
        TypeError, ValueError: types or shapes do not fit, a head has no features, or there are no keys.
    """
    found = recipe_of(recipe)
    check_quantized(q, k, v, found, dtype, bias, mask, causal, blocks, window)
    return attend(q, k, v, found, scale, dtype, bias, mask, causal, blocks, window)


def attend(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], recipe: Recipe, scale: float, dtype: torch.dtype,
    bias: Tensor | None, mask: Tensor | None, causal: bool, blocks: Tensor | None, window: int,
    *, exact_sum: bool = False,
) -> Tensor:  # fmt: skip
    """The meaning of the op for any :class:`Recipe`; ``exact_sum`` divides by the weights before rounding instead."""
    B, H, Lq = q[0].shape[:3]
    queries = format_of(recipe.qk).dequantize(list(q))
    keys = heads_of(format_of(recipe.qk).dequantize(list(k)), H)
    Lk = keys.shape[-2]
    values = v[0].float() * v[1].mT if recipe.pv == "fp16" else format_of(recipe.pv).dequantize(list(v))[..., :Lk].mT
    values = heads_of(values, H)
    top = torch.full((B, H, Lq, 1), float("-inf"), device=queries.device)
    total, out = torch.zeros_like(top), torch.zeros(B, H, Lq, values.shape[-1], device=queries.device)
    for begin in range(0, Lk, KEYS):
        end = min(begin + KEYS, Lk)
        scores = queries @ keys[..., begin:end, :].mT
        if bias is not None:
            scores = scores + repeat_blocks(bias[..., begin:end], Lq)
        scores = hidden(scores * scale, mask, causal, blocks, window, first_key=begin)
        now = torch.maximum(top, scores.amax(-1, keepdim=True))
        # a row that has seen nothing yet has no largest score
        base = now.masked_fill(now == float("-inf"), 0.0)
        weights, share = (scores - base).exp(), (top - base).exp()
        rounded = round_weights(weights, recipe.pv)
        total = total * share + (weights if exact_sum else rounded).sum(-1, keepdim=True)
        out = out * share + rounded @ values[..., begin:end, :]
        top = now
    y = out / total.masked_fill(total == 0, 1.0)
    return y.new_empty((B, Lq, H, y.shape[-1]), dtype=dtype).transpose(1, 2).copy_(y)


def round_weights(weights: Tensor, format: str) -> Tensor:
    """Softmax weights ``[..., n]``, float32 of at most one, as the format holds them."""
    if format == "fp16":
        return weights.half().float()
    if format == "fp8":
        return to_e4m3(weights * E4M3_MAX).float() / E4M3_MAX
    n = weights.shape[-1]
    full = 6 * E4M3_MAX
    x = torch.unflatten(F.pad(weights * full, (0, -n % VALUE_BLOCK)), -1, (-1, VALUE_BLOCK))
    scale = to_e4m3((x.amax(-1, keepdim=True) / 6).clamp(min=2.0**-9)).float()
    return (decode(encode(x / scale)) * scale).flatten(-2)[..., :n] / full


def check_quantized(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], recipe: Recipe, dtype: torch.dtype,
    bias: Tensor | None, mask: Tensor | None, causal: bool, blocks: Tensor | None, window: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    """The shape of the result; ValueError or TypeError where the operands do not fit each other."""
    if dtype not in FLOATS:
        raise TypeError(f"the result is float32, bfloat16 or float16, not {dtype}")
    if not (q and k and v) or any(x.dim() != 4 for x in (q[0], k[0], v[0])):
        raise ValueError("queries, keys and values have parts of four dimensions [B, H, L, D]")
    (B, H, Lq, _), (_, G, Lk, _) = q[0].shape, k[0].shape
    D = v[0].shape[3] if recipe.pv == "fp16" else v[0].shape[2]
    _check_sizes(H, G, Lk, D)
    _check_parts("queries", q, _part_types((B, H, Lq, D), recipe.qk))
    _check_parts("keys", k, _part_types((B, G, Lk, D), recipe.qk))
    _check_parts("values", v, _value_types(B, G, Lk, D, recipe.pv))
    if (bias is not None) != recipe.smooth_queries:
        raise ValueError(f"{recipe.name} {'needs a' if recipe.smooth_queries else 'has no'} bias")
    if bias is not None:
        _check_parts("the bias", [bias], [((B, H, -(-Lq // QUERIES), Lk), torch.float32)])
    check_visible(B, H, Lq, Lk, mask, causal, blocks, window)
    return B, H, Lq, D


_Types = list[tuple[tuple[int | torch.SymInt, ...], torch.dtype]]


def _part_types(shape: tuple[int, ...], format: str) -> _Types:
    """Shapes and types of the parts of a tensor whose rows are padded to whole blocks."""
    found = format_of(format)
    padded = shape[-1] if found.block is None else shape[-1] + -shape[-1] % found.block
    return found.part_types((*shape[:-1], padded))


def _value_types(B: int, G: int, Lk: int, D: int, format: str) -> _Types:
    if format == "fp16":
        return [((B, G, Lk, D), torch.float16), ((B, G, D, 1), torch.float32)]
    return _part_types((B, G, D, Lk), format)


def _check_parts(name: str, parts: Sequence[Tensor], wanted: _Types) -> None:
    if len(parts) != len(wanted):
        raise ValueError(f"{name} have {len(wanted)} parts, got {len(parts)}")
    for part, (shape, dtype) in zip(parts, wanted, strict=True):
        if part.dtype != dtype:
            raise TypeError(f"{name}: a part is {part.dtype}, {dtype} is wanted")
        if part.shape != shape:
            raise ValueError(f"{name}: a part has shape {tuple(part.shape)}, {tuple(shape)} is wanted")


attention_quantized = torch.library.custom_op(
    "ditc::attention_quantized",
    attention_quantized_reference,
    mutates_args=(),
    schema="(Tensor[] q, Tensor[] k, Tensor[] v, str recipe, float scale, ScalarType dtype, Tensor? bias=None, "
    "Tensor? mask=None, bool causal=False, Tensor? blocks=None, int window=-1) -> Tensor",
)


@attention_quantized.register_fake
def _(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    recipe: str,
    scale: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    blocks: Tensor | None = None,
    window: int = -1,
) -> Tensor:
    B, H, Lq, D = check_quantized(q, k, v, recipe_of(recipe), dtype, bias, mask, causal, blocks, window)
    return q[0].new_empty((B, Lq, H, D), dtype=dtype).transpose(1, 2)
