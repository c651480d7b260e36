"""Block maps: what must be kept is kept, whatever the threshold, and on data with locality little else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditc.kernels.attention import (
    RECIPES,
    SPARSE_BLOCK,
    attention_blocks,
    attention_quantized,
    hidden,
    quantize_operands,
)

INF, NAN = float("inf"), float("nan")
THRESHOLDS = (0.0, 1e-4, 0.03, 0.3, 1.0)
Normal = Callable[..., Tensor]
Visible = tuple[Tensor | None, bool, int]


@st.composite
def masks(draw: st.DrawFn, B: int, H: int, Lq: int, Lk: int, generator: torch.Generator) -> Tensor | None:
    kind = draw(st.sampled_from(["none", "bool", "floating", "finite"]))
    if kind == "none":
        return None
    sizes = [draw(st.sampled_from([1, n])) for n in (B, H, Lq, Lk)][draw(st.integers(0, 4)) :]
    seen = torch.rand(sizes, generator=generator) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    if kind == "bool":
        return seen
    return torch.randn(sizes, generator=generator).masked_fill(~seen, -INF if kind == "floating" else -1e4)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Visible]:
    """Queries and keys whose blocks mostly resemble themselves, and what is seen of them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    B, G, D = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 8, 40]))
    H, Lq = G * draw(st.integers(1, 2)), draw(st.integers(1, 200))
    window = draw(st.sampled_from([-1, -1, 0, 5, 70]))
    Lk = Lq if window >= 0 else draw(st.integers(1, 300))

    def tokens(heads: int, L: int) -> Tensor:
        means = torch.randn(B, heads, -(-L // 32), D, generator=generator).repeat_interleave(32, -2)[..., :L, :]
        return means + 0.3 * torch.randn(B, heads, L, D, generator=generator)

    mask = draw(masks(B, H, Lq, Lk, generator))
    return tokens(H, Lq), tokens(G, Lk), (mask, draw(st.booleans()), window)


def seen_keys(q: Tensor, k: Tensor, visible: Visible) -> Tensor:
    """bool ``[B, H, Lq, Lk]``; what a mask puts 10,000 below the rest is not seen."""
    mask, causal, window = visible
    scores = hidden(torch.zeros(*q.shape[:3], k.shape[2]), mask, causal, None, window)
    seen = scores > -INF
    if mask is not None and mask.is_floating_point():
        seen &= ~(mask < mask.amax(-1, keepdim=True) - 5000) if mask.dim() else True
    return seen


def elements(blocks: Tensor, Lq: int, Lk: int) -> Tensor:
    return blocks.repeat_interleave(SPARSE_BLOCK, -1).repeat_interleave(SPARSE_BLOCK, -2)[..., :Lq, :Lk]


def pooled(seen: Tensor) -> Tensor:
    Lq, Lk = seen.shape[-2:]
    seen = F.pad(seen, (0, -Lk % SPARSE_BLOCK, 0, -Lq % SPARSE_BLOCK))
    return seen.unflatten(-1, (-1, SPARSE_BLOCK)).any(-1).unflatten(-2, (-1, SPARSE_BLOCK)).any(-2)


@settings(deadline=None, max_examples=80)
@given(problems())
def test_every_row_keeps_what_it_must(problem: tuple[Tensor, Tensor, Visible]) -> None:
    q, k, visible = problem
    seen = seen_keys(q, k, visible)
    previous = pooled(seen)
    for threshold in THRESHOLDS:
        blocks = attention_blocks(q, k, 0.5, threshold, *visible)
        assert blocks.dtype == torch.bool and blocks.shape == previous.shape
        # zero keeps whatever is seen at all; from there each keeps a part of the one before
        assert torch.equal(blocks, previous) if threshold == 0 else bool((blocks <= previous).all())
        assert torch.equal((seen & elements(blocks, q.shape[2], k.shape[2])).any(-1), seen.any(-1))
        previous = blocks


@settings(deadline=None, max_examples=20)
@given(problems(), st.sampled_from(sorted(RECIPES)))
def test_threshold_zero_is_dense_bit_for_bit(problem: tuple[Tensor, Tensor, Visible], name: str) -> None:
    q, k, (mask, causal, window) = problem
    parts = quantize_operands(q, k, torch.randn_like(k), RECIPES[name])
    blocks = attention_blocks(q, k, 0.5, 0.0, mask, causal, window)
    if mask is not None and mask.is_floating_point():
        # a key 10,000 below the others weighs nothing, unless a row sees no other
        blocks |= pooled(hidden(torch.zeros(*q.shape[:3], k.shape[2]), mask, causal, None, window) > -INF)

    def attention(kept: Tensor | None) -> Tensor:
        found = (parts.q, parts.k, parts.v, name, 0.5, torch.float32, parts.bias, mask, causal, kept, window)
        y: Tensor = attention_quantized(*found)
        return y

    assert torch.equal(attention(blocks), attention(None))


def video(frames: int, size: int, D: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a smooth field over frames of ``size x size`` tokens, two heads: near tokens are
    alike, far ones are not, and a little noise is on top."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in (frames, size, size)), indexing="ij"), -1)
    place = place.reshape(-1, 3) * torch.tensor([0.5, 0.15, 0.15])
    waves = torch.randn(2, 3, D // 2, generator=generator)
    phase = place @ waves
    field = torch.cat((phase.sin(), phase.cos()), -1)[None] * 2

    def noisy() -> Tensor:
        return field + 0.3 * torch.randn(field.shape, generator=generator)

    values = (place @ torch.randn(2, 3, D, generator=generator)).sin()[None]
    return noisy(), noisy(), values + 0.1 * torch.randn(values.shape, generator=generator)


def test_locality_is_found() -> None:
    """What is kept falls with the threshold, and the error stays below what was dropped."""
    q, k, v = video(16, 8, 64, torch.Generator().manual_seed(0))
    scale = 64**-0.5
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)
    weights = (q.double() @ k.double().mT * scale).softmax(-1)
    fractions, errors = [], []
    for threshold in (0.001, 0.01, 0.1):
        blocks = attention_blocks(q, k, scale, threshold)
        kept = elements(blocks, 1024, 1024)
        y = F.scaled_dot_product_attention(q, k, v, kept, scale=scale).double()
        dropped = (weights * ~kept).sum(-1, keepdim=True)
        # y - w is what was dropped times the difference of two means of values
        bound = dropped * (v.amax(-2, keepdim=True) - v.amin(-2, keepdim=True)) + 1e-5
        assert bool(((y - exact).abs() <= bound).all())
        fractions.append(float(blocks.float().mean()))
        errors.append(float((y - exact).norm() / exact.norm()))
    assert fractions == sorted(fractions, reverse=True) and errors == sorted(errors)
    assert fractions[0] < 0.8 and fractions[-1] < 0.4
    assert errors[0] < 0.01 and errors[1] < 0.05 and errors[-1] < 0.2


def test_noise_is_not_judged_by_its_mean(normal: Normal) -> None:
    q, k = normal(1, 2, 200, 64), normal(1, 2, 300, 64, seed=1)
    assert bool(attention_blocks(q, k, 0.125, 1.0).all())


def test_what_is_no_number_is_looked_at(normal: Normal) -> None:
    """NaN in one place must not hide finite blocks elsewhere."""
    q, k, _ = video(8, 8, 64, torch.Generator().manual_seed(0))
    sound = attention_blocks(q, k, 0.125, 0.1)
    assert not bool(sound.all())
    for bad in (NAN, INF, -INF):
        changed = q.clone()
        changed[0, 0, 70, 3] = bad
        blocks = attention_blocks(changed, k, 0.125, 0.1)
        assert bool(blocks[0, 0, 1].all())
        blocks[0, 0, 1] = sound[0, 0, 1]
        assert torch.equal(blocks, sound)
        changed = k.clone()
        changed[0, 1, 5, 3] = bad
        blocks = attention_blocks(q, changed, 0.125, 0.1)
        assert bool(blocks[0, 1].all()) and torch.equal(blocks[0, 0], sound[0, 0])
    mask = torch.zeros(512, 512)
    mask[3, 100] = NAN
    assert bool((attention_blocks(q, k, 0.125, 0.1, mask) >= sound).all())


def test_an_additive_mask_counts(normal: Normal) -> None:
    q, k, _ = video(8, 8, 64, torch.Generator().manual_seed(0))
    far = torch.zeros(512)
    far[128:] = -1e4
    blocks = attention_blocks(q, k, 0.125, 0.01, far)
    assert bool(blocks[..., :2].any(-1).all()) and not bool(blocks[..., 2:].any())


REFUSED: list[dict[str, Any]] = [
    {"threshold": -0.1}, {"threshold": 1.1}, {"threshold": NAN}, {"window": 3}, {"window": -2},
    {"mask": torch.ones(4, 9, dtype=torch.bool)},
]  # fmt: skip


@pytest.mark.parametrize("change", REFUSED)
def test_refusals(normal: Normal, change: dict[str, Any]) -> None:
    arguments = {"threshold": 0.1, "mask": None, "causal": False, "window": -1}
    q, k = normal(1, 2, 5, 8), normal(1, 2, 7, 8, seed=1)
    assert attention_blocks(q, k, 1.0, **arguments).shape == (1, 2, 1, 1)
    with pytest.raises(ValueError, match=r".*"):
        attention_blocks(q, k, 1.0, **(arguments | change))
