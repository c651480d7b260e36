"""What every format promises: parts, granularity, static scales, what is no number, tracing, refusals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ditc.kernels import formats
from ditc.kernels.formats import FORMATS, Format, format_of, sqnr

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(FORMATS)
SCALED = ("int8", "fp8", "nvfp4")
MAX_IN_SCALES = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6.0 * 448.0}
every_format = pytest.mark.parametrize("name", NAMES)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def types(parts: Sequence[torch.Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(part.shape), part.dtype) for part in parts]


def assert_same_bits(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    assert types(actual) == types(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def row_scale(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[2] if name == "nvfp4" else parts[1]


def test_the_formats_and_what_they_cost() -> None:
    assert {f.name: (f.block, f.bits) for f in FORMATS.values()} == {
        "int8": (None, 8.0), "fp8": (None, 8.0), "mxfp8": (32, 8.25), "mxfp4": (32, 4.25), "nvfp4": (16, 4.5),
    }  # fmt: skip
    assert all(format_of(name) is FORMATS[name] for name in NAMES)
    with pytest.raises(ValueError, match="int8, fp8, mxfp8, mxfp4, nvfp4"):
        format_of("int4")


@every_format
def test_bits_are_those_of_the_parts(name: str) -> None:
    parts = FORMATS[name].quantize(normal(3, 1152))
    stored = parts if FORMATS[name].block else parts[:1]  # scales of a row are not counted
    stored = [part for part in stored if part.shape[-1] > 1]
    assert sum(part.numel() * part.element_size() for part in stored) * 8 == FORMATS[name].bits * 3 * 1152


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    lead=st.lists(st.integers(0, 5), max_size=3),
    blocks=st.integers(1, 6),
    dtype=st.sampled_from(FLOATS),
    granularity=st.sampled_from(["row", "tensor"]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_parts_have_the_promised_types_whatever_the_strides(
    name: str, lead: list[int], blocks: int, dtype: torch.dtype, granularity: str, layout: str
) -> None:
    f, K = FORMATS[name], blocks * (FORMATS[name].block or 7)
    if layout == "transposed":
        x = normal(K, *lead, dtype=dtype).movedim(0, -1)
    elif layout == "strided":
        x = normal(*lead, 2 * K, dtype=dtype)[..., ::2]
    elif layout == "expanded":
        x = normal(K, dtype=dtype).expand(*lead, K)
    else:
        x = normal(*lead, K, dtype=dtype)
    before = x.clone()
    parts = f.quantize(x, granularity=granularity)
    assert types(parts) == f.part_types(x.shape)
    assert all(part.is_contiguous() for part in parts)
    assert_same_bits(parts, f.quantize(before.contiguous(), granularity=granularity))
    assert torch.equal(x, before)
    for out in FLOATS:
        y = f.dequantize(parts, out)
        assert y.shape == x.shape and y.dtype == out
        assert torch.equal(y, f.dequantize(parts).to(out))


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), seed=st.integers(0, 2**20), dtype=st.sampled_from(FLOATS))
def test_rows_do_not_know_each_other(name: str, seed: int, dtype: torch.dtype) -> None:
    f, x = FORMATS[name], normal(4, 3, 64, seed=seed, dtype=dtype)
    whole = f.quantize(x)
    for i in range(4):
        assert_same_bits(f.quantize(x[i]), [part[i] for part in whole])


@pytest.mark.parametrize("name", SCALED)
def test_one_scale_for_the_tensor(name: str) -> None:
    f, x = FORMATS[name], normal(5, 2, 48)
    x[3, 1, 7] = 40.0
    scale = row_scale(name, f.quantize(x, granularity="tensor"))
    assert scale.unique().numel() == 1
    torch.testing.assert_close(float(scale[0, 0, 0]), 40.0 / MAX_IN_SCALES[name], rtol=1e-6, atol=0)
    rows = f.quantize(x)
    assert row_scale(name, rows).unique().numel() == 10
    # the row that holds the largest value has the same parts either way
    assert_same_bits([p[3, 1] for p in f.quantize(x, granularity="tensor")], [p[3, 1] for p in rows])


@pytest.mark.parametrize("name", ("mxfp8", "mxfp4"))
def test_mx_has_no_scale_of_a_tensor(name: str) -> None:
    x = normal(5, 64)
    assert_same_bits(FORMATS[name].quantize(x, granularity="tensor"), FORMATS[name].quantize(x))
    with pytest.raises(ValueError, match="static"):
        FORMATS[name].quantize(x, static=torch.tensor(1.0))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_static_scale_is_used_and_saturates(name: str, dtype: torch.dtype) -> None:
    f, x, static = FORMATS[name], normal(6, 64, dtype=dtype), torch.tensor(1 / 512)
    parts = f.quantize(x, static=static)
    assert types(parts) == f.part_types(x.shape)
    assert bool((row_scale(name, parts) == static).all())
    limit = MAX_IN_SCALES[name] / 512
    for factor in (1, 1e4):
        y = f.dequantize(f.quantize((x.float() * factor).clamp(-6e4, 6e4), static=static))
        assert float(y.abs().max()) <= limit
    assert float(y.abs().max()) == limit
    assert bool((y.sign() * x.sign() >= 0).all())
    # the scale that the dynamic range gives gives the same parts
    flat = x.flatten()
    dynamic = f.quantize(flat)
    assert_same_bits(f.quantize(flat, static=row_scale(name, dynamic)[0]), dynamic)


@every_format
@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_stay_zeros(name: str, dtype: torch.dtype) -> None:
    f, x = FORMATS[name], normal(3, 64, dtype=dtype)
    x[1] = 0
    for granularity in ("row", "tensor"):
        y = f.dequantize(f.quantize(x, granularity=granularity))
        assert bool((y[1] == 0).all()) and bool(y.isfinite().all())
    for part in f.quantize(torch.zeros(2, 64, dtype=dtype)):
        assert bool(part.float().isfinite().all())


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    position=st.integers(0, 63),
    dtype=st.sampled_from(FLOATS),
    granularity=st.sampled_from(["row", "tensor", "static"]),
)
def test_what_is_no_number_stays_visible(
    name: str, bad: float, position: int, dtype: torch.dtype, granularity: str
) -> None:
    f, x = FORMATS[name], normal(3, 64, dtype=dtype)
    x[1, position] = bad
    if granularity == "static":
        parts = f.quantize(x, static=torch.tensor(0.01)) if name in SCALED else f.quantize(x)
    else:
        parts = f.quantize(x, granularity=granularity)
    y = f.dequantize(parts)
    if f.name in ("mxfp8", "mxfp4"):
        block = position // 32
        assert parts[1][1, block] == 255 and int((parts[1] == 255).sum()) == 1
        assert bool(y[1, 32 * block : 32 * block + 32].isnan().all()) and int(y.isnan().sum()) == 32
    elif granularity == "tensor":
        assert bool(row_scale(name, parts).isnan().all()) and bool(y.isnan().all())
    else:
        assert row_scale(name, parts).isnan().flatten().tolist() == [False, True, False]
        assert bool(y[1].isnan().all()) and int(y.isnan().sum()) == 64


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(NAMES), exponent=st.integers(-149, 127), mantissa=st.floats(1, 2, width=32))
def test_no_magnitude_makes_a_number_of_no_sense(name: str, exponent: int, mantissa: float) -> None:
    """From the smallest subnormal to the largest float32: an error is bounded, a sign kept, nothing not finite."""
    f = FORMATS[name]
    top = torch.tensor(mantissa, dtype=torch.float64) * 2.0**exponent
    # from 1.75 * 2**127 on MXFP4 rounds up to 2**128, which has a test of its own
    x = (torch.linspace(-1, 1, 64, dtype=torch.float64) * top).clamp(-2.9e38, 2.9e38).to(torch.float32)
    y = f.dequantize(f.quantize(x))
    assert bool(y.isfinite().all())
    assert bool((y.sign() * x.sign() >= 0).all())
    # half a step at the row's largest value, which stands anywhere in a binade unless a float32 scale follows it
    step = {
        "int8": 1 / 254,
        "fp8": 1 / 28 if exponent > -117 else 1 / 17,
        "mxfp8": 1 / 17,
        "mxfp4": 1 / 5,
        "nvfp4": 1 / 5,
    }[name]
    # below some 2**-110 the scales stop shrinking; the error is then one of that smallest scale
    smallest = {"int8": 2.0**-126, "fp8": 2.0**-130, "mxfp8": 2.0**-136, "mxfp4": 2.0**-127, "nvfp4": 2.0**-123}[name]
    error = (y.double() - x.double()).abs().max()
    assert float(error) <= step * float(x.abs().max()) * (1 + 1e-5) + smallest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_finite_values_stay_finite(name: str, dtype: torch.dtype) -> None:
    f, largest = FORMATS[name], torch.finfo(dtype).max
    x = torch.full((1, 64), largest, dtype=dtype)
    x[0, ::2] *= -0.5
    parts = f.quantize(x)
    assert all(bool(part.float().isfinite().all()) for part in parts)
    y = f.dequantize(parts)
    if name in ("mxfp8", "mxfp4") and dtype != torch.float16:
        assert bool(y[0, 1::2].isinf().all())  # 2**128: the nearest multiple of the block's step
    if not bool(y.isfinite().all()):
        assert name in ("mxfp8", "mxfp4", "int8")  # int8: 127 * (amax / 127) may round up, too
        x = x * 0.75
        y = f.dequantize(f.quantize(x))
    assert sqnr(x.float(), y) > 20


@every_format
def test_compiled_code_gives_the_same_bits(name: str) -> None:
    torch._dynamo.reset()
    f, dtype = FORMATS[name], torch.bfloat16 if name in ("int8", "mxfp4") else torch.float32
    quantize = torch.compile(f.quantize, fullgraph=True, dynamic=True)
    dequantize = torch.compile(f.dequantize, fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x = normal(2, rows, 96, dtype=dtype)
        x[0, 1] = 0
        parts = f.quantize(x)
        assert_same_bits(quantize(x), parts)
        assert_same_bits([dequantize(parts, dtype)], [f.dequantize(parts, dtype)])


@every_format
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_traces_on_symbolic_shapes(name: str, granularity: str) -> None:
    f = FORMATS[name]

    def there_and_back(x: torch.Tensor) -> list[torch.Tensor]:
        parts = f.quantize(x, granularity=granularity)
        assert types(parts) == f.part_types(x.shape)
        return [*parts, f.dequantize(parts, torch.bfloat16)]

    graph = make_fx(there_and_back, tracing_mode="symbolic")(normal(5, 7, 64))
    for shape in ((3, 9, 64), (2, 4, 128)):
        x = normal(*shape, seed=1)
        assert_same_bits(graph(x), there_and_back(x))


@every_format
def test_fakes_have_the_promised_types(name: str) -> None:
    f = FORMATS[name]
    with FakeTensorMode():
        parts = f.quantize(torch.empty(4, 5, 96, dtype=torch.bfloat16))
        assert types(parts) == f.part_types((4, 5, 96))
        assert f.dequantize(parts, torch.float16).shape == (4, 5, 96)


def refusals() -> list[tuple[Format, dict[str, object], type[Exception], str]]:
    x = torch.zeros(2, 64)
    return [
        (f, arguments, error, message)
        for f in FORMATS.values()
        for arguments, error, message in (
            ({"x": x.double()}, TypeError, "float64"),
            ({"x": x.to(torch.int32)}, TypeError, "int32"),
            ({"x": torch.tensor(1.0)}, ValueError, "scalar"),
            ({"x": x, "granularity": "channel"}, ValueError, "'channel'"),
        )
    ] + [
        (FORMATS[name], {"x": x, "static": static}, error, message)
        for name in SCALED
        for static, error, message in (
            (torch.ones(1), ValueError, r"\(1,\)"),
            (torch.tensor(1, dtype=torch.int32), TypeError, "int32"),
        )
    ]


@pytest.mark.parametrize(("f", "arguments", "error", "message"), refusals())
def test_wrong_arguments_are_refused(
    f: Format, arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        f.quantize(**arguments)  # type: ignore[arg-type]


@every_format
def test_unsupported_says_why_and_quantize_agrees(name: str) -> None:
    f = FORMATS[name]
    for K in (0, 1, 8, 16, 17, 31, 32, 48, 64):
        reason, x = f.unsupported(K), torch.zeros(2, K)
        divides = f.block is None or (K > 0 and K % f.block == 0)
        assert (reason is None) == divides
        if reason is not None:
            assert str(K) in reason and str(f.block) in reason
            with pytest.raises(ValueError, match=f"K = {K} "):
                f.quantize(x)
        else:
            assert types(f.quantize(x)) == f.part_types((2, K))


@every_format
def test_a_wrong_number_of_parts_is_refused(name: str) -> None:
    parts = FORMATS[name].quantize(normal(2, 64))
    with pytest.raises(ValueError, match=f"{name} has {len(parts)} parts"):
        FORMATS[name].dequantize(parts[:-1])


def test_int8_rows_are_scaled_by_their_largest_over_127() -> None:
    x = torch.tensor([[1.0, -0.25, 0.0], [-3.0, 1.5, 127.0]])
    q, scale = formats.quantize_int8(x)
    assert q.tolist() == [[127, -32, 0], [-3, 2, 127]]  # -31.75 and, a tie, 1.5
    assert scale.tolist() == [[float(torch.tensor(1.0) / 127)], [1.0]]


def test_sqnr() -> None:
    ones = torch.ones(10)
    assert math.isclose(sqnr(ones, ones * 1.1), 20, rel_tol=1e-5)
    assert sqnr(ones, ones) == math.inf
    assert sqnr(0 * ones, ones) == -math.inf
    assert math.isnan(sqnr(ones * math.nan, ones)) and math.isnan(sqnr(ones, ones * math.nan))
    assert sqnr(ones, ones / 0) == -math.inf
    assert math.isclose(sqnr(ones.bfloat16(), 0 * ones), 0)
    with pytest.raises(ValueError, match="shapes differ"):
        sqnr(ones, ones[:5])
