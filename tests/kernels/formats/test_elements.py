"""E2M1, E4M3 and E8M0: every code and every neighbourhood of a tie, against ml_dtypes, torchao and exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from ditc.kernels.formats import e2m1, e8m0, fp8, mx

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODES = torch.arange(16, dtype=torch.uint8)
BYTES = torch.arange(256, dtype=torch.uint8)


def neighbours(values: torch.Tensor, ulps: int = 3) -> torch.Tensor:
    """``values`` and the float32 numbers up to ``ulps`` to either side, of both signs."""
    bits = values.to(torch.float32).view(torch.int32).unsqueeze(-1) + torch.arange(-ulps, ulps + 1, dtype=torch.int32)
    near = bits.clamp(min=0).view(torch.float32).flatten()
    near = near[near.isfinite()]
    return torch.cat([near, -near])


def binades(start: int, stop: int) -> torch.Tensor:
    """Numbers in every binade: its ends, ties of up to five significant bits, and 200 at random."""
    mantissas = torch.cat(
        [
            torch.arange(32) / 32 + 1,
            torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1,
        ]
    )
    return (mantissas.double().unsqueeze(0) * 2.0 ** torch.arange(start, stop).double().unsqueeze(1)).float().flatten()


def sweep() -> torch.Tensor:
    """Float32 numbers around and between all ties of E2M1, subnormal to huge, and the signed zeros."""
    ties = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(E2M1)])
    dense = torch.arange(-8 * 1024, 8 * 1024 + 1) / 1024
    return torch.cat([neighbours(ties), neighbours(torch.tensor(E2M1)), dense, neighbours(binades(-149, 128), 1),
                      torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])  # fmt: skip


def test_e2m1_decodes_every_code() -> None:
    expected = torch.tensor([*E2M1, *(-v for v in E2M1)])
    assert torch.equal(e2m1.decode(CODES).view(torch.int32), expected.view(torch.int32))  # minus zero, too


def test_e2m1_encodes_what_it_decodes() -> None:
    assert torch.equal(e2m1.encode(e2m1.decode(CODES)), CODES)


def test_e2m1_rounds_to_nearest_with_ties_to_the_even_code() -> None:
    x = sweep()
    x = x[x.isfinite()]
    codes = e2m1.encode(x)
    magnitudes = np.array(E2M1)
    # distances in float64, saturated first; near the ties, where it matters, they are exact
    distance = np.abs(np.minimum(np.abs(x.double().numpy()), 6.0)[:, None] - magnitudes)
    nearest = distance == distance.min(1, keepdims=True)
    even_first = np.argsort([0, 1, 0, 1, 0, 1, 0, 1], kind="stable")
    expected = even_first[nearest[:, even_first].argmax(1)]
    assert torch.equal((codes & 7).long(), torch.from_numpy(expected))
    assert torch.equal((codes >> 3).bool(), x.signbit())


def test_e2m1_rounds_as_ml_dtypes_does() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = sweep()
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(e2m1.decode(e2m1.encode(x)).numpy(), theirs.astype(np.float32))
    assert np.array_equal(e2m1.encode(x).numpy(), theirs.view(np.uint8) & 15)
    assert np.array_equal(e2m1.decode(CODES).numpy(), CODES.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_e2m1_rounds_as_torchao_does() -> None:
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = sweep()
    codes = kernels.f32_to_f4_unpacked(x)
    assert torch.equal(e2m1.encode(x), codes)
    assert torch.equal(e2m1.decode(CODES), kernels.f4_unpacked_to_f32(CODES))
    assert torch.equal(e2m1.pack(codes[: codes.numel() // 2 * 2]), kernels.pack_uint4(codes[: codes.numel() // 2 * 2]))
    assert torch.equal(e2m1.unpack(BYTES), kernels.unpack_uint4(BYTES))


def test_e2m1_rounds_as_modelopt_does() -> None:
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    x = sweep()
    theirs = qtensor.NVFP4QTensor._cast_fp4(x.clone())
    differ = e2m1.encode(x) != theirs
    assert bool((x[differ] == 0).all()) and bool(x[differ].signbit().all())  # modelopt drops the sign of minus zero
    assert torch.equal(e2m1.decode(CODES), qtensor.NVFP4QTensor.get_e2m1_values("cpu")[CODES.long()])


def test_every_pair_of_codes_packs_low_nibble_first() -> None:
    pairs = torch.cartesian_prod(CODES, CODES)
    packed = e2m1.pack(pairs)
    assert packed.shape == (256, 1)
    assert torch.equal(packed[:, 0], pairs[:, 0] + 16 * pairs[:, 1])
    assert torch.equal(e2m1.unpack(packed), pairs)
    assert torch.equal(e2m1.pack(e2m1.unpack(BYTES)), BYTES)


def e4m3_sweep() -> torch.Tensor:
    every = BYTES.view(fp8.E4M3).float()
    values = every[every.isfinite() & (every >= 0)].sort().values.double()
    ties = (values[1:] + values[:-1]) / 2
    return torch.cat([neighbours(ties.float()), neighbours(values.float()), neighbours(binades(-149, 128), 1),
                      torch.tensor([448.0, 464.0, 480.0, 1e30, torch.inf, -torch.inf, 0.0, -0.0])])  # fmt: skip


def test_e4m3_rounds_as_ml_dtypes_does_and_saturates() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = e4m3_sweep()
    theirs = x.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(fp8.to_e4m3(x).view(torch.uint8).numpy(), theirs.view(np.uint8))
    decoded = BYTES.view(fp8.E4M3).float().numpy()
    assert np.array_equal(decoded, BYTES.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)


def test_e4m3_keeps_every_value_and_nan() -> None:
    every = BYTES.view(fp8.E4M3)
    again = fp8.to_e4m3(every.float())
    assert torch.equal(again.view(torch.uint8), BYTES)  # 0x7f and 0xff are its two NaNs
    assert bool(fp8.to_e4m3(torch.tensor([torch.nan])).isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_e4m3_of_every_short_float(dtype: torch.dtype) -> None:
    """All 65,536 bfloat16 and float16 numbers (for float32: the bfloat16 ones, widened)."""
    short = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16 if dtype == torch.float32 else dtype)
    x = short.float()
    x = x[~x.isnan()]
    ours = fp8.to_e4m3(x).float().double()
    assert bool((ours.abs() <= 448).all())
    clipped = x.double().clamp(-448, 448)
    exponent = clipped.abs().clamp(min=2.0**-6).log2().floor()
    assert bool(((ours - clipped).abs() <= 2.0 ** (exponent - 4)).all())


def test_e8m0_decodes_every_byte() -> None:
    ours = e8m0.decode(BYTES)
    expected = [2.0 ** (b - 127) for b in range(255)]
    assert ours[:255].double().tolist() == expected and math.isnan(float(ours[255]))
    assert float(ours[0]) == 2.0**-127 and 0 < float(ours[0]) < torch.finfo(torch.float32).tiny
    assert torch.equal(e8m0.reciprocal(BYTES[:254]).double() * ours[:254].double(), torch.ones(254).double())
    assert float(e8m0.reciprocal(BYTES[255:])) == 0


def test_e8m0_decodes_as_ml_dtypes_and_torch_do() -> None:
    ours = e8m0.decode(BYTES)
    assert torch.equal(ours[:255], BYTES[:255].view(torch.float8_e8m0fnu).float())
    ml_dtypes = pytest.importorskip("ml_dtypes")
    theirs = BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.array_equal(ours.numpy(), theirs, equal_nan=True)


def exact_exponent(amax: float, largest: float, rule: str) -> int:
    """The rules of the specification in rational arithmetic."""
    if amax == 0:
        return 0
    ratio = Fraction(amax) / (Fraction(largest) if rule == "rceil" else Fraction(2) ** math.floor(math.log2(largest)))
    floor = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    floor -= Fraction(2) ** floor > ratio
    exponent = floor if rule == "floor" or Fraction(2) ** floor == ratio else floor + 1
    return max(exponent, -127) + 127


@pytest.mark.parametrize("largest", [6.0, 448.0, 57344.0])
@pytest.mark.parametrize("rule", ["floor", "rceil"])
def test_e8m0_rules_are_those_of_exact_arithmetic(rule: e8m0.Rule, largest: float) -> None:
    boundaries = torch.cat([2.0 ** torch.arange(-149, 128).double(), largest * 2.0 ** torch.arange(-152, 112).double()])
    boundaries = boundaries[boundaries < 2.0**128]
    random = binades(-149, 128)[::17]
    amax = torch.cat([neighbours(boundaries), random, torch.tensor([0.0])]).abs()
    ours = e8m0.encode(amax, largest, rule)
    assert ours.tolist() == [exact_exponent(a, largest, rule) for a in amax.tolist()]


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_rceil_is_the_hardware_s_rounding_of_the_float32_quotient(largest: float) -> None:
    """Blackwell divides in float32, then rounds the quotient's exponent up: the same byte, always."""
    amax = torch.cat([neighbours(largest * 2.0 ** torch.arange(-120, 118), 40), binades(-110, 128)]).abs()
    bits = (amax / largest).view(torch.int32)
    assert torch.equal(e8m0.encode(amax, largest, "rceil").int(), (bits + 0x7FFFFF) >> 23)


def test_e8m0_of_what_is_no_number() -> None:
    bad = torch.tensor([torch.nan, torch.inf, 1.0])
    for rule in ("floor", "rceil"):
        assert e8m0.encode(bad, 6.0, rule)[:2].tolist() == [255, 255]
    with pytest.raises(ValueError, match="'even'"):
        mx.quantize_mxfp4(torch.ones(1, 32), rule="even")  # type: ignore[arg-type]
