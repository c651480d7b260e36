"""Attention in Triton: every recipe and feature against the op's meaning in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ditc.kernels.attention import RECIPES, Operands, attention_quantized_reference, quantize_operands
from ditc.kernels.attention.triton import attention_triton
from ditc.kernels.formats import format_of

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy on infinities

WAYS = [*((name, "") for name in RECIPES), ("int8_fp8", "decode"), ("fp8", "decode"), ("nvfp4", "native")]
"""A recipe, and how: FP8 decoded to float16 as before sm_89; NVFP4 by block-scaled products."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STEP = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""How much rounding to a type may change a result; the interpreter cuts bfloat16 off."""
FLIP = {"fp16": 2.0**-9, "fp8": 2.0**-4, "nvfp4": 0.3}
"""How much of the values' size a row may change by where a last bit of a score moves weights to the next code."""


@pytest.fixture(scope="module", autouse=True)
def e4m3_scales() -> Iterator[None]:
    """The interpreter takes E4M3 scales for exponents. Here it reads them as what they are."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        yield
        return
    before = getattr(interpreter, "_dot_scaled_scale_to_f32", None)
    if before is None:
        yield
        return

    def read(scale: Any, compute_type: Any) -> Any:
        if scale.dtype.name != "fp8e4nv":
            return before(scale, compute_type)
        return torch.from_numpy(scale.data.view(np.uint8).copy()).view(torch.float8_e4m3fn).float().numpy()

    interpreter._dot_scaled_scale_to_f32 = read
    yield
    interpreter._dot_scaled_scale_to_f32 = before


def options(way: str, device: str) -> dict[str, Any]:
    if device == "cuda":
        if way == "native" and torch.cuda.get_device_capability()[0] < 10:
            pytest.skip("no block-scaled tensor cores")
        if way == "" and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("no FP8")
    return {"native": True} if way == "native" else {"fp8": "decode"} if way == "decode" else {}


def operands(
    shape: tuple[int, int, int, int, int, int], kind: str, dtype: torch.dtype, seed: int, device: str
) -> list[Tensor]:
    """Queries, keys and values for ``B, H, G, Lq, Lk, D``."""
    B, H, G, Lq, Lk, D = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, L, D, generator=generator) for n, L in ((H, Lq), (G, Lk), (G, Lk)))
    k = k + 2 * torch.randn(D, generator=generator)
    if kind == "outliers":
        q[..., -1], k[..., D // 2], v[..., 0] = q[..., -1] * 20, k[..., D // 2] * 20, v[..., 0] * 20
    elif kind == "peaked":
        q = q * 6
    elif kind == "flat":
        q = q * 1e-3
    return [x.to(device, dtype) for x in (q, k, v)]


def visibility(
    shape: tuple[int, int, int, int, int, int], mask: str, sparse: bool, seed: int, device: str
) -> tuple[Tensor | None, Tensor | None]:
    """A mask of a kind, in which some rows see nothing, and a block map."""
    B, H, _, Lq, Lk, _ = shape
    generator = torch.Generator().manual_seed(seed)
    found = None
    if mask == "rows":
        found = torch.rand(B, 1, Lq, Lk, generator=generator) > 0.5
        found[:, :, :: max(2, Lq // 3)] = False
    elif mask == "keys":
        found = torch.rand(B, 1, 1, Lk, generator=generator) > 0.3
    elif mask == "added":
        found = torch.randn(H, Lq, Lk, generator=generator)
        found[:, :, Lk // 2 :] = -torch.inf
        found[:, 0] = -torch.inf
    elif mask == "added half":
        found = torch.randn(Lq, 1, generator=generator).bfloat16().expand(Lq, Lk)
    blocks = torch.rand(B, H, -(-Lq // 64), -(-Lk // 64), generator=generator) > 0.4 if sparse else None
    return None if found is None else found.to(device), None if blocks is None else blocks.to(device)


def assert_agrees(actual: Tensor, expected: Tensor, values: Tensor, recipe: str, device: str) -> None:
    """Row for row; few rows may differ more, by a code of their weights."""
    H = expected.shape[1]
    assert actual.shape == expected.shape and actual.transpose(1, 2).is_contiguous()
    size = values.float().abs().amax(-2, keepdim=True).repeat_interleave(H // values.shape[1], 1)
    error = ((actual.float() - expected.float()).abs() - STEP[actual.dtype] * expected.float().abs()) / size
    pv = RECIPES[recipe].pv
    rows = error.amax(-1)
    assert float(rows.max()) <= FLIP[pv]
    # tensor cores cut bits off where they add; Hopper's FP8 units keep 14
    tight = 1e-3 if pv == "fp16" else 3e-5 if device == "cpu" else 1e-2
    assert int((rows > tight).sum()) <= 1 + rows.numel() // 50, rows.topk(min(5, rows.numel())).values


SHAPES = st.tuples(
    st.integers(1, 2), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.one_of(st.integers(1, 20), st.integers(60, 140)), st.one_of(st.integers(1, 20), st.integers(60, 140)),
    st.sampled_from([1, 16, 40, 64, 72, 100]),
).map(lambda s: (s[0], *s[1], *s[2:]))  # fmt: skip


@pytest.mark.parametrize(("recipe", "way"), WAYS)
@settings(max_examples=16, deadline=None)
@given(
    shape=SHAPES, kind=st.sampled_from(["normal", "outliers", "peaked", "flat"]), dtype=st.sampled_from(FLOATS),
    mask=st.sampled_from(["none", "none", "rows", "keys", "added", "added half"]), causal=st.booleans(),
    sparse=st.booleans(), window=st.sampled_from([-1, -1, 0, 5, 70]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_everything_against_the_meaning(
    device: str, recipe: str, way: str, shape: tuple[int, int, int, int, int, int], kind: str, dtype: torch.dtype,
    mask: str, causal: bool, sparse: bool, window: int, seed: int,
) -> None:  # fmt: skip
    if window >= 0:
        shape = (*shape[:3], shape[4], *shape[4:])
    q, k, v = operands(shape, kind, dtype, seed, device)
    found, blocks = visibility(shape, mask, sparse, seed, device)
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    arguments = (parts.q, parts.k, parts.v, recipe, shape[-1] ** -0.5, dtype, parts.bias, found, causal, blocks, window)
    actual = attention_triton(*arguments, **options(way, device))
    assert actual.dtype == dtype
    assert_agrees(actual, attention_quantized_reference(*arguments), v, recipe, device)


@pytest.mark.parametrize(("recipe", "way"), WAYS)
def test_against_exact_attention(device: str, recipe: str, way: str) -> None:
    """In float64 on what was quantised, where only weights are rounded, and on what it was quantised from."""
    found = RECIPES[recipe]
    q, k, v = operands((1, 2, 1, 70, 200, 64), "normal", torch.float32, 3, device)
    parts = quantize_operands(q, k, v, found)
    arguments = (recipe, 0.125, torch.float32, parts.bias)
    y = attention_triton(parts.q, parts.k, parts.v, *arguments, **options(way, device)).double()
    same = F.scaled_dot_product_attention(*dequantized(parts, recipe), scale=0.125, enable_gqa=True)
    if not found.smooth_queries:
        assert float((y - same).norm() / same.norm()) < (5e-4 if found.pv == "fp16" else 0.03)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.125, enable_gqa=True)
    assert float((y - exact).abs().sum() / exact.abs().sum()) < found.tolerance.relative_l1
    assert float(F.cosine_similarity(y.flatten(), exact.flatten(), dim=0)) > found.tolerance.cosine
    assert abs(float((y * exact).sum() / exact.square().sum()) - 1) < found.tolerance.magnitude


def dequantized(parts: Operands, recipe: str) -> list[Tensor]:
    """Queries, keys and values in float64."""
    found = RECIPES[recipe]
    q, k = (format_of(found.qk).dequantize(x).double() for x in (parts.q, parts.k))
    if found.pv == "fp16":
        return [q, k, parts.v[0].double() * parts.v[1].mT]
    return [q, k, format_of(found.pv).dequantize(parts.v)[..., : k.shape[2]].mT.double()]


@pytest.mark.parametrize(("recipe", "way"), WAYS)
@pytest.mark.parametrize("scale", [0.01, 0.125, 2.0])
def test_values_that_are_all_one_give_one(device: str, recipe: str, way: str, scale: float) -> None:
    q, k, v = operands((1, 2, 2, 90, 130, 40), "normal", torch.float32, 4, device)
    parts = quantize_operands(q, k, torch.ones_like(v), RECIPES[recipe])
    y = attention_triton(parts.q, parts.k, parts.v, recipe, scale, torch.float32, parts.bias, **options(way, device))
    torch.testing.assert_close(y, torch.ones_like(y), rtol=3e-6 if device == "cpu" else 1e-3, atol=0)


@pytest.mark.parametrize(("recipe", "way"), WAYS)
def test_what_is_no_number_goes_where_the_reference_has_it(device: str, recipe: str, way: str) -> None:
    q, k, v = operands((2, 1, 1, 66, 80, 32), "normal", torch.float32, 5, device)
    q[0, 0, 3, 7], v[0, 0, 70, 9] = torch.nan, torch.inf
    mask = torch.zeros(80, device=device)
    mask[5] = torch.nan
    mask = torch.stack([torch.zeros_like(mask), mask])[:, None, None]
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    arguments = (parts.q, parts.k, parts.v, recipe, 0.2, torch.float32, parts.bias, mask)
    actual, expected = attention_triton(*arguments, **options(way, device)), attention_quantized_reference(*arguments)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert bool(expected[0, 0, 3].isnan().all() and expected[0, 0, :, 9].isnan().all() and expected[1].isnan().all())
    assert int(expected[0].isnan().sum()) == 32 + 65


@pytest.mark.parametrize(("recipe", "way"), WAYS)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30])
@pytest.mark.parametrize("mask", ["rows", "added"])
def test_scales_that_nobody_uses(device: str, recipe: str, way: str, scale: float, mask: str) -> None:
    shape = (1, 2, 2, 5, 70, 16)
    q, k, v = operands(shape, "normal", torch.float32, 10, device)
    q[0, 0, 1] = 0
    found, _ = visibility(shape, mask, False, 10, device)
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    arguments = (parts.q, parts.k, parts.v, recipe, scale, torch.float32, parts.bias, found)
    actual = attention_triton(*arguments, **options(way, device))
    assert_agrees(actual, attention_quantized_reference(*arguments), v, recipe, device)


@pytest.mark.parametrize(("recipe", "way"), WAYS)
def test_rows_that_see_nothing_are_zero(device: str, recipe: str, way: str) -> None:
    q, k, v = operands((1, 1, 1, 130, 130, 32), "normal", torch.float32, 6, device)
    blocks = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.bool, device=device)[None, None]
    mask = torch.ones(130, 130, dtype=torch.bool, device=device)
    mask[7] = False
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    arguments = (parts.q, parts.k, parts.v, recipe, 0.2, torch.float32, parts.bias)
    y = attention_triton(*arguments, mask, False, blocks, **options(way, device))
    empty = torch.zeros(130, dtype=torch.bool, device=device)
    empty[64:128], empty[7] = True, True
    assert torch.equal((y[0, 0] == 0).all(-1), empty) and bool(y.isfinite().all())
    nothing = torch.zeros(1, 1, 1, 130, dtype=torch.bool, device=device)
    assert not attention_triton(*arguments, nothing, **options(way, device)).any()


def test_skipped_tiles_are_not_read(device: str) -> None:
    """Their values are NaN, which a weight of zero would not hide."""
    q, k, v = operands((1, 1, 1, 200, 200, 32), "normal", torch.float32, 7, device)
    parts = quantize_operands(q, k, v, RECIPES["int8_fp16"])
    arguments = (parts.q, parts.k, parts.v, "int8_fp16", 0.2, torch.float32)
    clean = attention_triton(*arguments, causal=True)
    parts.v[0][:, :, 192:] = torch.nan
    blocks = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device)
    blocks[:, :, :2, 3] = False
    for skips in ({"causal": True}, {"blocks": blocks}, {"window": 3}):
        y = attention_triton(*arguments, **skips)  # type: ignore[arg-type]
        assert bool(y[:, :, :128].isfinite().all()) and bool(y[:, :, 128:].isnan().all())
        assert "causal" not in skips or torch.equal(y[:, :, :128], clean[:, :, :128])


@pytest.mark.parametrize("D", [128, 200, 256])
@pytest.mark.parametrize("recipe", RECIPES)
def test_large_heads(device: str, recipe: str, D: int) -> None:
    q, k, v = operands((1, 1, 1, 65, 70, D), "normal", torch.bfloat16, D, device)
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    arguments = (parts.q, parts.k, parts.v, recipe, D**-0.5, torch.float32, parts.bias)
    assert_agrees(attention_triton(*arguments), attention_quantized_reference(*arguments), v, recipe, device)


def test_values_are_read_where_they_lie(device: str) -> None:
    q, k, v = operands((2, 4, 2, 20, 70, 40), "normal", torch.float32, 8, device)
    parts = quantize_operands(q, k, v, RECIPES["int8_fp16"])
    arguments = ("int8_fp16", 0.2, torch.float32)
    expected = attention_triton(parts.q, parts.k, parts.v, *arguments)
    tokens_first = parts.v[0].transpose(1, 2).contiguous().transpose(1, 2)
    features_apart = parts.v[0].mT.contiguous().mT
    for values in (tokens_first, features_apart):
        y = attention_triton(parts.q, parts.k, [values, parts.v[1]], *arguments)
        assert torch.equal(y, expected)
    codes = [torch.stack([part] * 2, -1)[..., 0] for part in parts.q]
    assert torch.equal(attention_triton(codes, parts.k, parts.v, *arguments), expected)


def test_addresses_beyond_32_bits(device: str, tmp_path: Path) -> None:
    """Values and a mask whose rows lie 2**29 elements apart, in files that are mostly holes."""
    if device != "cpu":
        pytest.skip("files, not device memory")
    q, k, v = operands((1, 1, 1, 6, 5, 16), "normal", torch.float32, 9, device)
    parts = quantize_operands(q, k, v, RECIPES["int8_fp16"])
    mask = torch.randn(6, 5)
    arguments = ("int8_fp16", 0.2, torch.float32, None)
    expected = attention_triton(parts.q, parts.k, parts.v, *arguments, mask)
    stride = 2**29
    far = []
    for name, dtype, tensor in (("values", np.float16, parts.v[0][0, 0]), ("mask", np.float32, mask)):
        rows, columns = tensor.shape
        memory = np.memmap(tmp_path / name, dtype=dtype, mode="w+", shape=(rows * stride,))
        far.append(torch.from_numpy(memory).as_strided((rows, columns), (stride, 1)).copy_(tensor))
    y = attention_triton(parts.q, parts.k, [far[0][None, None], parts.v[1]], *arguments, far[1])
    assert torch.equal(y, expected)


def test_no_queries(device: str) -> None:
    q, k, v = operands((2, 3, 3, 0, 5, 16), "normal", torch.float32, 0, device)
    parts = quantize_operands(q, k, v, RECIPES["int8_fp8"])
    assert attention_triton(parts.q, parts.k, parts.v, "int8_fp8", 1.0, torch.bfloat16).shape == (2, 3, 0, 16)


def test_wrong_operands_are_refused(device: str) -> None:
    q, k, v = operands((1, 2, 2, 4, 5, 16), "normal", torch.float32, 0, device)
    parts = quantize_operands(q, k, v, RECIPES["int8_fp8"])
    with pytest.raises(TypeError, match="float64"):
        attention_triton(parts.q, parts.k, parts.v, "int8_fp8", 1.0, torch.float64)
    with pytest.raises(ValueError, match="values"):
        attention_triton(parts.q, parts.k, [part[:, :1] for part in parts.v], "int8_fp8", 1.0, torch.float32)
    with pytest.raises(ValueError, match="window"):
        attention_triton(parts.q, parts.k, parts.v, "int8_fp8", 1.0, torch.float32, window=3)
