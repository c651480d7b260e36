"""INT8 attention where not every key is seen: masks, causality, windows, block maps, and shared heads of keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from ditc.kernels.attention import (
    SPARSE_BLOCK,
    TOLERANCE,
    attention_int8,
    attention_int8_reference,
    attention_reason,
    hidden,
)

REASON = attention_reason()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Operands ``[B, H, Lq, D]``, ``[B, G, Lk, D]`` and what is seen of the scores."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None
    causal: bool
    blocks: Tensor | None
    window: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.scale, self.mask, self.causal, self.blocks, self.window

    @property
    def seen(self) -> tuple[Any, ...]:
        return self.mask, self.causal, self.blocks, self.window

    def scores(self, *, masked: bool = True) -> Tensor:
        """Float64 scores, with infinity taken off where a key is not seen."""
        keys = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1).double()
        scores = self.q.double() @ keys.mT * self.scale
        return hidden(scores, *self.seen) if masked else scores

    def exact(self) -> Tensor:
        weights = self.scores().softmax(-1).nan_to_num()
        return weights @ self.v.repeat_interleave(self.q.shape[1] // self.v.shape[1], 1).double()


def draw_mask(draw: st.DrawFn, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor | None:
    """A mask of every kind and layout that broadcasts to ``shape``."""
    kind = draw(st.sampled_from(["none", "bool", "bool", *FLOATS, torch.float64]))
    if kind == "none":
        return None
    sizes = [draw(st.sampled_from([1, n])) for n in shape][draw(st.integers(0, 4)) :]
    layout = draw(st.sampled_from(["plain", "expanded", "transposed", "strided"]))
    wide = (*sizes[:-1], 2 * sizes[-1]) if sizes else ()
    uniform = torch.rand(wide if layout == "strided" else sizes, generator=generator)
    kept = draw(st.sampled_from([0.02, 0.6, 0.98]))
    mask = uniform < kept
    if kind != "bool":
        added = torch.randn(mask.shape, generator=generator) * draw(st.sampled_from([0.0, 1.0]))
        mask = added.to(kind).masked_fill(~mask, draw(st.sampled_from([-INF, -1e4])))
    if layout == "strided" and sizes:
        mask = mask[..., ::2]
    if layout == "transposed" and len(sizes) > 1:
        mask = mask.mT.contiguous().mT
    return mask.expand(shape) if layout == "expanded" else mask


@st.composite
def cases(draw: st.DrawFn) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    B, G, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3]))
    Lq, D = draw(st.sampled_from([1, 5, 30, 65, 140])), draw(st.sampled_from([3, 16, 40, 72]))
    window = draw(st.sampled_from([-1, -1, 0, 1, 20, 100, 2**62]))
    Lk = Lq if window >= 0 else draw(st.sampled_from([1, 31, 64, 129, 300]))
    dtype = draw(st.sampled_from(FLOATS))
    q, k, v = (
        torch.randn(B, L, heads, D, generator=generator).to(dtype).transpose(1, 2)
        for L, heads in ((Lq, G * group), (Lk, G), (Lk, G))
    )
    if draw(st.booleans()):
        q, k = q.contiguous(), k.mT.contiguous().mT
    blocks = None
    if draw(st.booleans()):
        shape = B, G * group, -(-Lq // SPARSE_BLOCK), -(-Lk // SPARSE_BLOCK)
        blocks = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.3, 0.9]))
    mask = draw_mask(draw, generator, (B, G * group, Lq, Lk))
    return Case(q, k, v, D**-0.5, mask, draw(st.booleans()), blocks, window)


@settings(deadline=None, max_examples=250)
@given(cases())
def test_is_its_meaning(case: Case) -> None:
    y, wanted, exact = attention_int8(*case.arguments), attention_int8_reference(*case.arguments), case.exact()
    assert y.dtype == case.q.dtype and y.shape == case.q.shape and y.stride() == wanted.stride()
    size = case.v.double().abs().max()
    # a value between two integers may go to either side
    assert float((y.double() - wanted.double()).abs().max()) < 2e-2 * size
    assert float((y.double() - exact).norm()) < (2 * TOLERANCE + 1e-2) * float(exact.norm() + size)
    blind = (case.scores() == -INF).all(-1)
    assert not y[blind].any()


@settings(deadline=None, max_examples=150)
@given(cases())
def test_all_ways_to_hide_a_key_are_one(case: Case) -> None:
    mask = case.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask > -1e4
    seen = hidden(torch.zeros(*case.q.shape[:3], case.k.shape[2]), mask, *case.seen[1:]) == 0
    y = attention_int8(*case.arguments[:4], mask, *case.seen[1:])
    assert torch.equal(attention_int8(*case.arguments[:4], seen), y)
    floating = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, -INF)
    assert torch.equal(attention_int8(*case.arguments[:4], floating), y)
    heads = [t.repeat_interleave(case.q.shape[1] // t.shape[1], 1) for t in (case.k, case.v)]
    assert torch.equal(attention_int8(case.q, *heads, case.scale, seen), y)


def operands(B: int, H: int, L: int, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, H, L, D, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("L", [1, 64, 130, 300])
def test_what_hides_nothing_changes_no_bit(L: int) -> None:
    q, k, v = operands(2, 2, L, 40)
    wanted = attention_int8(q, k, v, 0.2)
    n = -(-L // SPARSE_BLOCK)
    for nothing in (
        {"mask": torch.ones(L, L, dtype=torch.bool)},
        {"mask": torch.tensor(True)},
        {"mask": torch.zeros(2, 1, 1, L)},
        {"mask": torch.zeros(L, 1, dtype=torch.float16)},
        {"blocks": torch.ones(2, 2, n, n, dtype=torch.bool)},
        {"window": L - 1},
        {"window": 2**63 - 1},
    ):
        assert torch.equal(attention_int8(q, k, v, 0.2, **nothing), wanted)  # type: ignore[arg-type]


def test_keys_that_are_not_seen_do_not_matter() -> None:
    q, k, v = operands(1, 2, 300, 40)
    seen = torch.arange(300) < 170
    y = attention_int8(q, k, v, 0.2, seen)
    # in another order hidden values have the same largest magnitude, hidden keys the same mean up to rounding
    assert torch.equal(attention_int8(q, k, torch.cat([v[:, :, :170], v[:, :, 170:].flip(2)], 2), 0.2, seen), y)
    shuffled = torch.cat([k[:, :, :170], k[:, :, 170:].flip(2)], 2)
    assert torch.allclose(attention_int8(q, shuffled, v, 0.2, seen), y, atol=1e-2)
    assert not torch.allclose(attention_int8(q, k, v, 0.2), y, atol=1e-2)


def test_values_of_one_give_one_to_who_sees_any() -> None:
    q, k, v = operands(1, 2, 200, 24)
    y = attention_int8(q, k, torch.ones_like(v), 3.0, torch.arange(200) > 50, True)
    assert not y[:, :, :51].any()
    assert float((y[:, :, 51:] - 1).abs().max()) < 2e-6


@pytest.mark.parametrize("added", [-1e4, -1e9, -1.5e8, torch.finfo(torch.float32).min, 1e5, 3e38])
def test_masks_of_large_numbers(added: float) -> None:
    q, k, v = operands(1, 1, 40, 24)
    mask = torch.zeros(40, 40)
    mask[3], mask[4, 5:] = added, added
    y, wanted = attention_int8(q, k, v, 0.2, mask), F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    # what torch keeps of a score beside a large number depends on the order in which it adds
    assert torch.allclose(y, wanted, atol=0.05 if abs(added) < 1e6 else 0.3)
    others = [i for i in range(40) if i != 3]
    assert torch.allclose(y[:, :, others], wanted[:, :, others], atol=0.05 if added < 1e6 else 0.3)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_no_number_stays_visible(bad: float) -> None:
    q, k, v = operands(1, 2, 150, 24)
    seen = (torch.arange(150) != 20).unsqueeze(-1) & (torch.arange(150) < 100)
    for operand in (q, k, v):
        changed = operand.clone()
        changed[0, 1, 20, 3] = bad
        y = attention_int8(*(changed if t is operand else t for t in (q, k, v)), 0.2, seen)
        wanted = torch.zeros_like(y, dtype=torch.bool)
        # query 20 sees nothing, and is NaN all the same
        wanted[(0, 1, 20) if operand is q else (0, 1) if operand is k else (0, 1, slice(None), 3)] = True
        assert torch.equal(y.isnan(), wanted)
        if operand is q:
            assert torch.equal(F.scaled_dot_product_attention(changed, k, v, seen, scale=0.2).isnan(), wanted)


@pytest.mark.parametrize("key", [0, 40, 149])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_no_number_in_a_mask(bad: float, key: int) -> None:
    q, k, v = operands(1, 2, 150, 24)
    mask = torch.zeros(150, 150)
    mask[30, key] = bad
    y, wanted = attention_int8(q, k, v, 0.2, mask), F.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
    assert torch.equal(y.isnan(), wanted.isnan()) and y[:, :, 30].isnan().all()
    assert torch.equal(y[:, :, :30], attention_int8(q, k, v, 0.2)[:, :, :30])


def test_a_broadcast_mask_is_not_written_out() -> None:
    q, k, v = operands(1, 16, 1024, 8)
    for mask in (torch.rand(1024) < 0.5, torch.randn(1, 1, 1024, 1).double()):
        wide = mask.expand(1, 16, 1024, 1024)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            attention_int8(q, k, v, 0.3, wide)
        assert sum(max(0, event.self_cpu_memory_usage) for event in profile.events()) < 4 * 2**20


def test_threads() -> None:
    before, (q, k, v) = torch.get_num_threads(), operands(2, 3, 300, 40)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attention_int8(q, k, v, 0.2, torch.arange(300) < 250, True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "seen",
    [
        {"mask": torch.arange(70) > 4},
        {"mask": torch.zeros(2, 1, 70, 70)},
        {"causal": True, "window": 5},
        {"blocks": torch.ones(2, 4, 2, 2, dtype=torch.bool)},
    ],
)
def test_opcheck(seen: dict[str, Any]) -> None:
    q, k, v = operands(2, 4, 70, 12)
    opcheck(torch.ops.ditc.attention_int8.default, (q, k[:, :2], v[:, :2], 0.3), seen)


def test_compiles_for_every_length() -> None:
    graphs = 0

    def block(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = keep[:, None, None, :]
        return attention_int8(q * 2, k, v, 0.1, mask, window=20).transpose(1, 2).flatten(2) + 1

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._inductor.compile(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    for L in (30, 77, 200):
        q, k, v = operands(2, 4, L, 24)
        keep = torch.arange(L).expand(2, L) < torch.tensor([[L], [L // 2]])
        arguments = q, k[:, :2], v[:, :2], keep
        assert torch.allclose(compiled(*arguments), block(*arguments), rtol=1e-5)
    assert graphs == 1
