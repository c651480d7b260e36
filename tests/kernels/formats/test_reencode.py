"""FP4 as row-wise FP8: exact where it can be, refused where it cannot and must be, near where it may round."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from ditc.kernels.formats import FORMATS, fp8_from_mxfp4, fp8_from_nvfp4, quantize_mxfp4, quantize_nvfp4, sqnr

FP8, MXFP4, NVFP4 = FORMATS["fp8"], FORMATS["mxfp4"], FORMATS["nvfp4"]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mxfp4(codes: list[int], scales: list[int]) -> list[torch.Tensor]:
    """One row whose blocks hold two codes, repeated, and have these scale bytes."""
    low, high = codes
    return [torch.full((1, 16 * len(scales)), low | high << 4, dtype=torch.uint8), torch.tensor([scales]).byte()]


def wide(parts: list[torch.Tensor], bias: int) -> torch.Tensor:
    """float64 values of MXFP4 parts: float32 does not hold them all."""
    q, scale = parts
    magnitudes = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64)
    values = magnitudes[torch.stack((q & 15, q >> 4), -1).flatten(-2).long()]
    return values * (2.0 ** (scale.double() - bias)).repeat_interleave(32, -1)


@settings(max_examples=100, deadline=None)
@given(
    top=st.integers(0, 254),
    span=st.integers(0, 14),
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 5),
)  # fmt: skip
def test_mxfp4_within_a_span_of_14_is_exact(top: int, span: int, seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low = max(0, top - span)
    q = torch.randint(0, 256, (rows, 64), generator=generator, dtype=torch.uint8)
    scale = torch.randint(low, top + 1, (rows, 4), generator=generator).byte()
    q8, scale8 = fp8_from_mxfp4([q, scale])
    assert [(tuple(p.shape), p.dtype) for p in (q8, scale8)] == FP8.part_types((rows, 128))
    assert bool((scale8.log2() == scale8.log2().round()).all()) and bool((scale8 >= 2.0**-126).all())
    # what E4M3 times the scale is, in float64
    assert torch.equal(q8.double() * scale8.double(), wide([q, scale], 127))


def test_mxfp4_of_real_data_is_exact_and_reads_the_same() -> None:
    w = normal(64, 512) * normal(64, 1, seed=1).exp()
    parts = MXFP4.quantize(w)
    assert torch.equal(FP8.dequantize(fp8_from_mxfp4(parts)), MXFP4.dequantize(parts))


@pytest.mark.parametrize(("codes", "span", "exact"), [
    ((7, 1), 14, True),  # 6 * 2**6 beside 2**-1 * 2**-8
    ((7, 1), 15, False),
    ((2, 2), 16, True),  # 2**8 beside 2**-8
    ((2, 2), 17, True),
    ((2, 2), 18, False),
    ((3, 3), 16, True),  # 1.5 * 2**8 beside 3 * 2**-9
    ((3, 3), 17, False),
    ((0, 8), 200, True),
])  # fmt: skip
def test_mxfp4_is_refused_beyond_what_e4m3_spans(codes: tuple[int, int], span: int, exact: bool) -> None:
    parts = mxfp4(list(codes), [200, 200 - span])
    if exact:
        q8, scale8 = fp8_from_mxfp4(parts)
        assert torch.equal(q8.double() * scale8.double(), wide(parts, 127))
        return
    with pytest.raises(ValueError, match="1 of 1 rows do not fit into FP8 exactly; row 0 holds"):
        fp8_from_mxfp4(parts)
    q8, scale8 = fp8_from_mxfp4(parts, exact=False)
    truth = wide(parts, 127)
    assert torch.equal((q8.double() * scale8.double())[:, :32], truth[:, :32])
    assert float((q8.double() - truth / scale8.double()).abs().max()) <= 2.0**-10


def test_blocks_of_zeros_do_not_count() -> None:
    parts = mxfp4([7, 1], [254, 100, 0])
    parts[0][:, :16] = 0x80  # zero and minus zero under the largest scale
    parts[0][:, 32:] = 0
    q8, scale8 = fp8_from_mxfp4(parts)
    assert float(scale8) == 2.0 ** (100 - 127 - 6)
    assert torch.equal(q8.double() * scale8.double(), wide(parts, 127))
    zeros = fp8_from_mxfp4([torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)])
    assert torch.count_nonzero(FP8.dequantize(zeros)) == 0 and bool((zeros[1] == 2.0**-126).all())


def test_what_is_no_number_stays_visible() -> None:
    x = normal(3, 64)
    x[1, 40] = torch.inf
    for parts in (
        fp8_from_mxfp4(MXFP4.quantize(x)),
        fp8_from_nvfp4(NVFP4.quantize(x)),
        fp8_from_nvfp4(quantize_nvfp4(x, pow2_block_scales=True), exact=True),
    ):
        y = FP8.dequantize(parts)
        assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())
    # a block scale of NaN that no quantiser of ours gives: its block is NaN, the rest is kept
    q, scale, outer = NVFP4.quantize(normal(1, 64))
    scale.view(torch.uint8)[0, 1] = 0x7F
    y, truth = FP8.dequantize(fp8_from_nvfp4([q, scale, outer])), NVFP4.dequantize([q, scale, outer])
    assert torch.equal(y.isnan(), truth.isnan()) and int(y.isnan().sum()) == 16


@settings(max_examples=60, deadline=None)
@given(
    exponent=st.integers(-140, 120),
    spread=st.integers(0, 30),
    granularity=st.sampled_from(["row", "tensor"]),
    seed=st.integers(0, 2**20),
)
def test_nvfp4_with_power_of_two_blocks_is_always_exact(
    exponent: int, spread: int, granularity: str, seed: int
) -> None:
    steps = torch.randint(-spread, 1, (4, 8, 1), generator=torch.Generator().manual_seed(seed))
    x = (normal(4, 8, 16, seed=seed).double() * 2.0**steps * 2.0**exponent).flatten(1).float()
    parts = quantize_nvfp4(x, granularity=granularity, pow2_block_scales=True)
    q8, scale8 = fp8_from_nvfp4(parts, exact=True)
    assert torch.equal(FP8.dequantize([q8, scale8]), NVFP4.dequantize(parts))
    assert bool((scale8 >= 2.0**-126).all())


def test_nvfp4_of_gaussian_data_loses_little_and_refuses_when_asked() -> None:
    w = normal(128, 1152)
    parts = NVFP4.quantize(w, granularity="tensor")
    q8 = fp8_from_nvfp4(parts)
    assert [(tuple(p.shape), p.dtype) for p in q8] == FP8.part_types(w.shape)
    relative = [
        float((FP8.dequantize(q8) - w).norm() / w.norm()),
        float((NVFP4.dequantize(parts) - w).norm() / w.norm()),
    ]
    assert 0.09 < relative[1] < relative[0] < 0.098
    # fewer values are rounded than by the row scale amax / 448
    direct = FP8.quantize(NVFP4.dequantize(parts))
    truth = NVFP4.dequantize(parts)
    assert sqnr(truth, FP8.dequantize(q8)) > sqnr(truth, FP8.dequantize(direct)) + 1
    with pytest.raises(ValueError, match="128 of 128 rows"):
        fp8_from_nvfp4(parts, exact=True)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**20), exponent=st.integers(-95, 120))
def test_nvfp4_is_rounded_to_nearest(seed: int, exponent: int) -> None:
    parts = NVFP4.quantize((normal(3, 64, seed=seed).double() * 2.0**exponent).float())
    truth = NVFP4.dequantize(parts).double()
    q8, scale8 = fp8_from_nvfp4(parts)
    error = (q8.double() * scale8.double() - truth).abs()
    assert bool((error <= truth.abs() * (2.0**-4 + 2.0**-23) + scale8.double() * 2.0**-10).all())
    assert bool((q8.float().abs().amax(-1) >= 224).all())  # the row's range is used


def test_reencoding_traces() -> None:
    def convert(x: torch.Tensor) -> list[torch.Tensor]:
        return [
            *fp8_from_mxfp4(quantize_mxfp4(x), exact=False),
            *fp8_from_nvfp4(quantize_nvfp4(x)),
        ]

    graph = make_fx(convert, tracing_mode="symbolic")(normal(6, 64))
    for actual, expected in zip(graph(normal(2, 96)), convert(normal(2, 96)), strict=True):
        assert torch.equal(actual.float(), expected.float())
