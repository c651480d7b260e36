"""Axis algebra, repeats, and models that hypothesis makes up."""

from __future__ import annotations

import itertools
import math
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditc.passes.capture import capture_export
from ditc.passes.structure import Role, analyse
from ditc.passes.structure.axes import DATA, FEATURE, AxisAlgebra, size_of
from ditc.passes.structure.repeats import Repeat, tandem_repeats, trimmed


def _axes(algebra: AxisAlgebra, *sizes: int) -> tuple[Any, ...]:
    return tuple(algebra.fresh(size, DATA, "x", dim) for dim, size in enumerate(sizes))


def test_patches_keep_height_and_width() -> None:
    algebra = AxisAlgebra()
    _, _, height, width = dims = _axes(algebra, 2, 4, 6, 8)
    b, c, h, p, w, q = algebra.reshape(dims, (2, 4, 3, 2, 4, 2))
    tokens = algebra.reshape((b, h, w, p, q, c), (2, 12, 16))[1]
    assert size_of(tokens) == 12
    assert [algebra.roots(atom) for atom in tokens] == [{height[0]}, {width[0]}]
    # and back again: factors of one axis next to each other are that axis
    assert algebra.reshape((b, c, h, p, w, q), (2, 4, 6, 8)) == dims


def test_a_concatenation_comes_apart_at_its_seams() -> None:
    algebra = AxisAlgebra()
    (text,), (image,) = _axes(algebra, 7), _axes(algebra, 16)
    joined = algebra.concat([(text, 7), (image, 16)])
    assert algebra.cut(joined, 0, 7) == text and algebra.cut(joined, 7, 23) == image
    assert algebra.leaves(joined) == [*text, *image]
    across = algebra.cut(joined, 5, 12)
    assert {root for atom in algebra.leaves(across) for root in algebra.roots(atom)} == {*text, *image}


def test_slices_of_a_whole_axis_are_that_axis_again() -> None:
    algebra = AxisAlgebra()
    (axis,) = _axes(algebra, 10)
    parts = [(algebra.cut(axis, low, high), high - low) for low, high in ((0, 3), (3, 4 + 4), (8, 10))]
    assert algebra.concat(parts) == axis
    assert algebra.concat(parts[::-1]) != axis


def test_elementwise_makes_two_inputs_one_axis() -> None:
    algebra = AxisAlgebra()
    (a,), (b,) = _axes(algebra, 12), _axes(algebra, 12)
    assert not algebra.same(a, b)
    algebra.unify(a, b)
    assert algebra.same(a, b)
    features = algebra.fresh(12, FEATURE)
    assert algebra.unify(features, a) == a and not algebra.same(features, a)


@given(st.data())
def test_reshaping_there_and_back_changes_nothing(data: st.DataObject) -> None:
    factors = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=6))
    total = math.prod(factors)
    cut = sorted(data.draw(st.sets(st.integers(0, len(factors)), max_size=4)) | {0, len(factors)})
    merged = [math.prod(factors[low:high]) for low, high in itertools.pairwise(cut)]
    algebra = AxisAlgebra()
    # from merged to fine and back: every border of the one is a border of the other
    dims = tuple(algebra.fresh(size, FEATURE) for size in merged)
    fine = algebra.reshape(dims, factors)
    assert [size_of(dim) for dim in fine] == factors
    assert algebra.reshape(fine, merged) == dims
    other = data.draw(st.permutations(factors))
    assert [size_of(dim) for dim in algebra.reshape(dims, other)] == list(other)
    assert math.prod(size_of(dim) for dim in algebra.reshape(dims, other)) == total


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=5),
    st.integers(2, 6),
    st.lists(st.integers(4, 6), max_size=3),
    st.lists(st.integers(7, 9), max_size=3),
)
def test_repeats_are_found_between_other_symbols(
    block: list[int], count: int, before: list[int], after: list[int]
) -> None:
    symbols = [*before, *block * count, *after]
    found = tandem_repeats(symbols, lambda low, high: low >= len(before), lambda repeat: repeat)
    assert any(r.start == len(before) and r.period * r.count + r.slack >= len(block) * count for r in found)
    assert all(symbols[r.start : r.stop] == symbols[r.start : r.start + r.period] * r.count for r in found)


def test_the_shorter_period_wins_and_slack_is_told() -> None:
    assert tandem_repeats("ababab", lambda *_: True, lambda r: r) == [Repeat(0, 2, 3, 0)]
    assert tandem_repeats("nqonqon", lambda low, high: high - low > 1, lambda r: r) == [Repeat(0, 3, 2, 1)]


def test_a_trimmed_block_is_a_subsequence() -> None:
    assert trimmed("qkvaoudqkvaud!", "qkvaoud", 7) == 6
    assert trimmed("qkvaoud!!", "qkvaoud", 7) == 0


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=st.integers(1, 3), depth=st.integers(2, 5), heads=st.integers(1, 3), head_dim=st.sampled_from([4, 6, 10])
)
def test_recovers_what_a_model_was_made_of(
    streams: int, depth: int, heads: int, head_dim: int, handwritten: ModuleType
) -> None:
    width = heads * head_dim
    model = handwritten.MMDiT(streams, depth, width, heads).eval()
    capture = capture_export(model, handwritten.mmdit_inputs(streams), check=False)
    structure = analyse(capture.graph)
    (stack,) = structure.stacks
    assert (stack.depth, len(stack.streams), {s.width for s in stack.streams}) == (depth, streams, {width})
    assert len(structure.attentions) == depth
    for site in structure.attentions:
        assert (site.heads, site.head_dim, site.kind) == (heads, head_dim, "joint" if streams > 1 else "self")
    assert len(structure.linears_of(Role.QKV)) == depth * streams
    assert structure.token_axis is not None and structure.token_axis.size == 12
    assert structure.timestep is not None and structure.timestep.name == "t"


@pytest.mark.slow
def test_cost_grows_with_the_graph_and_not_faster(handwritten: ModuleType) -> None:
    def seconds(depth: int) -> tuple[int, float]:
        model = handwritten.MMDiT(depth=depth).eval()
        graph = capture_export(model, handwritten.mmdit_inputs(2), check=False).graph
        times = []
        for _ in range(3):
            start = time.perf_counter()
            analyse(graph)
            times.append(time.perf_counter() - start)
        return len(graph.graph.nodes), min(times)

    small, small_time = seconds(8)
    large, large_time = seconds(64)
    assert large > 4000
    # eight times the blocks; quadratic growth would take sixty-four times as long
    assert large_time / small_time < 3 * large / small


def test_odd_graphs_do_not_fail() -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values, order = x.flatten(1).topk(3)
            y = x.transpose(1, 2).reshape(x.shape[0], -1, 5)
            return (
                values,
                order,
                y.cumsum(1),
                x[index],
                torch.stft(x[:, 0], 4, window=torch.ones(4), return_complex=True).abs(),
            )

    inputs = (torch.randn(2, 10, 15), torch.tensor([1, 0]))
    structure = analyse(capture_export(Odd().eval(), inputs, check=False).graph)
    assert structure.token_axis is None and not structure.linears and not structure.stacks
