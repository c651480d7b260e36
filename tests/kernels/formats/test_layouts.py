"""Layout conversions: each undone by its inverse, each as its definition says; torchao's swizzle as an oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ditc.kernels import formats
from ditc.kernels.formats import FORMATS

E4M3 = torch.float8_e4m3fn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(torch.uint8)


def test_swapped_nibbles_are_exchanged() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    swapped = formats.swap_nibbles(every)
    assert swapped.tolist() == [(b % 16) * 16 + b // 16 for b in range(256)]
    assert torch.equal(formats.swap_nibbles(swapped), every)
    with pytest.raises(TypeError, match="int8"):
        formats.swap_nibbles(every.to(torch.int8))


@settings(max_examples=80, deadline=None)
@given(rows=st.integers(0, 300), blocks=st.integers(0, 20), dtype=st.sampled_from([torch.uint8, E4M3]))
def test_swizzle_puts_each_scale_at_its_place_and_is_undone(rows: int, blocks: int, dtype: torch.dtype) -> None:
    scale = bytes_of(rows, blocks, seed=rows + blocks).view(dtype)
    swizzled = formats.swizzle_scales(scale)
    across = -(-blocks // 4)
    assert swizzled.dtype == dtype and swizzled.shape == (-(-rows // 128) * 128 * across * 4,)
    expected = torch.zeros(swizzled.shape, dtype=torch.uint8)
    r, b = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    place = 512 * ((r // 128) * across + b // 4) + 16 * (r % 32) + 4 * (r % 128 // 32) + b % 4
    expected[place.flatten()] = scale.view(torch.uint8).flatten()
    assert torch.equal(raw(swizzled), expected)
    back = formats.unswizzle_scales(swizzled.reshape(-1, 32, 16), rows, blocks)
    assert back.dtype == dtype and back.is_contiguous() and torch.equal(raw(back), raw(scale))


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (1, 1), (130, 7), (300, 72)])
def test_swizzle_is_torchao_s(shape: tuple[int, int]) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = bytes_of(*shape)
    assert torch.equal(formats.swizzle_scales(scale), utils.to_blocked(scale))
    assert torch.equal(formats.swizzle_scales(scale.t().contiguous().t()), utils.to_blocked(scale))
    assert torch.equal(formats.unswizzle_scales(utils.to_blocked(scale), *shape), scale)


def test_swizzle_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        formats.swizzle_scales(bytes_of(2, 3, 4))
    with pytest.raises(ValueError, match="512 elements, got 511"):
        formats.unswizzle_scales(bytes_of(511), 100, 3)


@settings(max_examples=60, deadline=None)
@given(lead=st.lists(st.integers(1, 5), max_size=3), value=st.floats(width=32))
def test_outer_scales_of_a_tensor_and_of_its_rows(lead: list[int], value: float) -> None:
    outer = torch.tensor(value)
    rows = formats.row_outer(outer, lead)
    assert rows.shape == (*lead, 1) and rows.is_contiguous() and rows.data_ptr() != outer.data_ptr()
    back = formats.tensor_outer(rows)
    assert back.shape == () and torch.equal(raw(back.reshape(1)), raw(outer.reshape(1)))


def test_outer_scales_that_are_not_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.0 in row 0, 3\.0 in row 2"):
        formats.tensor_outer(torch.tensor([[1.0], [1.0], [3.0]]))
    with pytest.raises(ValueError, match="differ"):
        formats.tensor_outer(torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(ValueError, match="no rows"):
        formats.tensor_outer(torch.ones(0, 1))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        formats.row_outer(torch.ones(2), (2,))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(tuple(FORMATS)), rows=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_concatenated_weights_are_the_weights_side_by_side(granularity: Any, name: str, rows: list[int]) -> None:
    f = FORMATS[name]
    weights = [f.quantize(10**i * normal(N, 96, seed=i), granularity=granularity) for i, N in enumerate(rows)]
    whole = formats.concatenate(name, weights)
    assert [(tuple(p.shape), p.dtype) for p in whole] == f.part_types((sum(rows), 96))
    assert torch.equal(f.dequantize(whole), torch.cat([f.dequantize(w) for w in weights]))
    back = formats.split(name, whole, rows)
    for weight, again in zip(weights, back, strict=True):
        for part, same in zip(weight, again, strict=True):
            assert same.is_contiguous() and same.dtype == part.dtype and same.shape == part.shape
            assert torch.equal(raw(same), raw(part))


def test_weights_that_do_not_fit_together_are_refused() -> None:
    nvfp4, mxfp4 = FORMATS["nvfp4"].quantize(normal(4, 64)), FORMATS["mxfp4"].quantize(normal(4, 64))
    wider = FORMATS["nvfp4"].quantize(normal(4, 80))
    for name, weights, message in (
        ("nvfp4", [nvfp4, wider], "weight 1 is no nvfp4 weight with K = 64"),
        ("nvfp4", [mxfp4], "weight 0"),
        ("nvfp4", [nvfp4, nvfp4[:2]], "weight 1"),
        ("int4", [nvfp4], "no format 'int4'"),
        ("nvfp4", [], "no weights"),
        ("nvfp4", [nvfp4, []], "without parts"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.concatenate(name, weights)
    with pytest.raises(ValueError, match=r"4 rows cannot be split into \[1, 2\]"):
        formats.split("nvfp4", nvfp4, [1, 2])


def test_conversions_trace() -> None:
    def convert(w: torch.Tensor) -> list[torch.Tensor]:
        q, scale, outer = FORMATS["nvfp4"].quantize(w, granularity="tensor")
        both = formats.concatenate("nvfp4", [[q, scale, outer], [q, scale, outer]])
        swizzled = formats.swizzle_scales(both[1])
        N = both[0].shape[0]
        back = formats.unswizzle_scales(swizzled, N, both[1].shape[1])
        again = formats.row_outer(outer[0, 0], [N])
        return [
            formats.swap_nibbles(both[0]),
            swizzled,
            back,
            again,
            formats.split("nvfp4", both, [N // 2, N // 2])[0][1],
        ]

    graph = make_fx(convert, tracing_mode="symbolic")(normal(6, 64))
    for actual, expected in zip(graph(normal(10, 64)), convert(normal(10, 64)), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(raw(actual), raw(expected))
