"""``ditc::attention_int8``: schema, shapes, and its meaning in plain torch.

Recipe (after SageAttention): keys lose their mean over tokens, which softmax does not see; queries and keys have one
scale for each token, values one for each channel; the weights are unsigned bytes, 255 for the largest of a row and a
block of keys. The normaliser adds up those bytes, not what they were rounded from: values that are all one give one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from ..formats.int8 import quantize_int8
from .visible import check_visible, hidden

MAX_HEAD = 256
"""Features of the widest head that the C++ kernel takes."""

TOLERANCE = 2.0e-2
"""Error against exact attention, relative to the output's norm, for values of the size of a Gaussian's: what 8 bits
for each of q, k, v and the weights cost. Outliers in a query or a value's channel cost more, and so do peaked rows:
a key whose weight is below 1/510 of the largest in its block of 128 keys counts nothing, so a long faint tail is lost,
and with it up to two per cent of the output's magnitude where scores have a standard deviation of 2."""

_BLOCK = 128
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

define(
    "ditc::attention_int8",
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask=None, bool causal=False, Tensor? blocks=None, "
    "int window=-1) -> Tensor",
    tags=_TAGS,
)


def attention_int8(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False,
    blocks: Tensor | None = None, window: int = -1,
) -> Tensor:  # fmt: skip
    """``softmax(q k^T * scale + mask) v`` on 8-bit integers.

    Args:
        q: float ``[B, H, Lq, D]``, any strides.
        k: float ``[B, G, Lk, D]`` of the same dtype, ``Lk > 0``; ``G`` divides ``H``, and query head ``h`` reads head
            ``h // (H / G)``.
        v: like ``k``.
        scale: what scores are multiplied by.
        mask: bool (true: is seen) or floating (is added to the scores), broadcasts to ``[B, H, Lq, Lk]``; what is
            broadcast is not written out, so hand it over unexpanded.
        causal: query i sees keys up to i, as in torch.
        blocks: bool ``[B, H, ceil(Lq / 64), ceil(Lk / 64)]``, which blocks of keys are looked at.
        window: query i sees keys from ``i - window`` to ``i + window``; -1 for all.

    Returns:
        ``[B, H, Lq, D]`` of the dtype of ``q``, laid out ``[B, Lq, H, D]``. A query that sees no key is zero. One that
        is no number makes its row NaN, a key all rows of its head, a value its channel, seen or not.

    Raises:
        ValueError: shapes do not fit, a head is wider than the kernel takes, or ``window`` is below -1.
        TypeError: a dtype is none of float32, bfloat16 and float16, or they differ, or a mask or map has another one.
    """
    y: Tensor = torch.ops.ditc.attention_int8(q, k, v, scale, mask, causal, blocks, window)
    return y


def attention_int8_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False,
    blocks: Tensor | None = None, window: int = -1,
) -> Tensor:  # fmt: skip
    """The meaning of :func:`attention_int8`, for every device, without tiles: it forms the matrix of scores."""
    B, H, Lq, _ = q.shape
    check_visible(B, H, Lq, k.shape[2], mask, causal, blocks, window)
    wide_k, wide_v = (x.float().repeat_interleave(H // k.shape[1], 1) for x in (k, v))
    q_codes, q_scale = quantize_int8(q.float())
    k_codes, k_scale = quantize_int8(wide_k - wide_k.mean(-2, keepdim=True))
    v_codes, v_scale = quantize_int8(wide_v.transpose(-1, -2))
    scores = q_codes.float() @ k_codes.float().transpose(-1, -2) * (q_scale * scale) * k_scale.transpose(-1, -2)
    scores = hidden(scores, mask, causal, blocks, window)
    top = _finite(scores.amax(-1, keepdim=True))
    total, out = torch.zeros_like(top), torch.zeros_like(q, dtype=torch.float32)
    for begin in range(0, k.shape[-2], _BLOCK):
        part, codes = scores[..., begin : begin + _BLOCK], v_codes[..., begin : begin + _BLOCK]
        peak = part.amax(-1, keepdim=True)
        weights = (255 * (part - _finite(peak)).exp()).round()
        share = (peak - top).exp()
        total += share * weights.sum(-1, keepdim=True)
        out += share * (weights @ codes.float().transpose(-1, -2))
    return _empty(q).copy_(out / total.masked_fill(total == 0, 1.0) * v_scale.transpose(-1, -2))


# on a CPU the kernel takes over once it is loaded
impl("ditc::attention_int8", "CompositeExplicitAutograd", attention_int8_reference)


@register_fake("ditc::attention_int8")  # type: ignore[untyped-decorator]
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False,
    blocks: Tensor | None = None, window: int = -1,
) -> Tensor:  # fmt: skip
    return _empty(q)


def _finite(peak: Tensor) -> Tensor:
    """Zero for the largest score of what is not seen at all."""
    return peak.masked_fill(peak == float("-inf"), 0.0)


def _empty(q: Tensor) -> Tensor:
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D)).transpose(1, 2)
