"""The Triton quantiser compiled for Hopper and Blackwell: all formats and producers, and what came out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

from ditc.kernels.formats import FORMATS
from ditc.kernels.quantize.op import ACTIVATIONS, NORMS
from ditc.kernels.quantize.triton import MAX_K, block_and_warps
from ditc.kernels.quantize.triton_kernel import quantize_kernel

pytestmark = pytest.mark.ptx
ARCHITECTURES = (90, 100, 120)
RECORDED = ("none", "layer", "gelu_tanh")
"""Producers whose registers are recorded, at both widths."""


def arguments(format: str, producer: str, K: int) -> dict[str, Any]:
    """What the launcher passes for contiguous bfloat16 rows with broadcast modulation or a gate, as types."""
    signature = {
        "x_ptr": "*bf16",
        "q_ptr": "*i8" if format == "int8" else "*u8",
        "scale_ptr": "*fp32" if FORMATS[format].block is None else "*u8",
        "outer_ptr": "*fp32",
        "K": "i32",
        "eps": "fp32",
    }
    absent = {"static_ptr", "weight_ptr", "bias_ptr"}
    if format != "nvfp4":
        absent.add("outer_ptr")
    if producer == "none":
        absent |= {"multiplier_ptr", "shift_ptr"}
    elif producer not in NORMS:
        absent.add("shift_ptr")
    for name in ("x", "multiplier", "shift"):
        signature[f"{name}_ptr"] = "*bf16"
        signature |= {f"{name}_{stride}": "i32" for stride in ("inner", "outer", "row")}
    block, warps = block_and_warps(K, format, producer)
    constexprs = {"FORMAT": format, "PRODUCER": producer, "BLOCK_K": block} | dict.fromkeys(absent)
    constexprs |= {f"{name}_col": 1 for name in ("x", "multiplier", "shift")}
    divisible = ("K", *(f"{name}_{stride}" for name in ("x", "multiplier", "shift") for stride in ("outer", "row")))
    return {
        "signature": signature,
        "constexprs": constexprs,
        "num_warps": warps,
        "divisible": divisible,
        "fp_fusion": False,
    }


@pytest.fixture(scope="module")
def compiled(compile_kernel: Callable[..., Any]) -> Callable[[str, str, int, int], Any]:
    """``compiled(format, producer, K, arch)``, each once."""

    @functools.cache
    def compile_once(format: str, producer: str, K: int, arch: int) -> Any:
        return compile_kernel(quantize_kernel, arch=arch, **arguments(format, producer, K))

    return compile_once


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_producers_compile_without_spills(compiled: Callable[..., Any], arch: int, format: str) -> None:
    for producer in (*NORMS, *ACTIVATIONS):
        kernel = compiled(format, producer, 3072, arch)
        assert kernel.spills == 0, producer
        # eight bfloat16 values a load; codes leave by the widest stores that they fill
        assert "ld.global.v4.b32" in kernel.ptx, producer
        assert f"st.global.v{2 if format.endswith('4') else 4}.b32" in kernel.ptx, producer
        threads = 32 * block_and_warps(3072, format, producer)[1]
        assert 4 * kernel.registers * threads <= 65536, f"{producer}: fewer than four rows on a multiprocessor"


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_arithmetic_is_what_the_interpreter_does(compiled: Callable[..., Any], arch: int, format: str) -> None:
    # rounded after every operation, subnormals kept, no approximate division: what makes the parts bit-equal
    ptx = compiled(format, "none", 3072, arch).ptx
    for inexact in ("fma.", ".ftz", ".approx", "div.full", "rcp."):
        assert inexact not in ptx
    assert ("div.rn.f32" in ptx) == (not format.startswith("mx"))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_the_longest_row_fits(compiled: Callable[..., Any], format: str) -> None:
    assert compiled(format, "layer", 16384, 90).spills == 0
    # 32 values and 64 registers a thread are tight
    assert compiled(format, "layer", MAX_K, 90).spills <= 64


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers(
    compiled: Callable[..., Any], golden_numbers: Callable[[str, Mapping[str, Any]], None], arch: int
) -> None:
    labels = [(format, producer, K) for format in FORMATS for producer in RECORDED for K in (3072, 5120)]
    kernels = {f"{format} {producer} K={K}": compiled(format, producer, K, arch) for format, producer, K in labels}
    assert all(kernel.spills == 0 for kernel in kernels.values())
    golden_numbers(f"quantize-sm_{arch}", kernels)
