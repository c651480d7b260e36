"""Attention on quantised operands: against float64 attention on what they stand for (tight, element by element) and on
the originals (stated bounds)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditc.kernels.attention import (
    QUERIES,
    RECIPES,
    SPARSE_BLOCK,
    Operands,
    Recipe,
    attend,
    attention_blocks,
    attention_quantized,
    hidden,
    quantize_operands,
    quantized,
    recipe_of,
)
from ditc.kernels.formats import format_of, sqnr

INF, NAN = float("inf"), float("nan")
NAMES = sorted(RECIPES)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Normal = Callable[..., Tensor]
Visible = dict[str, Any]


def attention(
    q: Tensor, k: Tensor, v: Tensor, name: str, scale: float | None = None, dtype: torch.dtype | None = None,
    **visible: Any,
) -> Tensor:  # fmt: skip
    """The op behind its quantiser."""
    parts = quantize_operands(q, k, v, RECIPES[name])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    y: Tensor = attention_quantized(parts.q, parts.k, parts.v, name, scale, dtype or q.dtype, parts.bias, **visible)
    return y


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Any = 0.0, **visible: Any) -> Tensor:
    """In float64; zero where a row sees nothing."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = (q.double() @ k.mT + bias) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = seen(scores, **visible).softmax(-1)
    return weights.nan_to_num(0.0) @ v


def seen(
    scores: Tensor, mask: Tensor | None = None, causal: bool = False, blocks: Tensor | None = None, window: int = -1
) -> Tensor:
    return hidden(
        scores, None if mask is None or mask.dtype == torch.bool else mask.double(), causal, blocks, window
    ) + (
        hidden(torch.zeros_like(scores), mask, False, None, -1) if mask is not None and mask.dtype == torch.bool else 0
    )


def read_back(parts: Operands, recipe: Recipe, shape: torch.Size, Lk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values that the parts stand for, and the bias of each query, in float64."""
    B, H, Lq, D = shape
    q, k = (format_of(recipe.qk).dequantize(p).double()[..., :D] for p in (parts.q, parts.k))
    if recipe.pv == "fp16":
        v = parts.v[0].double() * parts.v[1].double().mT
    else:
        v = format_of(recipe.pv).dequantize(parts.v).double()[..., :Lk].mT
    bias = torch.zeros(B, H, Lq, Lk, dtype=torch.float64)
    if parts.bias is not None:
        bias += parts.bias.double().repeat_interleave(QUERIES, -2)[..., :Lq, :]
    return q, k, v, bias


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float, Visible]:
    """Operands, the scale of the scores, and what is seen."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    B, G, D = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 256))
    H, Lq = G * draw(st.integers(1, 3)), draw(st.integers(1, 150))
    window = draw(st.sampled_from([-1, -1, -1, 0, 3, 90]))
    Lk = Lq if window >= 0 else draw(st.integers(1, 200))
    dtype = draw(st.sampled_from(FLOATS))
    q, k, v = (torch.randn(B, L, h, D, generator=generator).to(dtype) for L, h in ((Lq, H), (Lk, G), (Lk, G)))
    if draw(st.booleans()):
        k = k + 10 * torch.randn(D, generator=generator).to(dtype)
    if draw(st.booleans()):
        v[..., draw(st.integers(0, D - 1))] *= 30
    sizes = [draw(st.sampled_from([1, n])) for n in (B, H, Lq, Lk)][draw(st.integers(0, 4)) :]
    kind = draw(st.sampled_from(["none", "bool", "floating", "key padding"]))
    mask = None
    if kind == "bool":
        mask = torch.rand(sizes, generator=generator) < draw(st.sampled_from([0.1, 0.8]))
    elif kind == "floating":
        mask = torch.randn(sizes, generator=generator).masked_fill(torch.rand(sizes, generator=generator) < 0.3, -INF)
        mask = mask.to(dtype)
    elif kind == "key padding":
        mask = (torch.arange(Lk) < torch.randint(0, Lk + 1, (B, 1), generator=generator)).view(B, 1, 1, Lk)
    blocks = None
    if draw(st.booleans()):
        blocks = torch.rand(B, H, -(-Lq // SPARSE_BLOCK), -(-Lk // SPARSE_BLOCK), generator=generator) < 0.7
    visible = {"mask": mask, "causal": draw(st.booleans()), "blocks": blocks, "window": window}
    scale = draw(st.sampled_from([1e-3, 0.3, 1.0, 4.0])) * D**-0.5
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, visible


def rounding_errors(weights: Tensor, format: str) -> Tensor:
    """Bound of the error of each weight ``[..., n]``, float64 of at most one, from the definition of its format."""
    if format == "fp16":
        return torch.maximum(weights * 2.0**-11, torch.tensor(2.0**-25))
    if format == "fp8":
        return torch.maximum(weights * 2.0**-4, torch.tensor(2.0**-10 / 448))
    # a fifth above the smallest code (5 reads as 4 or 6), a quarter of the block's scale below it; a scale is rounded
    # by a sixteenth
    n = weights.shape[-1]
    block = F.pad(weights, (0, -n % 16)).unflatten(-1, (-1, 16)).amax(-1, keepdim=True)
    scale = (block / 6 * (1 + 1 / 16)).clamp(min=2.0**-9 / 2688).expand(*block.shape[:-1], 16).flatten(-2)[..., :n]
    return torch.maximum(weights / 5, scale / 4)


@settings(deadline=None, max_examples=60)
@given(problems(), st.sampled_from(NAMES))
def test_is_attention_on_what_the_operands_stand_for(
    problem: tuple[Tensor, Tensor, Tensor, float, Visible], name: str
) -> None:
    """Each element is as near as the rounding of the weights allows; without that rounding, as near as float32 is."""
    q, k, v, scale, visible = problem
    recipe, groups = RECIPES[name], q.shape[1] // k.shape[1]
    parts = quantize_operands(q, k, v, recipe)
    read_q, read_k, read_v, bias = read_back(parts, recipe, q.shape, k.shape[2])
    wanted = exact(read_q, read_k, read_v, scale, bias, **visible)
    y = attention_quantized(parts.q, parts.k, parts.v, name, scale, torch.float32, parts.bias, **visible)
    assert y.shape == q.shape and y.dtype == torch.float32

    wide_k, wide_v = (x.repeat_interleave(groups, 1) for x in (read_k, read_v))
    raw = (read_q @ wide_k.mT + bias) * scale
    scores = seen(raw, **visible)
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = (scores - top).exp()
    # float32 scores, and what exp makes of their error
    size = (read_q.norm(dim=-1, keepdim=True) * wide_k.norm(dim=-1).unsqueeze(-2) + bias.abs()) * scale
    float32 = 4e-7 * (size.amax(-1, keepdim=True) + top.abs().clamp(max=1e6) * (top > -1e29) + 4)
    errors = rounding_errors(weights, recipe.pv) * (scores > -INF)
    total = weights.sum(-1, keepdim=True)

    def bound(each: Tensor) -> Tensor:
        spread = each @ wide_v.abs() + each.sum(-1, keepdim=True) * wanted.abs()
        return spread / (total - each.sum(-1, keepdim=True)).clamp(
            min=1e-3 * total + 1e-300
        ) + 1e-6 * wide_v.abs().amax(-2, True)

    assert bool(((y - wanted).abs() <= bound(errors + float32 * weights)).all())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "round_weights", lambda weights, format: weights)
        unrounded = attend(*parts[:3], recipe, scale, torch.float32, parts.bias, **visible)
    assert bool(((unrounded - wanted).abs() <= bound(float32 * weights)).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [64, 128])
def test_keeps_what_its_recipe_states(normal: Normal, name: str, D: int) -> None:
    recipe = RECIPES[name]
    for seed in range(0, 6, 3):
        q, k, v = (normal(1, 2, 1024, D, seed=seed + i) for i in range(3))
        found = sqnr(exact(q, k, v), attention(q, k, v, name))
        # neither broken promises nor modest ones
        assert recipe.sqnr <= found <= recipe.sqnr + 2


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(NAMES), st.integers(32, 256), st.integers(40, 300), st.integers(30, 300),
    st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from(FLOATS), st.integers(0, 2**30),
)  # fmt: skip
def test_stays_within_its_tolerance(
    name: str, D: int, Lq: int, Lk: int, deviation: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, L, D, generator=generator).to(dtype) for L in (Lq, Lk, Lk))
    scale = deviation * D**-0.5
    w, y = exact(q, k, v, scale), attention(q, k, v, name, scale, torch.float32).double()
    tolerance = RECIPES[name].tolerance
    assert float((y - w).abs().sum() / w.abs().sum()) <= tolerance.relative_l1
    assert float(F.cosine_similarity(y.flatten(), w.flatten(), dim=0)) >= tolerance.cosine
    assert abs(float((y * w).sum() / w.square().sum()) - 1) <= tolerance.magnitude


@settings(deadline=None, max_examples=40)
@given(problems(), st.sampled_from(NAMES))
def test_values_of_one_give_one(problem: tuple[Tensor, Tensor, Tensor, float, Visible], name: str) -> None:
    """The normaliser adds up the weights as they were rounded; rows that see nothing are zero, as in torch."""
    q, k, v, scale, visible = problem
    y = attention(q, k, torch.ones_like(v), name, scale, torch.float32, **visible)
    sees = (seen(torch.zeros(*q.shape[:3], k.shape[2]), **visible) > -INF).any(-1, keepdim=True)
    assert float((y - sees.float()).abs().max()) < 3e-6


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_is_unbiased(normal: Normal, name: str) -> None:
    """Values with a mean show what dividing by the sum before rounding takes from the magnitude."""
    recipe = RECIPES[name]
    q, k, v = 2 * normal(1, 4, 256, 64), normal(1, 4, 512, 64, seed=1), normal(1, 4, 512, 64, seed=2) + 2
    parts = quantize_operands(q, k, v, recipe)
    w = exact(*read_back(parts, recipe, q.shape, 512)[:3], bias=read_back(parts, recipe, q.shape, 512)[3])

    def magnitude(exact_sum: bool) -> float:
        arguments = (recipe, 0.125, torch.float32, parts.bias, None, False, None, -1)
        y = attend(parts.q, parts.k, parts.v, *arguments, exact_sum=exact_sum).double()
        return float((y * w).sum() / w.square().sum())

    assert abs(magnitude(False) - 1) < (1e-3 if recipe.pv != "nvfp4" else 4e-3)
    if recipe.pv == "nvfp4":
        assert magnitude(True) < 0.98


@pytest.mark.parametrize("name", NAMES)
def test_channels_of_keys_far_from_zero_cost_nothing(normal: Normal, name: str) -> None:
    q, k, v = normal(1, 2, 256, 64), normal(1, 2, 300, 64, seed=1), normal(1, 2, 300, 64, seed=2)
    # of several: a single one would be its token's range, and exact
    shifted = k + torch.where(torch.arange(64) % 11 == 5, torch.arange(64) - 70, 0)
    wanted = exact(q, shifted, v)
    found = sqnr(wanted, attention(q, shifted, v, name))
    assert abs(found - sqnr(exact(q, k, v), attention(q, k, v, name))) < 0.3
    rough = dataclasses.replace(RECIPES[name], smooth_keys=False)
    parts = quantize_operands(q, shifted, v, rough)
    unsmoothed = attend(*parts[:3], rough, 0.125, torch.float32, parts.bias, None, False, None, -1)
    assert sqnr(wanted, unsmoothed) < found - 3


def test_a_channel_of_queries_far_from_zero_costs_nothing_where_queries_are_smoothed(normal: Normal) -> None:
    q, k, v = normal(1, 2, 200, 64), normal(1, 2, 300, 64, seed=1), normal(1, 2, 300, 64, seed=2)
    shifted = q + 20 * (torch.arange(64) == 5)
    k = k * torch.where(torch.arange(64) == 5, 0.05, 1.0)
    wanted = exact(shifted, k, v)
    for name, recipe in RECIPES.items():
        found = sqnr(wanted, attention(shifted, k, v, name))
        if recipe.smooth_queries:
            assert abs(found - sqnr(exact(q, k, v), attention(q, k, v, name))) < 0.5
            rough = dataclasses.replace(recipe, smooth_queries=False)
            parts = quantize_operands(shifted, k, v, rough)
            unsmoothed = attend(*parts[:3], rough, 0.125, torch.float32, parts.bias, None, False, None, -1)
            assert sqnr(wanted, unsmoothed) < found - 3
        else:
            # one scale serves the outlier and the rest
            assert found > (24 if recipe.qk == "int8" else 20)


@pytest.mark.parametrize("name", NAMES)
def test_flat_and_peaked_rows(normal: Normal, name: str) -> None:
    q, k, v = normal(1, 2, 130, 64), normal(1, 2, 300, 64, seed=1), normal(1, 2, 300, 64, seed=2)
    # no score differs: the mean of the values as quantised, whose weights are all one
    flat = attention(torch.zeros_like(q), k, v, name)
    read_v = read_back(quantize_operands(q, k, v, RECIPES[name]), RECIPES[name], q.shape, 300)[2]
    assert torch.allclose(flat.double(), read_v.mean(-2, keepdim=True).expand_as(q), atol=1e-6)
    # one key takes all: its value as quantised
    chosen = torch.randint(0, 300, (130,), generator=torch.Generator().manual_seed(0))
    peaked = attention(k[:, :, chosen] * 40, k, v, name)
    assert torch.allclose(peaked.double(), read_v[:, :, chosen], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e4, 1e15, 1e30])
def test_extreme_sizes(normal: Normal, name: str, size: float) -> None:
    """Values of any size, and queries as large as keys are small, cost no more than ordinary ones."""
    q, k, v = normal(1, 2, 70, 40), normal(1, 2, 90, 40, seed=1), normal(1, 2, 90, 40, seed=2)
    least = sqnr(exact(q, k, v), attention(q, k, v, name)) - 0.5
    assert sqnr(exact(q, k, v), attention(q, k, v * size, name) / size) > least
    assert sqnr(exact(q, k, v), attention(q * size, k / size, v, name)) > least
    # scores beyond float32 are NaN, as they are in torch, and never a number that is wrong
    y = attention(q * size, k * size, v, name)
    assert bool((y.isnan() | (y.abs() <= v.abs().max() * 1.1)).all()) and (size > 1e18 or not y.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_beyond_float16_do_not_overflow(normal: Normal, dtype: torch.dtype) -> None:
    q, k, v = normal(1, 1, 70, 40), normal(1, 1, 90, 40, seed=1), normal(1, 1, 90, 40, seed=2)
    big = v.clone()
    big[..., 3], big[..., 4] = v[..., 3] * 1e7, v[..., 4] * 1e-9
    q, k, big = (x.to(dtype) for x in (q, k, big))
    y, wanted = attention(q, k, big, "int8_fp16", dtype=torch.float32), exact(q, k, big)
    for channel in range(40):
        assert sqnr(wanted[..., channel], y[..., channel]) > 30
    parts = quantize_operands(q, k, big, RECIPES["int8_fp16"]).v
    if dtype == torch.bfloat16:
        assert torch.equal(parts[0].double() * parts[1].double().mT, big.double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_nan_is_where_torch_has_it(normal: Normal, name: str, masked: bool) -> None:
    """In a query its row, seen or not; in a key its head; in a value its channel. An infinity counts as NaN."""
    q, k, v = normal(2, 2, 140, 24), normal(2, 2, 70, 24, seed=1), normal(2, 2, 70, 24, seed=2)
    mask = torch.rand(140, 70, generator=torch.Generator().manual_seed(0)) < 0.5 if masked else None
    if mask is not None:
        mask[:, 66], mask[17] = False, False
    for operand, where in ((q, (1, 0, 17, 3)), (k, (1, 0, 66, 3)), (v, (1, 0, 66, 3))):
        for bad in (NAN, INF, -INF):
            changed = operand.clone()
            changed[where] = bad
            y = attention(*(changed if x is operand else x for x in (q, k, v)), name=name, mask=mask)
            wanted = torch.zeros_like(y, dtype=torch.bool)
            wanted[(1, 0, 17) if operand is q else (1, 0) if operand is k else (1, 0, slice(None), 3)] = True
            assert torch.equal(y.isnan(), wanted)
            if math.isnan(bad):
                with sdpa_kernel(SDPBackend.MATH):
                    native = F.scaled_dot_product_attention(
                        *(changed if x is operand else x for x in (q, k, v)), attn_mask=mask
                    )
                assert torch.equal(native.isnan(), wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["bool", "floating"])
def test_rows_that_see_nothing_are_zero(normal: Normal, name: str, kind: str) -> None:
    q, k, v = normal(1, 2, 9, 24), normal(1, 2, 70, 24, seed=1), normal(1, 2, 70, 24, seed=2)
    mask = torch.rand(9, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[[2, 5]] = False
    given = mask if kind == "bool" else torch.zeros(9, 70).masked_fill(~mask, -INF)
    y = attention(q, k, v, name, mask=given)
    assert torch.equal((y == 0).all(-1), (F.scaled_dot_product_attention(q, k, v, given) == 0).all(-1))
    assert bool((y[:, :, [2, 5]] == 0).all()) and not bool((y[:, :, [0, 1, 3]] == 0).any())


@pytest.mark.parametrize("name", NAMES)
def test_ways_to_say_the_same_agree_bit_for_bit(normal: Normal, name: str) -> None:
    q, k, v = normal(1, 4, 150, 24), normal(1, 2, 150, 24, seed=1), normal(1, 2, 150, 24, seed=2)
    i, j = torch.arange(150).unsqueeze(-1), torch.arange(150)
    blocks = torch.rand(1, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    wide = blocks.repeat_interleave(64, -1).repeat_interleave(64, -2)[..., :150, :150]
    same: list[tuple[dict[str, Any], Tensor]] = [
        ({"causal": True}, j <= i), ({"window": 7}, (i - j).abs() <= 7), ({"blocks": blocks}, wide),
        ({"causal": True, "window": 7}, (j <= i) & (i - j <= 7)),
    ]  # fmt: skip
    for visible, mask in same:
        wanted = attention(q, k, v, name, mask=mask)
        assert torch.equal(attention(q, k, v, name, **visible), wanted)
        floating = torch.zeros(mask.shape).masked_fill(~mask, -INF)
        assert torch.equal(attention(q, k, v, name, mask=floating), wanted)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    assert torch.equal(attention(q, *repeated, name), attention(q, k, v, name))


@pytest.mark.parametrize("name", NAMES)
def test_layouts_do_not_matter(normal: Normal, name: str) -> None:
    q, k, v = (normal(2, 30, 3, 24, seed=i).transpose(1, 2) for i in range(3))
    before = [x.clone() for x in (q, k, v)]
    wanted = attention(q, k, v, name)
    assert wanted.transpose(1, 2).is_contiguous()
    packed = torch.cat([x.transpose(1, 2) for x in (k, v)], -1).transpose(1, 2)
    columns, one = k.mT.contiguous().mT, k[:, :, :1].expand(-1, -1, 30, -1)
    assert columns.stride(-1) != 1
    # the order in which a mean is summed follows the layout: a code on the edge between two may go to either side
    for found, same in (
        (attention(q.contiguous(), packed[..., :24], packed[..., 24:], name), wanted),
        (attention(q, columns, v, name), wanted),
        (attention(q, one, v, name), attention(q, one.contiguous(), v, name)),
    ):
        assert sqnr(same, found) > 40
    assert all(torch.equal(x, was) for x, was in zip((q, k, v), before, strict=True))


# opcheck compares tensors by arithmetic that torch does not have for float8: that inputs are left alone is then shown
# by test_layouts_do_not_matter
UTILITIES = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 70, 24), (1, 1, 1, 1, 1, 1), (1, 2, 1, 5, 131, 16)])
def test_op_is_registered_soundly(normal: Normal, name: str, shape: tuple[int, int, int, int, int, int]) -> None:
    B, H, G, Lq, Lk, D = shape
    q, k, v = (normal(B, L, h, D, seed=L).bfloat16().transpose(1, 2) for h, L in ((H, Lq), (G, Lk), (G, Lk)))
    parts = quantize_operands(q, k, v, RECIPES[name])
    options = {"test_utils": UTILITIES} if name != "int8_fp16" else {}
    blocks = torch.ones(B, H, -(-Lq // 64), -(-Lk // 64), dtype=torch.bool)
    window = 3 if Lq == Lk else -1
    for dtype, rest in (
        (torch.bfloat16, ()),
        (torch.float32, (torch.zeros(1, Lk), True)),
        (torch.float16, (torch.ones(B, 1, 1, Lk, dtype=torch.bool), False, blocks, window)),
    ):
        operands = (parts.q, parts.k, parts.v, name, 0.3, dtype, parts.bias, *rest)
        opcheck(torch.ops.ditc.attention_quantized.default, operands, **options)


def test_no_queries(normal: Normal) -> None:
    q, k, v = normal(1, 2, 0, 24), normal(1, 2, 9, 24), normal(1, 2, 9, 24)
    for name in NAMES:
        assert attention(q, k, v, name).shape == (1, 2, 0, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name"), [("aot_eager", "int8_fp16"), ("inductor", "int8_fp8"), ("inductor", "nvfp4")]
)
def test_compiles_once_for_all_lengths(normal: Normal, backend: str, name: str) -> None:
    """Quantiser, block map and op in one graph with symbolic lengths."""

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = quantize_operands(q * 2, k, v, RECIPES[name])
        blocks = attention_blocks(q * 2, k, 0.2, 0.1)
        y: Tensor = attention_quantized(
            parts.q, parts.k, parts.v, name, 0.2, q.dtype, parts.bias, None, False, blocks, -1
        )
        return y.transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for Lq, Lk in ((170, 90), (260, 133)):
            q, k, v = normal(2, 4, Lq, 24), normal(2, 2, Lk, 24, seed=1), normal(2, 2, Lk, 24, seed=2)
            # a code on the edge between two may go to either side
            assert sqnr(block(q, k, v), compiled(q, k, v)) > 50


def test_quantisers_are_seen_in_the_graph(normal: Normal) -> None:
    """One for each operand of few bits: it is what a compiler fuses with the producer."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = (normal(1, 2, 30, 24, seed=i) for i in range(3))
    for name, count in (("int8_fp16", 2), ("int8_fp8", 3), ("fp8", 3), ("nvfp4", 3)):
        graph = make_fx(partial(quantize_operands, recipe=RECIPES[name]))(q, k, v)
        found = [n for n in graph.graph.nodes if n.target == torch.ops.ditc.quantize.default]
        assert len(found) == count


REFUSED_OPERANDS: list[tuple[Callable[..., Any], type[Exception]]] = [
    (lambda q, k, v: (q[0], k, v), ValueError),
    (lambda q, k, v: (q[:, :3], k, v), ValueError),
    (lambda q, k, v: (q[:1], k, v), ValueError),
    (lambda q, k, v: (q, k, v[:, :, 1:]), ValueError),
    (lambda q, k, v: (q, k, v[..., 1:]), ValueError),
    (lambda q, k, v: (q[..., 1:], k, v), ValueError),
    (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), ValueError),
    (lambda q, k, v: (q[..., :0], k[..., :0], v[..., :0]), ValueError),
    (lambda q, k, v: (q, k[:, :0], v[:, :0]), ValueError),
    (lambda q, k, v: (q.double(), k.double(), v.double()), TypeError),
    (lambda q, k, v: (q.half(), k, v), TypeError),
    (lambda q, k, v: (q, k, v.long()), TypeError),
]


@pytest.mark.parametrize(("change", "refusal"), REFUSED_OPERANDS)
def test_operands_that_are_refused(normal: Normal, change: Callable[..., Any], refusal: type[Exception]) -> None:
    q, k, v = normal(2, 4, 5, 16), normal(2, 2, 9, 16, seed=1), normal(2, 2, 9, 16, seed=2)
    for recipe in RECIPES.values():
        with pytest.raises(refusal):
            quantize_operands(*change(q, k, v), recipe)


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_are_refused(normal: Normal, name: str) -> None:
    q, k, v = normal(2, 4, 5, 16), normal(2, 2, 9, 16, seed=1), normal(2, 2, 9, 16, seed=2)
    parts = quantize_operands(q, k, v, RECIPES[name])
    longer = quantize_operands(normal(2, 4, 5, 32), normal(2, 2, 30, 32), normal(2, 2, 30, 32), RECIPES[name])
    bias = None if parts.bias is not None else torch.zeros(2, 4, 1, 9)
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"recipe": "int4"}, ValueError),
        ({"dtype": torch.float64}, TypeError),
        ({"q": parts.q[:1]}, ValueError),
        ({"q": []}, ValueError),
        ({"q": longer.q}, ValueError),
        ({"k": longer.k}, ValueError),
        ({"v": longer.v}, ValueError),
        ({"v": [x.float() for x in parts.v]}, TypeError),
        ({"q": [x[..., :0] for x in parts.q]}, ValueError),
        ({"bias": bias}, ValueError),
        ({"mask": torch.ones(5, 8, dtype=torch.bool)}, ValueError),
        ({"window": 4}, ValueError),
    ]
    arguments: dict[str, Any] = {
        "q": parts.q, "k": parts.k, "v": parts.v, "recipe": name, "scale": 0.2, "dtype": torch.float32,
        "bias": parts.bias,
    }  # fmt: skip
    assert attention_quantized(**arguments).shape == (2, 4, 5, 16)
    for change, refusal in wrong:
        with pytest.raises(refusal):
            attention_quantized(**(arguments | change))


def test_recipes_have_their_names() -> None:
    assert all(recipe_of(name).name == name for name in NAMES)
    with pytest.raises(ValueError, match="int8_fp16"):
        recipe_of("int8")
