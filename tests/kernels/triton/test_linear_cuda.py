"""Which implementation the linear ops choose on CUDA, and that those which run without a GPU agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditc.kernels.formats import FORMATS, format_of
from ditc.kernels.linear import quantized_linear_reference
from ditc.kernels.linear.cuda import implementation, run, weight_implementation

DEVICES = {
    "turing": (7, 5), "a100": (8, 0), "ada": (8, 9), "hopper": (9, 0),
    "b200": (10, 0), "b300": (10, 3), "rtx50": (12, 0),
}  # fmt: skip
EXPECTED = {
    "int8": ["dequantize"] + ["int_mm"] * 6,
    "fp8": ["dequantize"] * 2 + ["scaled_mm"] * 5,
    "mxfp8": ["dequantize"] * 2 + ["triton"] * 2 + ["native"] * 3,
    "mxfp4": ["dequantize"] + ["triton"] * 3 + ["native"] * 3,
    "nvfp4": ["dequantize"] + ["triton"] * 3 + ["native"] * 3,
}


@pytest.mark.parametrize("format", FORMATS)
def test_large_aligned_matrices(format: str) -> None:
    chosen = [implementation(format, 4096, 3072, 3072, capability) for capability in DEVICES.values()]
    assert chosen == EXPECTED[format]


@pytest.mark.parametrize(
    ("format", "M", "N", "K", "chosen"),
    [
        ("int8", 16, 64, 64, "triton"),
        ("int8", 17, 64, 64, "int_mm"),
        ("int8", 17, 60, 64, "triton"),
        ("int8", 17, 64, 60, "triton"),
        ("int8", 17, 64, 0, "triton"),
        ("fp8", 1, 64, 64, "scaled_mm"),
        ("fp8", 64, 72, 64, "triton"),
        ("fp8", 64, 64, 72, "triton"),
        ("fp8", 64, 64, 0, "triton"),
    ],
)
def test_shapes_that_the_libraries_do_not_take(format: str, M: int, N: int, K: int, chosen: str) -> None:
    assert implementation(format, M, N, K, (9, 0)) == chosen


def test_what_else_decides() -> None:
    assert implementation("fp8", 64, 64, 64, (9, 0), out_dtype=torch.float32) == "triton"
    assert implementation("nvfp4", 64, 64, 64, (10, 0), triton_version=(3, 7)) == "triton"
    assert implementation("mxfp4", 64, 64, 64, (10, 0), triton_version=(3, 7)) == "native"


@pytest.mark.parametrize("format", FORMATS)
def test_weights_alone(format: str) -> None:
    chosen = [weight_implementation(format, capability) for capability in DEVICES.values()]
    before = 2 if format in ("fp8", "mxfp8") else 1
    assert chosen == ["dequantize"] * before + ["triton"] * (7 - before)


OPERANDS = {"bare": (False, False, False), "bias": (True, False, False), "all": (True, True, True)}


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize(
    ("format", "chosen"),
    [("int8", "int_mm"), ("int8", "triton"), ("fp8", "scaled_mm"), ("fp8", "triton"), ("nvfp4", "triton")],
)
@pytest.mark.interpreter
def test_implementations_agree_with_the_reference(
    device: str, format: str, chosen: str, operands: str, normal: Callable[..., Tensor]
) -> None:
    pytest.importorskip("triton")
    found = format_of(format)
    x = found.quantize(normal(2, 20, 64).to(device))
    w = found.quantize(normal(32, 64, seed=1).to(device))
    values = normal(32, seed=2), normal(2, 1, 32, seed=3), normal(2, 20, 32, seed=4)
    bias, gate, residual = (
        value.to(device) if there else None for value, there in zip(values, OPERANDS[operands], strict=True)
    )
    out_dtype = torch.bfloat16 if chosen == "scaled_mm" else torch.float32
    actual = run(chosen, x, w, bias, gate, residual, format, out_dtype)  # type: ignore[arg-type]
    truth = quantized_linear_reference(x, w, bias, gate, residual, format, torch.float32)
    assert actual.dtype == out_dtype and actual.shape == (2, 20, 32) and actual.is_contiguous()
    # torch._scaled_mm rounds the product to bfloat16, the epilogue the result
    tolerance = 2.0**-6 if chosen == "scaled_mm" else 1e-5 if device == "cpu" else 2.0**-9
    torch.testing.assert_close(actual.float(), truth, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("format", FORMATS)
def test_dequantised_operands(format: str, normal: Callable[..., Tensor]) -> None:
    found = format_of(format)
    x, w = found.quantize(normal(2, 9, 64)), found.quantize(normal(31, 64, seed=1))
    gate, residual = normal(2, 1, 31, seed=3), normal(2, 9, 31, seed=4)
    actual = run("dequantize", x, w, None, gate, residual, format, torch.float32)
    truth = quantized_linear_reference(x, w, None, gate, residual, format, torch.float32)
    torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-5)
