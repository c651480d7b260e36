"""NVFP4 against torchao and modelopt, bit for bit; its options against their definitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.kernels.formats import (
    SMALLEST_OUTER,
    dequantize_nvfp4,
    e2m1,
    quantize_nvfp4,
    sqnr,
)

FLOATS = (torch.float32, torch.bfloat16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(part: torch.Tensor) -> torch.Tensor:
    return part.contiguous().view(torch.uint8)


def torchao_parts(x: torch.Tensor) -> list[torch.Tensor]:
    pytest.importorskip("torchao", minversion="0.18")  # earlier ones divide, or pack the even element high
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    outer = module.per_tensor_amax_to_scale(x.abs().max())
    theirs = module.NVFP4Tensor.to_nvfp4(x, block_size=16, per_tensor_scale=outer, is_swizzled_scales=False)
    return [theirs.qdata, theirs.scale.reshape(*x.shape[:-1], -1), outer]


def modelopt_parts(x: torch.Tensor) -> list[torch.Tensor]:
    pytest.importorskip("modelopt", minversion="0.47")  # earlier ones clamp block scales otherwise
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    theirs, scale, outer = qtensor.quantize(x.clone(), 16)
    return [theirs._quantized_data, scale, outer]


def assert_parts(ours: list[torch.Tensor], theirs: list[torch.Tensor], signed_zeros: bool) -> None:
    q, scale, outer = ours
    assert bool((outer == theirs[2]).all())
    assert torch.equal(raw(scale), raw(theirs[1]))
    codes, expected = e2m1.unpack(q), e2m1.unpack(theirs[0])
    if not signed_zeros:  # modelopt drops the sign of a zero in the input, ours and torchao's keep it
        codes = torch.where((codes == 8) & (expected == 0), 0, codes)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_torchao_s(adversarial: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, x in adversarial.items():
        x = x.to(dtype)
        ours = quantize_nvfp4(x, granularity="tensor")
        assert_parts(ours, torchao_parts(x), signed_zeros=True)
        assert ours[2].shape == (x.shape[0], 1), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_are_modelopt_s(adversarial: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    for x in adversarial.values():
        x = x.to(dtype)
        assert_parts(quantize_nvfp4(x, granularity="tensor", recipe="modelopt"), modelopt_parts(x), signed_zeros=False)


def test_a_row_is_quantised_as_a_tensor_of_its_own(adversarial: Mapping[str, torch.Tensor]) -> None:
    for x in adversarial.values():
        q, scale, outer = quantize_nvfp4(x)
        for row in range(0, x.shape[0], 13):
            if bool((x[row] == 0).all()):
                continue  # torchao divides by zero
            ours = [q[row : row + 1], scale[row : row + 1], outer[row : row + 1]]
            assert_parts(ours, torchao_parts(x[row : row + 1]), signed_zeros=True)


@settings(max_examples=120, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    blocks=st.integers(1, 9),
    exponent=st.integers(-80, 100),
    sizes=st.integers(0, 8),
    seed=st.integers(0, 2**20),
    recipe=st.sampled_from(["torchao", "modelopt"]),
)
def test_bits_agree_on_any_shape(
    lead: list[int], blocks: int, exponent: int, sizes: int, seed: int, recipe: Any
) -> None:
    sized = normal(*lead, blocks, 16, seed=seed) * 2.0 ** (sizes * normal(*lead, blocks, 1, seed=seed + 1)).round()
    x = (sized.flatten(-2).double() * 2.0**exponent).float()
    theirs = torchao_parts(x) if recipe == "torchao" else modelopt_parts(x)
    assert_parts(quantize_nvfp4(x, granularity="tensor", recipe=recipe), theirs, recipe == "torchao")


def test_every_block_scale_occurs_and_reads_as_torchao_reads_it() -> None:
    """Blocks whose scales take each E4M3 value from the smallest to 448, and every code under each of them."""
    pytest.importorskip("torchao", minversion="0.18")  # earlier ones divide, or pack the even element high
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 15, 14, 13, 12, 11, 10, 9, 8], dtype=torch.uint8)
    scale = torch.arange(1, 127, dtype=torch.uint8).reshape(126, 1).view(torch.float8_e4m3fn)
    q = e2m1.pack(codes.expand(126, 16))
    for g in (torch.tensor(1.0), torch.tensor(0.0371), torch.tensor(2.0**-100), torch.tensor(1e30)):
        outer = g.expand(126, 1)
        ours = dequantize_nvfp4([q, scale, outer])
        exact = e2m1.decode(codes).double() * scale.double() * g.double()
        assert torch.equal(ours, exact.float())  # rounded once
        theirs = module.NVFP4Tensor(q, scale, 16, torch.float32, g).dequantize(torch.float32)
        torch.testing.assert_close(ours, theirs, rtol=2.0**-22, atol=0)
    # quantised again, they come back (block scales are derived from maxima, so the largest must be a 6)
    values = dequantize_nvfp4([q, scale, torch.ones(126, 1)])
    q2, scale2, _ = quantize_nvfp4(values, static=torch.tensor(1.0), recipe="modelopt")
    assert torch.equal(raw(scale2), raw(scale))
    q3, scale3, _ = quantize_nvfp4(values, static=torch.tensor(1.0))
    first_normal = scale.float().flatten() >= 2.0**-6
    assert torch.equal(raw(scale3)[first_normal], raw(scale)[first_normal])
    assert bool((scale3.float()[~first_normal] == 2.0**-6).all())
    assert torch.equal(q2, q) and torch.equal(q3[first_normal], q[first_normal])


def test_the_recipes_differ_where_they_are_said_to() -> None:
    x = torch.zeros(1, 64)
    x[0, 0] = 6.0 * 448
    x[0, 16:32] = 6.0 * 2.0**-8 * torch.linspace(-1, 1, 16)  # a block scale of 2**-8
    for recipe, zero, small in (("torchao", 2.0**-6, 2.0**-6), ("modelopt", 1.0, 2.0**-8)):
        parts = quantize_nvfp4(x, recipe=recipe)  # type: ignore[arg-type]
        assert parts[1].float().tolist() == [[448.0, small, zero, zero]]
        assert bool((dequantize_nvfp4(parts)[0, 32:] == 0).all())
    assert sqnr(x[:, 16:32], dequantize_nvfp4(parts)[:, 16:32]) > 15


@settings(max_examples=80, deadline=None)
@given(
    exponent=st.integers(-149, 127), recipe=st.sampled_from(["torchao", "modelopt"]), seed=st.integers(0, 2**20),
    four=st.sampled_from(["", "four_over_six", "pow2_block_scales"]), granularity=st.sampled_from(["row", "tensor"]),
)  # fmt: skip
def test_rows_of_every_size_are_sane(exponent: int, recipe: Any, seed: int, four: str, granularity: Any) -> None:
    x = (normal(4, 64, seed=seed).clamp(-1.9, 1.9).double() * 2.0**exponent).float()
    x[1] = 0
    x[2] = torch.finfo(torch.float32).smallest_normal / 2**20  # subnormal
    parts = quantize_nvfp4(x, granularity=granularity, recipe=recipe, **({four: True} if four else {}))
    assert bool((parts[2] >= SMALLEST_OUTER).all()) and bool((parts[1].float() > 0).all())
    assert bool(parts[1].float().isfinite().all()) and bool(parts[2].isfinite().all())
    y = dequantize_nvfp4(parts)
    assert bool(y.isfinite().all()) and bool((y[1] == 0).all())
    assert bool((y.sign() * x.sign() >= 0).all())
    if exponent > -100:
        assert sqnr(x[[0, 3]], y[[0, 3]]) > 14


def squared_error(parts: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    error = dequantize_nvfp4(parts).double() - x.double()
    return torch.unflatten(error.square(), -1, (-1, 16)).sum(-1)


def test_four_over_six_never_does_worse_than_either_choice() -> None:
    x = normal(64, 256) * normal(64, 1, seed=1).exp()
    q, scale, outer = quantize_nvfp4(x, four_over_six=True)
    amax = x.abs().amax(-1, keepdim=True)
    assert torch.equal(outer, amax / (6 * 256))
    block_amax = torch.unflatten(x.abs(), -1, (16, 16)).amax(-1)
    errors = []
    for target in (6.0, 4.0):
        fixed = ((block_amax / target) / outer).clamp(2.0**-6, 448).to(torch.float8_e4m3fn)
        reciprocal = ((1.0 / outer) / fixed.float()).repeat_interleave(16, -1)
        errors.append(squared_error([e2m1.pack(e2m1.encode(x * reciprocal)), fixed, outer], x))
        is_target = scale.float() == fixed.float()
        assert 0.2 < float(is_target.float().mean()) < 0.8
    chosen = squared_error([q, scale, outer], x)
    best = torch.minimum(*errors)
    assert bool((chosen <= best * (1 + 1e-5)).all())
    assert sqnr(x, dequantize_nvfp4([q, scale, outer])) > sqnr(x, dequantize_nvfp4(quantize_nvfp4(x))) + 0.5


@pytest.mark.parametrize("recipe", ["torchao", "modelopt"])
def test_power_of_two_block_scales(adversarial: Mapping[str, torch.Tensor], recipe: Any) -> None:
    for x in adversarial.values():
        q, scale, _ = quantize_nvfp4(x, recipe=recipe, pow2_block_scales=True)
        exponent = scale.float().log2()
        assert bool((exponent == exponent.round()).all()) and float(exponent.max()) <= 8
        # the block's maximum lies in the upper half of the codes, unless the scale is at an end of its range
        top = torch.unflatten(e2m1.decode(e2m1.unpack(q)).abs(), -1, (-1, 16)).amax(-1)
        inside = (scale.float() > 2.0 ** (-6 if recipe == "torchao" else -9)) & (top > 0)
        assert bool((top[inside] >= 3).all())
        # what has such scales already stays what it is under the same outer scale
        once = quantize_nvfp4(x, granularity="tensor", recipe=recipe, pow2_block_scales=True)
        y = dequantize_nvfp4(once)
        twice = quantize_nvfp4(y, static=once[2][0, 0], recipe=recipe, pow2_block_scales=True)
        assert torch.equal(dequantize_nvfp4(twice), y)


def test_sqnr_on_gaussian_data() -> None:
    x = normal(256, 1152)
    floors = {(): (20.0, 21.0), ("four_over_six",): (20.8, 22.0), ("pow2_block_scales",): (18.5, 20.0)}
    for options, (low, high) in floors.items():
        for granularity in ("row", "tensor"):
            parts = quantize_nvfp4(x, granularity=granularity, **dict.fromkeys(options, True))  # type: ignore[arg-type]
            assert low < sqnr(x, dequantize_nvfp4(parts)) < high
    relative = float((dequantize_nvfp4(quantize_nvfp4(x, granularity="tensor")) - x).norm() / x.norm())
    assert 0.091 < relative < 0.098


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'cutlass'"):
        quantize_nvfp4(normal(2, 32), recipe="cutlass")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exclude each other"):
        quantize_nvfp4(normal(2, 32), four_over_six=True, pow2_block_scales=True)
