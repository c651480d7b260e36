"""The scaled GEMMs in Triton, decoded and native, against float64 on dequantised operands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import numpy as np
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditc.kernels.formats import format_of
from ditc.kernels.linear import quantized_linear_reference
from ditc.kernels.linear.triton import epilogue_triton, gate_by_rows, quantized_linear_triton

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities

WAYS = [("int8", False), ("fp8", False), *((f, n) for f in ("mxfp8", "mxfp4") for n in (False, True)), ("nvfp4", False)]
"""The interpreter takes NVFP4's scales for exponents in a native product, and knows E8M0 from Triton 3.8 on."""
BLOCK = {"int8": 1, "fp8": 1, "mxfp8": 32, "mxfp4": 32, "nvfp4": 16}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""How much rounding to a type may change a result; the interpreter cuts bfloat16 off."""
Operands = tuple[list[Tensor], list[Tensor]]


def skip_unless_native_runs(device: str, native: bool) -> None:
    if native and device == "cpu" and tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 8):
        pytest.skip("the interpreter knows E8M0 scales from Triton 3.8 on")
    if native and device == "cuda" and torch.cuda.get_device_capability()[0] < 10:
        pytest.skip("no block-scaled tensor cores")


def random_parts(format: str, rows: int, K: int, generator: torch.Generator, device: str) -> list[Tensor]:
    """Any codes but NaN, with scales of a wide range; not only what a quantiser makes."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    scale = torch.randn(rows, 1, generator=generator).mul(3).exp()
    signs = integers(0, 2, rows, K) * 128
    match format:
        case "int8":
            parts = [integers(-128, 128, rows, K).to(torch.int8), scale]
        case "fp8":
            parts = [(integers(0, 127, rows, K) + signs).byte().view(torch.float8_e4m3fn), scale]
        case "mxfp8":
            codes = (integers(0, 127, rows, K) + signs).byte().view(torch.float8_e4m3fn)
            parts = [codes, integers(117, 137, rows, K // 32).byte()]
        case "mxfp4":
            parts = [integers(0, 256, rows, K // 2).byte(), integers(117, 137, rows, K // 32).byte()]
        case _:
            scales = integers(0, 127, rows, K // 16).byte().view(torch.float8_e4m3fn)
            parts = [integers(0, 256, rows, K // 2).byte(), scales, scale]
    return [part.to(device) for part in parts]


def expected(
    x: list[Tensor], w: list[Tensor], bias: Tensor | None, gate: Tensor | None, residual: Tensor | None, format: str
) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the magnitudes that it was summed from."""
    a, b = (format_of(format).dequantize(parts).double() for parts in (x, w))
    y, size = a @ b.t(), a.abs() @ b.abs().t()
    for name, value in (("bias", bias), ("gate", gate), ("residual", residual)):
        if value is not None:
            value = value.double()
            y, size = (y * value, size * value.abs()) if name == "gate" else (y + value, size + value.abs())
    return y, size


def assert_close(actual: Tensor, y: Tensor, size: Tensor, device: str, format: str) -> None:
    assert actual.shape == y.shape and actual.is_contiguous()
    # tensor cores cut bits off where they add; Hopper's FP8 units keep 14
    tolerance = 1e-6 if device == "cpu" else 2.0**-12 if format == "fp8" else 1e-5
    limit = tolerance * size + STEP[actual.dtype] * y.abs() + torch.finfo(actual.dtype).tiny
    error = (actual.double() - y).abs()
    assert bool((error <= limit).all()), float((error / limit).max())


def spread_out(t: Tensor) -> Tensor:
    """The same values with strides of two."""
    if t.dtype == torch.float8_e4m3fn:
        return spread_out(t.view(torch.uint8)).view(torch.float8_e4m3fn)
    return torch.stack([t, torch.full_like(t, 85)], dim=-1)[..., 0]


@pytest.mark.parametrize(("format", "native"), WAYS)
@settings(max_examples=30, deadline=None)
@given(
    M=st.one_of(st.integers(1, 20), st.integers(60, 140)), N=st.integers(1, 150), blocks=st.integers(1, 9),
    out_dtype=st.sampled_from(FLOATS), has=st.tuples(*[st.booleans()] * 3), strided=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(
    device: str, format: str, native: bool, M: int, N: int, blocks: int, out_dtype: torch.dtype,
    has: tuple[bool, bool, bool], strided: bool, seed: int,
) -> None:  # fmt: skip
    skip_unless_native_runs(device, native)
    generator = torch.Generator().manual_seed(seed)
    K = blocks * BLOCK[format] if BLOCK[format] > 1 else 37 * blocks
    x, w = (random_parts(format, rows, K, generator, device) for rows in (M, N))
    y, size = expected(x, w, None, None, None, format)
    bias, gate, residual = (
        torch.randn(shape, generator=generator).to(device) if given_ else None
        for given_, shape in zip(has, ((N,), (N,), (M, N)), strict=True)
    )
    # scales of the size of the result, and small enough that float16 does not overflow
    top = float(size.max()) / 100
    x, w = list(x), list(w)
    if top > 0 and format not in ("mxfp8", "mxfp4"):
        x[-1] = x[-1] / top
    elif top > 0:
        x[1] = (x[1].int() - int(np.ceil(np.log2(top)))).clamp(min=0).byte()
    y, size = expected(x, w, bias, gate, residual, format)
    if strided:
        x, w = [spread_out(part) for part in x], [spread_out(part) for part in w]
        residual = None if residual is None else residual.t().contiguous().t()
    actual = quantized_linear_triton(x, w, bias, gate, residual, format, out_dtype, native=native)
    assert actual.dtype == out_dtype
    assert_close(actual, y, size, device, format)


@pytest.mark.parametrize("K", [1, 15, 16, 130, 300])
def test_int8_sums_are_exact(device: str, K: int) -> None:
    generator = torch.Generator().manual_seed(K)
    x, w = (random_parts("int8", rows, K, generator, device) for rows in (19, 70))
    bias, gate, residual = (torch.randn(s, generator=generator).to(device) for s in ((70,), (70,), (19, 70)))
    plain = quantized_linear_triton(x, w, None, None, None, "int8", torch.float32)
    assert torch.equal(plain, quantized_linear_reference(x, w, None, None, None, "int8", torch.float32))
    ones = [[parts[0], torch.ones_like(parts[1])] for parts in (x, w)]
    sums = quantized_linear_triton(*ones, None, None, None, "int8", torch.float32)
    assert torch.equal(sums.long(), (x[0].double() @ w[0].double().t()).long())
    actual = quantized_linear_triton(x, w, bias, gate, residual, "int8", torch.float32)
    assert_close(actual, *expected(x, w, bias, gate, residual, "int8"), device, "int8")


@pytest.mark.parametrize(("format", "native"), WAYS)
def test_the_shortest_rows(device: str, format: str, native: bool) -> None:
    skip_unless_native_runs(device, native)
    generator = torch.Generator().manual_seed(5)
    x, w = (random_parts(format, rows, BLOCK[format], generator, device) for rows in (3, 5))
    actual = quantized_linear_triton(x, w, None, None, None, format, torch.float32, native=native)
    assert_close(actual, *expected(x, w, None, None, None, format), device, format)


@pytest.mark.parametrize(("format", "native"), WAYS)
def test_what_is_no_number_stays_in_its_row_and_column(device: str, format: str, native: bool) -> None:
    skip_unless_native_runs(device, native)
    generator = torch.Generator().manual_seed(6)
    x, w = torch.randn(21, 96, generator=generator).to(device), torch.randn(70, 96, generator=generator).to(device)
    found = format_of(format)
    clean = quantized_linear_triton(
        found.quantize(x), found.quantize(w), None, None, None, format, torch.float32, native=native
    )
    x[3, 40], x[17, 0], w[66, 95] = torch.nan, torch.inf, -torch.inf
    actual = quantized_linear_triton(
        found.quantize(x), found.quantize(w), None, None, None, format, torch.float32, native=native
    )
    lost = torch.zeros(21, 70, dtype=torch.bool, device=device)
    lost[[3, 17]], lost[:, 66] = True, True
    assert torch.equal(actual.isnan(), lost)
    assert torch.equal(actual[~lost], clean[~lost])


@pytest.mark.parametrize(("format", "native"), WAYS)
def test_zeros_give_exactly_the_bias(device: str, format: str, native: bool) -> None:
    skip_unless_native_runs(device, native)
    generator = torch.Generator().manual_seed(7)
    x, w = torch.randn(4, 64, generator=generator).to(device), torch.randn(33, 64, generator=generator).to(device)
    x[2], w[30] = 0, 0
    bias = torch.randn(33, generator=generator).to(device)
    found = format_of(format)
    y = quantized_linear_triton(
        found.quantize(x), found.quantize(w), bias, None, None, format, torch.float32, native=native
    )
    assert torch.equal(y[2], bias) and torch.equal(y[:, 30], bias[30].expand(4))


@pytest.mark.parametrize(("format", "native"), [way for way in WAYS if way[0].startswith("mx")])
@pytest.mark.parametrize(("small", "large"), [(1, 250), (20, 230), (0, 254)])
def test_mx_scales_as_far_apart_as_can_be(device: str, format: str, native: bool, small: int, large: int) -> None:
    """Where one operand's values are subnormal or the other's exceed float16, the products are of ordinary size."""
    skip_unless_native_runs(device, native)
    generator = torch.Generator().manual_seed(small)
    x, w = (random_parts(format, rows, 64, generator, device) for rows in (5, 34))
    x[1], w[1] = torch.full_like(x[1], small), torch.full_like(w[1], large)
    if format == "mxfp8":  # so that the large values stay below 2**128 and the small ones are no multiples of 2**-133
        x[0], w[0] = (part.float().clamp(-1.75, 1.75).to(torch.float8_e4m3fn) for part in (x[0], w[0]))
    else:
        w[0] = w[0] & 0x99
    actual = quantized_linear_triton(x, w, None, None, None, format, torch.float32, native=native)
    if device == "cpu" or small > 10:
        assert_close(actual, *expected(x, w, None, None, None, format), device, format)
    assert bool(actual.isfinite().all())


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_row_scales_far_apart(device: str, format: str, exponent: int) -> None:
    generator = torch.Generator().manual_seed(8)
    x, w = (random_parts(format, rows, 48, generator, device) for rows in (5, 34))
    x[-1], w[-1] = x[-1] * 2.0**exponent, w[-1] * 2.0**-exponent
    actual = quantized_linear_triton(x, w, None, None, None, format, torch.float32)
    assert_close(actual, *expected(x, w, None, None, None, format), device, format)


@pytest.mark.parametrize(
    "shape", [(7,), (1,), (2, 1, 7), (2, 9, 7), (1, 9, 7), (9, 7), (2, 1, 1), (2, 9, 1), (), (1, 1, 7)]
)
def test_every_gate_that_broadcasts(device: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(9)
    x, w = random_parts("int8", 18, 20, generator, device), random_parts("int8", 7, 20, generator, device)
    x = [part.reshape(2, 9, -1) for part in x]
    gate = torch.randn(shape, generator=generator).to(device)
    residual = torch.randn(2, 9, 7, generator=generator).to(device, torch.bfloat16)
    actual = quantized_linear_triton(x, w, None, gate, residual, "int8", torch.float32)
    assert_close(actual, *expected(x, w, None, gate, residual, "int8"), device, "int8")


def test_gates_of_a_batch_are_not_written_out() -> None:
    leading, gate = torch.Size((2, 9)), torch.randn(2, 1, 7)
    rows, repeats = gate_by_rows(gate, leading, 7)
    assert rows is not None and rows.data_ptr() == gate.data_ptr() and rows.shape == (2, 7) and repeats == 9
    rows, repeats = gate_by_rows(gate[0, 0], leading, 7)
    assert rows is not None and rows.data_ptr() == gate.data_ptr() and rows.shape == (1, 7) and repeats == 18


@pytest.mark.parametrize(("M", "N", "K"), [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(device: str, M: int, N: int, K: int) -> None:
    x = [torch.zeros(2, M, K, dtype=torch.int8, device=device), torch.ones(2, M, 1, device=device)]
    w = [torch.zeros(N, K, dtype=torch.int8, device=device), torch.ones(N, 1, device=device)]
    bias = torch.arange(N, dtype=torch.float32, device=device)
    y = quantized_linear_triton(x, w, bias, None, None, "int8", torch.float32)
    assert torch.equal(y, bias.expand(2, M, N))


def test_addresses_beyond_32_bits(device: str, tmp_path: Path) -> None:
    """Rows 2**30 bytes apart, in a file that is mostly a hole."""
    if device != "cpu":
        pytest.skip("a file, not device memory")
    K, stride = 24, 2**30
    generator = torch.Generator().manual_seed(10)
    x, w = random_parts("int8", 4, K, generator, device), random_parts("int8", 6, K, generator, device)
    memory = np.memmap(tmp_path / "rows", dtype=np.int8, mode="w+", shape=(3 * stride + K,))
    far = torch.from_numpy(memory).as_strided((4, K), (stride, 1))
    far.copy_(x[0])
    y = quantized_linear_triton([far, x[1]], w, None, None, None, "int8", torch.float32)
    assert torch.equal(y, quantized_linear_reference(x, w, None, None, None, "int8", torch.float32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float32])
def test_epilogue_of_a_result_that_is_there(device: str, dtype: torch.dtype, normal: Callable[..., Tensor]) -> None:
    y = (normal(2, 19, 150) * 1000).to(device, dtype)
    rows, columns = normal(38, seed=1).to(device), normal(150, seed=2).to(device)
    bias, gate, residual = normal(150).to(device), normal(2, 1, 150).to(device), normal(2, 19, 150).to(device)
    actual = epilogue_triton(y, rows, columns, bias, gate, residual, torch.float32)
    scale = rows.reshape(2, 19, 1).double() * columns
    truth = residual + gate * (y.double() * scale + bias)
    size = residual.abs() + gate.abs() * ((y.double() * scale).abs() + bias.abs())
    assert_close(actual, truth, size, device, "int8")
    assert torch.equal(epilogue_triton(y, None, None, None, None, None, torch.float32), y.float())
