"""The Triton quantiser behind no producer: the parts of every format, bit-equal to plain torch on a CPU."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ditc.kernels.formats import FORMATS, e2m1
from ditc.kernels.quantize.triton import (
    MAX_K,
    activation_quantize_triton,
    block_and_warps,
    norm_quantize_triton,
    quantize_triton,
)

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "tokens", "columns", "half", "expanded", "permuted")
KINDS = ("normal", "extreme", "ties", "zeros", "outliers")


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """``values [A, B, K]`` in memory as ``layout`` says; what lies between holds NaN."""
    A, B, K = values.shape
    match layout:
        case "transposed":
            view = values.new_empty(A, K, B).transpose(1, 2)
        case "tokens":
            view = values.new_empty(A, B + 3, K)[:, 2:-1]
        case "columns":
            view = values.new_empty(A, B, 2 * K)[..., ::2]
        case "half":
            view = values.new_empty(A, B, 2 * K)[..., K:]
        case "permuted":
            view = values.new_empty(B, A, K).transpose(0, 1)
        case "expanded":
            return values[:1].expand(A, B, K)
        case _:
            return values
    view.copy_(values)
    return view


def grid(format: str) -> torch.Tensor:
    """The magnitudes of a format's elements and the points halfway between them."""
    if format == "int8":
        points = torch.arange(128.0)
    elif format in ("fp8", "mxfp8"):
        points = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        points = e2m1.decode(torch.arange(8, dtype=torch.uint8))
    return torch.cat([points, (points[1:] + points[:-1]) / 2]).sort().values


def ties(rows: int, K: int, format: str) -> torch.Tensor:
    """Rows whose scales come out as powers of two (nvfp4: E4M3 values), on the grid and halfway between."""
    points, block = grid(format), FORMATS[format].block or max(K, 1)
    x = points[torch.randint(len(points), (rows, K))] * (torch.randint(2, (rows, K)) * 2 - 1)
    x[:, ::block] = points[-1]
    if format == "nvfp4":
        scale = torch.randint(8, 127, (rows, K // block), dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        scale[:, 0] = 448
        x = x * scale.repeat_interleave(block, dim=1) * 0.125
    return x


def sample(kind: str, rows: int, K: int, format: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(rows, K)
    if kind == "extreme":
        low, high = (-7, 4) if dtype == torch.float16 else (-45, 38)
        x = x.double() * 10 ** torch.empty(rows, 1, dtype=torch.float64).uniform_(low, high)
    elif kind == "ties":
        x = ties(rows, K, format)
    elif kind == "zeros":
        x = x * torch.randint(2, (rows, 1)) * (torch.arange(K) // 16 % 2)
    elif kind == "outliers":
        x = x * torch.where(torch.rand(rows, K) < 0.02, 1e4, 1.0)
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype)


def finite_codes(format: str, expected: list[torch.Tensor]) -> torch.Tensor:
    """Which codes mean something: those whose scale is a number; shaped like the codes."""
    q, scale = expected[0], expected[-1]
    numbers = scale != 255 if scale.dtype == torch.uint8 else scale.isfinite()
    return numbers.repeat_interleave(q.shape[-1] // scale.shape[-1] if q.shape[-1] else 1, dim=-1)[..., : q.shape[-1]]


def assert_same_parts(format: str, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        ours = ours.cpu()
        if theirs.dtype == torch.float32:
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.nan_to_num(0).view(torch.int32), theirs.nan_to_num(0).view(torch.int32))
            continue
        same = ours.view(torch.uint8) == theirs.view(torch.uint8)
        if i == 0:
            same |= ~finite_codes(format, expected)
        elif format == "nvfp4":  # the block scales of a row that is no number
            same |= ~expected[-1].isfinite()
        assert bool(same.all()), f"part {i}: {int((~same).sum())} of {same.numel()} differ"


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(FLOATS),
    A=st.integers(1, 2),
    B=st.integers(0, 3),
    blocks=st.integers(1, 12),
    odd=st.integers(0, 31),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(LAYOUTS),
    bad=st.sampled_from([None, None, math.nan, math.inf, -math.inf]),
    seed=st.integers(0, 2**16),
)
@example("nvfp4", torch.bfloat16, 1, 2, 192, 0, "normal", "contiguous", None, 0)
@example("mxfp8", torch.float32, 1, 2, 160, 0, "extreme", "half", math.inf, 1)
@example("int8", torch.float16, 1, 1, 170, 3, "ties", "tokens", None, 2)
def test_parts_are_bit_equal_to_plain_torch(
    device: str,
    format: str,
    dtype: torch.dtype,
    A: int,
    B: int,
    blocks: int,
    odd: int,
    kind: str,
    layout: str,
    bad: float | None,
    seed: int,
) -> None:
    block = FORMATS[format].block
    K = blocks * block if block else blocks * 32 - odd
    x = sample(kind, A * B, K, format, dtype, seed).reshape(A, B, K)
    if bad is not None and x.numel():
        x[seed % A, seed % B, seed % K] = bad
    x = laid_out(x, layout)
    before = x.clone()
    actual = quantize_triton(x.to(device) if device == "cuda" else x, format)
    assert_same_parts(format, actual, FORMATS[format].quantize(x))
    assert torch.equal(x.isnan(), before.isnan()) and torch.equal(x.nan_to_num(0), before.nan_to_num(0))


@settings(max_examples=60, deadline=None)
@given(
    format=st.sampled_from(["int8", "fp8", "nvfp4"]),
    dtype=st.sampled_from(FLOATS),
    exponent=st.integers(-40, 38),
    kind=st.sampled_from(["normal", "zeros", "outliers", "ties"]),
    bad=st.sampled_from([None, math.nan, math.inf]),
    seed=st.integers(0, 2**16),
)
def test_a_static_range_saturates(
    device: str, format: str, dtype: torch.dtype, exponent: int, kind: str, bad: float | None, seed: int
) -> None:
    x = sample(kind, 3, 112, format, dtype, seed)
    if bad is not None:
        x[1, seed % 112] = bad
    static = torch.tensor(10.0**exponent * (1 + seed / 2**16))
    expected = FORMATS[format].quantize(x, static=static)
    assert_same_parts(format, quantize_triton(x.to(device), format, static.to(device)), expected)


@pytest.mark.parametrize("static", [math.nan, 0.0, math.inf])
@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_a_static_range_that_is_no_range(device: str, format: str, static: float) -> None:
    x = torch.randn(2, 32)
    scale = torch.tensor(static)
    actual, expected = (
        quantize_triton(x.to(device), format, scale.to(device)),
        FORMATS[format].quantize(x, static=scale),
    )
    assert_same_parts(format, actual, expected)


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 64), (32,), (1, 1, 1, 64)])
def test_shapes_without_rows_or_leading_dimensions(device: str, format: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert_same_parts(format, quantize_triton(x.to(device), format), FORMATS[format].quantize(x))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_of_one_value_and_of_none(device: str, format: str) -> None:
    for x in (torch.randn(3, 1), torch.randn(1, 3).t(), torch.randn(3, 0)):
        assert_same_parts(format, quantize_triton(x.to(device), format), FORMATS[format].quantize(x))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_longest_rows(device: str, format: str) -> None:
    K = MAX_K if format not in ("mxfp8", "mxfp4") else MAX_K + 4128
    x = torch.randn(1, K)
    assert_same_parts(format, quantize_triton(x.to(device), format), FORMATS[format].quantize(x))


def test_leading_dimensions_in_any_order(device: str) -> None:
    x = torch.randn(2, 3, 4, 5, 32)
    for order in [(3, 1, 0, 2, 4), (1, 0, 2, 3, 4), (2, 3, 0, 1, 4)]:
        view = x.permute(order)
        actual = quantize_triton(x.to(device).permute(order), "fp8")
        assert_same_parts("fp8", actual, FORMATS["fp8"].quantize(view))


def test_offsets_beyond_32_bits(device: str, tmp_path: Path) -> None:
    row = 2**31 + 64  # in a file with a hole, which takes no room
    if device == "cuda":
        x = torch.empty(row + 96, dtype=torch.float16, device=device)
    else:
        x = torch.from_file(str(tmp_path / "hole"), shared=True, size=row + 96, dtype=torch.float16)
    x = x.as_strided((2, 96), (row, 1))
    x.copy_(torch.randn(2, 96))
    assert_same_parts("mxfp4", quantize_triton(x, "mxfp4"), FORMATS["mxfp4"].quantize(x.cpu().contiguous()))


def test_what_cannot_be_is_refused() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="no format 'int4'"):
        quantize_triton(x, "int4")
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_triton(torch.randn(2, 48), "mxfp8")
    with pytest.raises(TypeError, match="float64"):
        quantize_triton(x.double(), "int8")
    with pytest.raises(ValueError, match="scalar"):
        quantize_triton(torch.tensor(1.0), "int8")
    with pytest.raises(ValueError, match="takes no static"):
        quantize_triton(x, "mxfp4", torch.tensor(1.0))
    with pytest.raises(ValueError, match="one float32 number"):
        quantize_triton(x, "int8", torch.ones(1))
    with pytest.raises(ValueError, match=f"at most {MAX_K} values, got K = {MAX_K + 32}"):
        quantize_triton(torch.zeros(1, MAX_K + 32), "nvfp4")
    with pytest.raises(ValueError, match="at most"):
        block_and_warps(MAX_K + 32, "mxfp8", "layer")
    with pytest.raises(ValueError, match="norm is one of"):
        norm_quantize_triton(x, "batch", 1e-6, None, None, None, None, "fp8")
    with pytest.raises(ValueError, match="weight has shape"):
        norm_quantize_triton(x, "rms", 1e-6, torch.ones(63), None, None, None, "fp8")
    with pytest.raises(ValueError, match=r"shift .* does not broadcast"):
        norm_quantize_triton(x, "layer", 1e-6, None, None, None, torch.ones(3, 2, 64), "fp8")
    with pytest.raises(ValueError, match="activation is one of"):
        activation_quantize_triton(x, "mish", None, "fp8")
    with pytest.raises(ValueError, match="the multiplier has shape"):
        activation_quantize_triton(x, "silu", torch.ones(64), "fp8")
