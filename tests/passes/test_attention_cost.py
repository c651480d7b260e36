"""The cost of attention: rooflines, measured points, and what a table refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditc.kernels.attention import RECIPES
from ditc.passes.attention.cost import TYPICAL_SQNR, Size, estimate, roofline
from ditc.passes.quantize.cost import CostError, load_table, table_for
from ditc.passes.quantize.tables import CPU_INT8, NATIVE, DeviceKind

FP32, BF16 = torch.float32, torch.bfloat16
CPU = DeviceKind("cpu", "a test's own")
H100 = DeviceKind("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
B200 = DeviceKind("cuda", "NVIDIA B200", (10, 0))
VIDEO = Size(1, 24, 24, 16384, 16384, 128)


def made_table(**attention: Any) -> dict[str, Any]:
    return {
        "schema_number": 1,
        "device": "cpu",
        "name": "own",
        "capability": None,
        "source": {"kind": "measured", "text": "by hand", "hardware": "none", "date": "2026-01-01"},
        "launch": 1e-5,
        "quantize": {},
        "bandwidth": 1e10,
        "rates": {"float32": 1e11, "bfloat16": 3e11, "int8": 4e11},
        "attention": attention,
    }


def point(recipe: str = "native", seconds: float = 1.0, L: int = 256, dtype: str = "float32") -> dict[str, Any]:
    return {"recipe": recipe, "dtype": dtype, "B": 1, "H": 4, "Lq": L, "Lk": L, "D": 64, "seconds": seconds}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def made(**attention: Any) -> Path:
        path = tmp_path / "table.json"
        path.write_text(json.dumps(made_table(**attention)))
        return path

    return made


def test_an_estimate_is_exact_at_a_point_and_keeps_its_slope(write: Callable[..., Path]) -> None:
    table = load_table(write(points=[point(seconds=0.01), point("int8", 0.004)]))
    size = Size(1, 4, 4, 256, 256, 64)
    found = estimate(size, CPU, CPU_INT8, FP32, table=table)
    assert found.seconds == pytest.approx(0.004) and found.plain_seconds == pytest.approx(0.01)
    assert found.gain == pytest.approx(2.5)
    larger = replace(size, Lq=1024, Lk=1024)
    slope = roofline(table, larger, NATIVE, "float32", 1.0) / roofline(table, size, NATIVE, "float32", 1.0)
    assert estimate(larger, CPU, NATIVE, FP32, table=table).seconds == pytest.approx(0.01 * slope)
    # heads and batch are one number to a kernel
    assert estimate(replace(size, B=4, H=1, G=1), CPU, NATIVE, FP32, table=table).seconds == pytest.approx(0.01)


def test_between_points_an_estimate_lies_between_them(write: Callable[..., Path]) -> None:
    table = load_table(write(points=[point(seconds=0.002, L=128), point(seconds=0.2, L=512)]))
    size = Size(1, 4, 4, 256, 256, 64)
    assert 0.002 < estimate(size, CPU, NATIVE, FP32, table=table).seconds < 0.2


def test_points_of_another_dtype_correct_recipes_and_not_native_attention(write: Callable[..., Path]) -> None:
    table = load_table(write(points=[point(seconds=0.01), point("int8", 0.5)]))
    plain = load_table(write())
    size = Size(1, 4, 4, 256, 256, 64)
    half, modelled = (estimate(size, CPU, CPU_INT8, BF16, table=t) for t in (table, plain))
    assert half.plain_seconds == modelled.plain_seconds and half.seconds > 2 * modelled.seconds


@given(
    size=st.builds(
        Size,
        st.integers(1, 4), st.sampled_from([8, 24]), st.sampled_from([1, 8]), st.integers(1, 40000),
        st.integers(1, 40000), st.sampled_from([40, 64, 128, 256]),
    ),
    recipe=st.sampled_from([*RECIPES, NATIVE]),
    kind=st.sampled_from([H100, B200]),
)  # fmt: skip
def test_more_work_takes_longer(size: Size, recipe: str, kind: DeviceKind) -> None:
    found = estimate(size, kind, recipe, BF16)
    assert found.seconds > 0 and (recipe != NATIVE or found.gain == 1)
    for more in (replace(size, Lq=2 * size.Lq), replace(size, Lk=2 * size.Lk), replace(size, D=2 * size.D)):
        assert estimate(more, kind, recipe, BF16).seconds >= found.seconds
    assert estimate(size, kind, recipe, BF16, seen=0.5).seconds <= found.seconds


def test_few_bits_pay_on_long_sequences_alone() -> None:
    short, long = replace(VIDEO, Lq=256, Lk=256), VIDEO
    assert estimate(short, H100, "fp8", BF16).gain < 1 < estimate(long, H100, "fp8", BF16).gain
    # exponentials bound narrow heads: halving the products' time gains little
    narrow = replace(VIDEO, D=64)
    assert estimate(narrow, H100, "fp8", BF16).gain < estimate(long, H100, "fp8", BF16).gain
    assert estimate(long, H100, "nvfp4", BF16).gain < 1, "decoded tile by tile: memory, not time"
    assert "no arithmetic in nvfp4 here" in estimate(long, H100, "nvfp4", BF16).source
    assert estimate(long, B200, "nvfp4", BF16).gain >= estimate(long, B200, "fp8", BF16).gain


def test_a_window_saves_what_it_hides() -> None:
    whole, part = (estimate(VIDEO, H100, "fp8", BF16, kept=kept) for kept in (1.0, 0.1))
    assert part.gain > 2 * whole.gain and part.plain_seconds == whole.plain_seconds


def test_every_recipe_has_a_typical_error() -> None:
    assert set(TYPICAL_SQNR) == {NATIVE, CPU_INT8, *RECIPES}
    assert TYPICAL_SQNR["nvfp4"] < TYPICAL_SQNR["fp8"] < TYPICAL_SQNR["int8_fp16"] < TYPICAL_SQNR[NATIVE]


@pytest.mark.parametrize("kind", [H100, B200])
def test_shipped_tables_of_gpus_know_their_exponentials(kind: DeviceKind) -> None:
    assert (table_for(kind).attention.exponentials or 0) > 1e12


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"surprise": 1}, "surprise: Extra"),
        ({"exponentials": 0.0}, "exponentials"),
        ({"points": [point("int9")]}, "no attention recipe 'int9'"),
        ({"points": [point(seconds=-1.0)]}, "seconds"),
        ({"points": [point(L=0)]}, "Lq"),
        ({"points": [point(dtype="float16")]}, "points of float16, which has no rate"),
        ({"points": [point() | {"G": 4}]}, "Extra"),
    ],
)
def test_what_is_no_section_is_refused(attention: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(CostError, match=message):
        load_table(write(**attention))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((replace(VIDEO, Lk=0), H100, "fp8", BF16), "nothing to estimate"),
        ((VIDEO, H100, "fp9", BF16), "no attention recipe 'fp9'"),
        ((VIDEO, H100, "fp8", torch.float64), "the cost of float64 attention is not known"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(*arguments)


def test_no_table_is_an_error_of_its_own() -> None:
    with pytest.raises(CostError, match="no cost table for 'NVIDIA A100"):
        estimate(VIDEO, DeviceKind("cuda", "NVIDIA A100", (8, 0)), "fp8", BF16)
