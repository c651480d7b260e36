"""The smoothing kernels compiled for Hopper and Blackwell: what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

from ditc.kernels.smooth.triton import PARTS, block_of, tile_for
from ditc.kernels.smooth.triton_kernel import smooth_keys_kernel, smooth_queries_kernel, sum_keys_kernel

pytestmark = pytest.mark.ptx
KERNELS = {"queries": smooth_queries_kernel, "sums of keys": sum_keys_kernel, "keys": smooth_keys_kernel}
STRIDES = ("x_batch", "x_head", "x_row", "y_batch", "y_head", "y_row", "table_batch", "table_head")


def arguments(name: str, D: int, norm: str, pieces: int) -> dict[str, Any]:
    """What the launcher passes for bfloat16 projections, weights of norms and tables, as types."""
    kernel = KERNELS[name]
    types = dict.fromkeys(kernel.arg_names, "i32")
    types |= dict.fromkeys(("x", "y", "x_weight", "y_weight", "x_bias", "y_bias"), "*bf16")
    types |= dict.fromkeys(("first", "second", "outer", "means", "sums", "bias"), "*fp32")
    types |= {"codes": "*u8", "blocks": "*u8", "eps": "fp32"}
    tile = tile_for(D, products=name == "keys")
    constants: dict[str, Any] = {"NORM": norm, "DISTANCE": 1, "D": D, "BLOCK_D": block_of(D), "ROWS": tile["ROWS"]}
    constants |= {"col": 1, "GROUP": 1, "PARTS": PARTS}
    if pieces == 1:
        constants |= {"y": None, "y_weight": None, "y_bias": None, "y_batch": 0, "y_head": 0, "y_row": 0}
    if norm == "rms":
        constants |= {"x_bias": None, "y_bias": None}
    return {
        "kernel": kernel,
        "signature": {n: kind for n, kind in types.items() if n in kernel.arg_names},
        "constexprs": {n: value for n, value in constants.items() if n in kernel.arg_names},
        "num_warps": tile["num_warps"],
        "divisible": tuple(n for n in STRIDES if n not in constants),
        "fp_fusion": False,
    }


LABELLED = {
    90: [("queries", 64, "rms", 1), ("keys", 64, "rms", 1), *((n, 256, "rms", 2) for n in ("queries", "keys"))],
    100: [],
    120: [],
}


@pytest.mark.parametrize("arch", LABELLED)
def test_golden_numbers(
    compile_kernel: Callable[..., Any], golden_numbers: Callable[[str, Mapping[str, Any]], None], arch: int
) -> None:
    labels = [*((name, 128, "rms", 2) for name in KERNELS), *LABELLED[arch]]
    kernels = {
        f"{name}, {norm} norm, head of {D}, {pieces} piece{'s' * (pieces > 1)}": compile_kernel(
            arch=arch, **arguments(name, D, norm, pieces)
        )
        for name, D, norm, pieces in labels
    }
    for label, kernel in kernels.items():
        assert kernel.spills == 0 and kernel.shared <= 99 * 1024, label
        assert "ld.global.v4.b32" in kernel.ptx, label
        # queries' means meet keys on the tensor cores
        assert ("tf32" in kernel.ptx) == label.startswith("keys"), label
    golden_numbers(f"smooth-sm_{arch}", kernels)
