"""The Triton quantiser behind norms and activations: near the values in float64, and near the op's own codes.

The norm sums in an order of its own and the activations use the device's exponential, so a value near a tie may get
the neighbouring code. What is asserted: every value is within half a step of its format (and a small slack) of the
truth, scales agree with the reference's, and few codes differ from it, by one step at most.
"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.kernels.formats import FORMATS, e2m1
from ditc.kernels.quantize.cuda import activation_quantize_cuda, norm_quantize_cuda, quantize_cuda
from ditc.kernels.quantize.op import (
    ACTIVATIONS,
    NORMS,
    activated,
    activation_quantize_reference,
    modulated,
    norm_quantize_reference,
    normalized,
)
from ditc.kernels.quantize.triton import activation_quantize_triton, norm_quantize_triton, quantize_triton

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SLACK = 3e-6
"""Of a row's largest magnitude: what float32 arithmetic may add before the quantiser."""
MODULATION = ("none", "[B,1,K]", "[B,N,K]", "[K]", "chunk", "tokens")


def codes(format: str, q: torch.Tensor) -> torch.Tensor:
    """Element codes as integers that are ordered as their values are."""
    if format == "int8":
        return q.int()
    sign, bits = (0x80, q.view(torch.uint8)) if format in ("fp8", "mxfp8") else (8, e2m1.unpack(q))
    magnitude = (bits & (sign - 1)).int()
    return torch.where((bits & sign) != 0, -magnitude, magnitude)


def half_step(format: str, value: torch.Tensor) -> torch.Tensor:
    """Half the spacing of a format's elements around ``value``, in units of its scale."""
    if format == "int8":
        return torch.full_like(value, 0.5)
    largest, smallest, mantissa = (448, 2.0**-6, 3) if format in ("fp8", "mxfp8") else (6, 1.0, 1)
    magnitude = value.abs().clamp(smallest, largest)
    return 2.0 ** (magnitude.log2().floor() - mantissa - 1)


def scales(format: str, parts: list[torch.Tensor], K: int) -> torch.Tensor:
    """The whole scale of each value, float64 ``[..., K]``."""
    scale = parts[1]
    if scale.dtype == torch.uint8:
        scale = 2.0 ** (scale.double() - 127)
    scale = scale.double().repeat_interleave(K // scale.shape[-1], dim=-1)
    return scale * parts[2].double() if format == "nvfp4" else scale


def assert_near(format: str, actual: list[torch.Tensor], expected: list[torch.Tensor], truth: torch.Tensor) -> None:
    actual = [part.cpu() for part in actual]
    assert [(p.shape, p.dtype) for p in actual] == [(p.shape, p.dtype) for p in expected]
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        if theirs.dtype == torch.float32:
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        else:  # within rounding of the next scale it may be that
            apart = (ours.view(torch.uint8).int() - theirs.view(torch.uint8).int()).abs()
            assert int(apart.max()) <= 1 and int(apart.count_nonzero()) <= 1 + apart.numel() // 50
    K = truth.shape[-1]
    scale = scales(format, actual, K)
    slack = SLACK * truth.abs().amax(dim=-1, keepdim=True)
    values = FORMATS[format].dequantize(actual).double()
    # in nvfp4 a block's largest value may exceed 6 of its rounded scale, by less than a step
    bound = half_step(format, truth / scale) * scale * (1 + 1e-5) + slack
    off = (values - truth).abs() - bound
    assert bool((off <= 0).all()), f"beyond the bound by {float(off.max())} of {float(slack.max())}"
    if all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(actual[1:], expected[1:], strict=True)
    ):
        apart = (codes(format, actual[0]) - codes(format, expected[0])).abs()
        assert int(apart.max()) <= 1 and int(apart.count_nonzero()) <= 1 + apart.numel() // 50


def modulation(kind: str, B: int, N: int, K: int, dtype: torch.dtype, offset: float) -> torch.Tensor | None:
    match kind:
        case "none":
            return None
        case "[K]":
            values = torch.randn(K)
        case "[B,1,K]":
            values = torch.randn(B, 1, K)
        case "chunk":  # one of six that a linear layer makes at once
            return (torch.randn(B, 6 * K) * 0.3 + offset).to(dtype)[:, 2 * K : 3 * K].unsqueeze(1)
        case "tokens":  # some of more tokens
            return (torch.randn(B, N + 2, K) * 0.3 + offset).to(dtype)[:, 1:-1]
        case _:
            values = torch.randn(B, N, K)
    return (values * 0.3 + offset).to(dtype)


def moved(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def wide(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


def single(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


@settings(max_examples=70, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from(FLOATS),
    N=st.integers(1, 3),
    blocks=st.integers(2, 12),
    odd=st.integers(0, 31),
    affine=st.sampled_from(["none", "weight", "both"]),
    multiplier=st.sampled_from(MODULATION),
    shift=st.sampled_from(MODULATION),
    half=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    offset=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_norm_quantize(
    device: str,
    format: str,
    norm: str,
    dtype: torch.dtype,
    N: int,
    blocks: int,
    odd: int,
    affine: str,
    multiplier: str,
    shift: str,
    half: bool,
    scale: float,
    offset: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    B, block = 2, FORMATS[format].block
    K = blocks * block if block else blocks * 32 - odd
    x = ((torch.randn(B, N, 2 * K if half else K) + offset) * scale).to(dtype)[..., :K]
    weight = (torch.randn(K) * 0.2 + 1) if affine != "none" else None
    bias = torch.randn(K).to(dtype) if affine == "both" else None
    times, plus = modulation(multiplier, B, N, K, dtype, 1.0), modulation(shift, B, N, K, dtype, 0.0)
    tensors = (weight, bias, times, plus)
    x_there = x if device == "cpu" else x.to(device)
    actual = norm_quantize_triton(x_there, norm, 1e-6, *(moved(t, device) for t in tensors), format)
    expected = norm_quantize_reference(x.float(), norm, 1e-6, *(single(t) for t in tensors), format)
    truth = modulated(normalized(x.double(), norm, 1e-6, wide(weight), wide(bias)), wide(times), wide(plus))
    assert_near(format, actual, expected, truth)


@settings(max_examples=70, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from(FLOATS),
    N=st.integers(1, 3),
    blocks=st.integers(2, 12),
    odd=st.integers(0, 31),
    gated=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_activation_quantize(
    device: str,
    format: str,
    activation: str,
    dtype: torch.dtype,
    N: int,
    blocks: int,
    odd: int,
    gated: bool,
    scale: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    block = FORMATS[format].block
    K = blocks * block if block else blocks * 32 - odd
    x = (torch.randn(2, N, K) * scale).to(dtype)
    multiplier = None
    if gated:  # two halves of one product, as a gated MLP makes them
        both = torch.cat([x, torch.randn(2, N, K).to(dtype)], dim=-1)
        x, multiplier = both[..., :K], both[..., K:]
    actual = activation_quantize_triton(x.to(device), activation, moved(multiplier, device), format)
    expected = activation_quantize_reference(x.float(), activation, single(multiplier), format)
    truth = activated(x.double(), activation)
    assert_near(format, actual, expected, truth if multiplier is None else truth * multiplier.double())


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4"])
def test_a_static_range(device: str, format: str) -> None:
    x, static = torch.randn(3, 64), torch.tensor(0.01)
    args = ("layer", 1e-5, None, None, None, None, format)
    actual = norm_quantize_triton(x.to(device), *args, static.to(device))
    expected = norm_quantize_reference(x, *args, static)
    apart = (codes(format, actual[0].cpu()) - codes(format, expected[0])).abs()
    assert int(apart.max()) <= 1 and int(apart.count_nonzero()) <= 2
    assert torch.equal(actual[-1].cpu(), expected[-1]) and bool((actual[-1] == static.to(device)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_far_from_zero_keeps_its_variance(device: str, norm: str) -> None:
    x = torch.randn(2, 256) + 1000
    q, scale = norm_quantize_triton(x.to(device), norm, 1e-6, None, None, None, None, "int8")
    truth = normalized(x.double(), norm, 1e-6, None, None)
    assert float((q.cpu() * scale.cpu().double() - truth).abs().max()) <= float(scale.max()) * 0.51


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row(device: str, format: str, bad: float) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = bad
    for parts in (
        norm_quantize_triton(x.to(device), "layer", 1e-6, None, None, None, None, format),
        norm_quantize_triton(x.to(device), "rms", 1e-6, None, None, None, None, format),
    ):
        values = FORMATS[format].dequantize([part.cpu() for part in parts])
        assert bool(values[1].isnan().any()) and bool(values[[0, 2]].isfinite().all())
        if FORMATS[format].block != 32 and math.isnan(bad):
            assert bool(values[1].isnan().all())


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_rows_of_equal_values_are_zero_behind_a_layer_norm(device: str, format: str) -> None:
    x = torch.tensor([0.0, 3.0, -1e4]).unsqueeze(1).expand(3, 64)
    shift = torch.linspace(-1, 1, 64)
    plain = norm_quantize_triton(x.to(device), "layer", 1e-6, None, None, None, None, format)
    assert torch.count_nonzero(FORMATS[format].dequantize([part.cpu() for part in plain])) == 0
    shifted = norm_quantize_triton(x.to(device), "layer", 1e-6, None, None, None, shift.to(device), format)
    alone = quantize_triton(shift.expand(3, 64).to(device), format)
    for ours, theirs in zip(shifted, alone, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_modulation_in_any_layout(device: str) -> None:
    x = torch.randn(2, 2, 3, 64)
    for shape in [(64,), (1, 1, 1, 64), (2, 1, 1, 64), (2, 2, 1, 64), (1, 2, 1, 64), (2, 1, 3, 64), (2, 2, 3, 1), ()]:
        multiplier = torch.randn(shape)
        actual = norm_quantize_triton(x.to(device), "rms", 1e-6, None, None, multiplier.to(device), None, "fp8")
        expected = norm_quantize_reference(x, "rms", 1e-6, None, None, multiplier, None, "fp8")
        assert_near("fp8", actual, expected, normalized(x.double(), "rms", 1e-6, None, None) * multiplier.double())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_their_ends(device: str, activation: str) -> None:
    x = torch.tensor([[-3e38, -1e20, -100.0, -30.0, -1e-30, 0.0, 1e-30, 30.0], [-6, -5, -4, -3, -2, -1, 1, 2]])
    x = x.repeat_interleave(4, dim=1)
    x[0, :8] = -50 if activation == "none" else x[0, :8]
    actual = activation_quantize_triton(x.to(device), activation, None, "mxfp8")
    truth = activated(x.double(), activation)
    values = FORMATS["mxfp8"].dequantize([part.cpu() for part in actual]).double()
    assert float((values - truth).abs().max()) <= float(truth.abs().max()) / 16


def test_ops_on_cuda_are_these_kernels(device: str) -> None:
    x, gate, static = torch.randn(2, 3, 64, device=device), torch.randn(2, 3, 64, device=device), torch.tensor(0.02)
    vectors = [torch.randn(64, device=device) for _ in range(4)]
    norm = (x, "layer", 1e-5, *vectors, "nvfp4", static.to(device))
    act = (x, "gelu", gate, "int8", static.to(device))
    bare = (x, "fp8", static.to(device))
    # without a GPU the dispatcher does not lead to them
    ops = (quantize_cuda, norm_quantize_cuda, activation_quantize_cuda)
    if device == "cuda":
        ops = (torch.ops.ditc.quantize, torch.ops.ditc.norm_quantize, torch.ops.ditc.activation_quantize)
    kernels = (quantize_triton, norm_quantize_triton, activation_quantize_triton)
    for op, kernel, args in zip(ops, kernels, (bare, norm, act), strict=True):
        for ours, theirs in zip(op(*args), kernel(*args), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
