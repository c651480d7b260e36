"""INT8 and FP8 with one scale a row: torchao and modelopt as oracles, and the floors of their accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from ditc.kernels.formats import FORMATS, quantize_fp8, quantize_int8, sqnr

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_int8_is_torchao_s(adversarial: Mapping[str, torch.Tensor], dtype: torch.dtype, granularity: str) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    for name, x in adversarial.items():
        if dtype == torch.float16 and float(x.abs().max()) > 6e4:
            continue
        wide = x.to(dtype).float()  # torchao rounds the scale to the input's type, ditc keeps it in float32
        block = (1, x.shape[1]) if granularity == "row" else tuple(x.shape)
        scale, zero = primitives.choose_qparams_affine(
            wide, primitives.MappingType.SYMMETRIC, block, torch.int8, quant_min=-127, quant_max=127, eps=2.0**-126,
            scale_dtype=torch.float32, keepdim=True,
        )  # fmt: skip
        theirs = primitives.quantize_affine(wide, block, scale, zero, torch.int8, quant_min=-127, quant_max=127)
        q, ours = quantize_int8(x.to(dtype), granularity=granularity)  # type: ignore[arg-type]
        assert torch.equal(ours, scale.float().expand_as(ours)), name
        assert torch.equal(q, theirs), name


def test_fp8_scales_are_modelopt_s_and_its_bytes_but_for_ties(adversarial: Mapping[str, torch.Tensor]) -> None:
    module = pytest.importorskip("modelopt.torch.quantization.qtensor").FP8QTensor
    for name, x in adversarial.items():
        if name == "zeros":
            continue  # modelopt divides by zero
        q, scale = quantize_fp8(x)
        theirs, expected = module.quantize(x.clone(), axis=0)
        assert torch.equal(scale.flatten(), expected.flatten().float())
        assert_equal_but_for_ties(q, theirs._quantized_data, x.double() / scale.double())
        # one scale for the tensor, given: as a checkpoint's weight is made
        static = x.abs().max() / 448
        theirs, _ = module.quantize(x.clone(), scales=static)
        q, scale = quantize_fp8(x, static=static)
        assert_equal_but_for_ties(q, theirs._quantized_data, x.double() / scale.double())


def assert_equal_but_for_ties(q: torch.Tensor, theirs: torch.Tensor, quotient: torch.Tensor) -> None:
    differ = q.view(torch.uint8) != theirs.view(torch.uint8)
    assert float(differ.float().mean()) < 0.05
    middle = (q.double() + theirs.double())[differ] / 2
    torch.testing.assert_close(quotient[differ], middle, rtol=2.0**-22, atol=0)


def test_fp8_rounds_each_value_to_nearest(adversarial: Mapping[str, torch.Tensor]) -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    for x in adversarial.values():
        q, scale = quantize_fp8(x)
        quotient = (x.double() / scale.double()).abs()
        above = torch.searchsorted(grid, quotient).clamp(1, 126)
        nearest = torch.minimum((quotient - grid[above]).abs(), (quotient - grid[above - 1]).abs())
        error = (q.double().abs() - quotient).abs()
        assert bool((error <= nearest + quotient * 2.0**-22).all())


@pytest.mark.parametrize(("name", "low", "high"), [("int8", 40.0, 44.0), ("fp8", 31.0, 33.0)])
def test_sqnr_on_gaussian_data(name: str, low: float, high: float) -> None:
    f, x, w = FORMATS[name], normal(256, 1152), normal(128, 1152, seed=1)
    x_, w_ = f.dequantize(f.quantize(x)), f.dequantize(f.quantize(w))
    assert low < sqnr(x, x_) < high
    assert low - 4 < sqnr(x @ w.t(), x_ @ w_.t()) < high
