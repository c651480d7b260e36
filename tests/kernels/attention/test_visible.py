"""Which keys a query sees, against the plain definition and against torch's own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditc.kernels.attention import SPARSE_BLOCK, check_visible, hidden

INF, NAN = float("inf"), float("nan")
Normal = Callable[..., Tensor]


def defined(scores: Tensor, mask: Tensor | None, causal: bool, blocks: Tensor | None, window: int) -> Tensor:
    """Key by key what :func:`hidden` does for finite scores."""
    B, H, Lq, Lk = scores.shape
    out = scores.clone()
    wide = None if mask is None else mask.expand(B, H, Lq, Lk)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape)).view(-1, 4).tolist():
        seen = (not causal or j <= i) and (window < 0 or abs(i - j) <= window)
        seen &= blocks is None or bool(blocks[b, h, i // SPARSE_BLOCK, j // SPARSE_BLOCK])
        if wide is not None:
            entry = wide[b, h, i, j]
            seen &= bool(entry) if wide.dtype == torch.bool else True
            out[b, h, i, j] += 0.0 if wide.dtype == torch.bool else float(entry)
        if not seen:
            out[b, h, i, j] = -INF
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, bool, Tensor | None, int]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    B, H, Lq = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 70]))
    window = draw(st.sampled_from([-1, -1, 0, 2, 64]))
    Lk = Lq if window >= 0 else draw(st.sampled_from([1, 5, 64, 67]))
    sizes = [draw(st.sampled_from([1, n])) for n in (B, H, Lq, Lk)][draw(st.integers(0, 4)) :]
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "floating"]))
    if kind == "bool":
        mask = torch.rand(sizes, generator=generator) < 0.6
    elif kind == "floating":
        mask = torch.randn(sizes, generator=generator).masked_fill(torch.rand(sizes, generator=generator) < 0.3, -INF)
        mask = mask.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    blocks = None
    if draw(st.booleans()):
        blocks = torch.rand(B, H, -(-Lq // SPARSE_BLOCK), -(-Lk // SPARSE_BLOCK), generator=generator) < 0.5
    return torch.randn(B, H, Lq, Lk, generator=generator), mask, draw(st.booleans()), blocks, window


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(1, 66))
def test_is_its_definition_whole_and_in_tiles(
    case: tuple[Tensor, Tensor | None, bool, Tensor | None, int], tile: int
) -> None:
    scores, *visible = case
    B, H, Lq, Lk = scores.shape
    check_visible(B, H, Lq, Lk, *visible)
    wanted = defined(scores, *visible)
    assert torch.equal(hidden(scores, *visible), wanted)
    tiles = [hidden(scores[..., at : at + tile], *visible, first_key=at) for at in range(0, Lk, tile)]
    assert torch.equal(torch.cat(tiles, -1), wanted)


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (None, True),
        (torch.tensor([[True, False, True, True], [False, False, False, False], [True, True, True, True]]), False),
        (torch.tensor([[0.0, -INF, 1.0, 2.0], [-INF] * 4, [-1e4, 0.0, 0.0, 0.0]]), False),
        (torch.tensor([[0.0, NAN, 1.0, 2.0], [0.0, INF, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), False),
        (torch.full((3, 4), torch.finfo(torch.float32).min), False),
    ],
)
@pytest.mark.parametrize("bad", [None, NAN, INF, -INF])
def test_gives_what_torch_gives(normal: Normal, mask: Tensor | None, causal: bool, bad: float | None) -> None:
    q, k, v = normal(1, 1, 3, 8), normal(1, 1, 4, 8, seed=1), normal(1, 1, 4, 8, seed=2)
    if bad is not None:
        q[0, 0, 1, 2] = bad
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    scores = hidden(q @ k.mT * 8**-0.5, mask, causal, None, -1)
    # torch gives zero for a row that sees nothing, and NaN for one whose scores are none
    weights = torch.where((scores == -INF).all(-1, keepdim=True), 0.0, scores.softmax(-1))
    assert torch.allclose(weights @ v, wanted, atol=1e-6, equal_nan=True)


REFUSED: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"mask": torch.ones(5, 7, dtype=torch.int32)}, TypeError),
    ({"mask": torch.ones(5, 6, dtype=torch.bool)}, ValueError),
    ({"mask": torch.ones(1, 2, 3, 5, 7)}, ValueError),
    ({"mask": torch.ones(4, 5, 7)}, ValueError),
    ({"blocks": torch.ones(2, 3, 1, 1)}, TypeError),
    ({"blocks": torch.ones(2, 3, 1, 2, dtype=torch.bool)}, ValueError),
    ({"blocks": torch.ones(1, 3, 1, 1, dtype=torch.bool)}, ValueError),
    ({"window": -2}, ValueError),
    ({"window": 3}, ValueError),
]


@pytest.mark.parametrize(("change", "refusal"), REFUSED)
def test_refusals(change: dict[str, Any], refusal: type[Exception]) -> None:
    nothing: dict[str, Any] = {"mask": None, "causal": False, "blocks": None, "window": -1}
    check_visible(2, 3, 5, 7, **nothing)
    with pytest.raises(refusal):
        check_visible(2, 3, 5, 7, **(nothing | change))
