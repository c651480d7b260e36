"""The GEMMs compiled for GPUs that are not here: the instructions they use, and what they take of a multiprocessor."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import triton
import triton.language as tl

from ditc.kernels.linear.triton import block_scaled_kernel, epilogue_kernel, row_scaled_kernel
from ditc.kernels.linear.triton_tiles import tile_for
from ditc.kernels.linear.triton_weight import weight_kernel

pytestmark = pytest.mark.ptx

FEW, SOME, MANY = 16, 64, 4096
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may take."""
CODES = {"int8": "*i8", "fp8": "*fp8e4nv", "mxfp8": "*fp8e4nv", "mxfp4": "*u8", "nvfp4": "*u8"}
INTEGERS = (
    "M", "N", "K", "x_stride", "w_stride", "x_scale_stride", "w_scale_stride", "gate_rows", "gate_stride",
    "residual_stride",
)  # fmt: skip
SIGNATURE = {
    **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(("x_scale", "w_scale"), "*u8"),
    **dict.fromkeys(("row_scale", "column_scale"), "*fp32"),
    **dict.fromkeys(("bias", "gate", "residual", "out"), "*bf16"),
}
DIVISIBLE = tuple(name for name in INTEGERS if name not in ("M", "gate_rows"))
"""As in a model: rows of any number, whose lengths are multiples of 16."""
BEFORE_3_8 = tuple(int(v) for v in triton.__version__.split(".")[:2]) < (3, 8)
"""No native NVFP4 then, and int8 on sm_100 goes by the instruction of older GPUs."""

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build(compile_kernel: Build) -> Build:
    """``build(kind, format, rows, arch, x="*bf16", masked=False)``: the kernel as its launcher would compile it."""
    known: dict[tuple[Any, ...], Any] = {}

    def compiled(kind: str, format: str, rows: int, arch: int, x: str = "*bf16", masked: bool = False) -> Any:
        key = (kind, format, rows, arch, x, masked)
        if key not in known:
            known[key] = _compile(compile_kernel, *key)
        return known[key]

    return compiled


def _compile(compile_kernel: Build, kind: str, format: str, rows: int, arch: int, x: str, masked: bool) -> Any:
    tile_kind = format if kind == "rows" else "weight32" if kind == "weight" and x == "*fp32" else kind
    tile = tile_for(tile_kind, rows, (arch // 10, arch % 10))  # type: ignore[arg-type]
    constants: dict[str, Any] = tile.constants(tile.K + 16 * masked)
    mx = format.startswith("mx")
    types = SIGNATURE | {"x": CODES[format], "w": CODES[format]}
    if mx:
        constants |= {"column_scale": None}
    if kind == "weight":
        kernel, types = weight_kernel, types | {"x": x, "out": x}
        wide = x == "*fp32" or (mx and x == "*fp16")
        dtype = tl.float32 if wide else tl.float16 if x == "*fp16" else tl.bfloat16
        constants |= {"FORMAT": format, "DTYPE": dtype, "PRECISION": "tf32x3" if x == "*fp32" else "tf32"}
        constants |= {"w_scale": None} if format in ("int8", "fp8") else {}
    elif kind == "rows":
        kernel = row_scaled_kernel
    else:
        kernel = block_scaled_kernel
        dtype = tl.float16 if format == "nvfp4" else tl.bfloat16
        constants |= {"FORMAT": format, "NATIVE": kind == "native", "DTYPE": dtype}
        constants |= {"row_scale": None} if mx else {}
    return compile_kernel(kernel, types, constants, arch, tile.warps, tile.stages, DIVISIBLE)


WGMMA, MMA, TCGEN05 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+", r"mma\.sync\.aligned\.m16n8", r"tcgen05\.mma\.\S*"
BLOCK_MMA = MMA + r"k\d+\.row\.col\.kind::"
INSTRUCTIONS = [
    # Hopper: int8 and fp8 as they are, block formats as floats
    ("rows", "int8", 90, WGMMA + r"k32\.s32\.s8\.s8"),
    ("rows", "fp8", 90, WGMMA + r"k32\.f32\.e4m3\.e4m3"),
    ("blocks", "mxfp8", 90, WGMMA + r"k16\.f32\.bf16\.bf16"),
    ("blocks", "mxfp4", 90, WGMMA + r"k16\.f32\.bf16\.bf16"),
    ("blocks", "nvfp4", 90, WGMMA + r"k16\.f32\.f16\.f16"),
    # Blackwell, data centre
    ("rows", "int8", 100, MMA + r"k32\.row\.col\.satfinite\.s32" if BEFORE_3_8 else TCGEN05 + r"kind::i8"),
    ("rows", "fp8", 100, TCGEN05 + r"kind::f8f6f4"),
    ("native", "mxfp8", 100, TCGEN05 + r"kind::mxf8f6f4\.block_scale"),
    ("native", "mxfp4", 100, TCGEN05 + r"kind::mxf4\.block_scale"),
    ("native", "nvfp4", 100, TCGEN05 + r"kind::mxf4nvf4\.block_scale\.block16"),
    ("blocks", "nvfp4", 100, TCGEN05 + r"kind::f16"),
    # Blackwell, workstation
    ("rows", "int8", 120, MMA + r"k32\.row\.col\.satfinite\.s32\.s8\.s8"),
    ("rows", "fp8", 120, MMA + r"k32\.row\.col\.f32\.e4m3\.e4m3"),
    ("native", "mxfp8", 120, BLOCK_MMA + r"mxf8f6f4\.block_scale\.scale_vec::1X\.f32\.e4m3\.e4m3\.f32\.ue8m0"),
    ("native", "mxfp4", 120, BLOCK_MMA + r"mxf4nvf4\.block_scale\.scale_vec::2X\.f32\.e2m1\.e2m1\.f32\.ue8m0"),
    ("native", "nvfp4", 120, BLOCK_MMA + r"mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1\.f32\.ue4m3"),
    # before Hopper
    ("rows", "int8", 80, MMA + r"k32\.row\.col\.satfinite\.s32\.s8\.s8"),
    ("rows", "fp8", 89, MMA + r"k32\.row\.col\.f32\.e4m3\.e4m3"),
    ("blocks", "nvfp4", 80, MMA + r"k16\.row\.col\.f32\.f16\.f16"),
]


def skip_native(kind: str, format: str) -> None:
    if kind == "native" and format == "nvfp4" and BEFORE_3_8:
        pytest.skip("native NVFP4 needs Triton 3.8")


@pytest.mark.parametrize(("kind", "format", "arch", "instruction"), INSTRUCTIONS)
def test_many_rows_use_the_tensor_cores_of_their_type(
    build: Build, kind: str, format: str, arch: int, instruction: str
) -> None:
    skip_native(kind, format)
    kernel = build(kind, format, MANY, arch)
    used = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", kernel.ptx))
    assert used and all(re.match(instruction, name) for name in used), used
    assert kernel.shared <= SHARED[arch] * 1024 and kernel.spills == 0


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize(
    ("x", "instruction"),
    [("*bf16", r"f32\.bf16\.bf16"), ("*fp16", r"f32\.f16\.f16"), ("*fp32", r"f32\.tf32\.tf32")],
)
def test_a_weight_alone_is_multiplied_in_the_type_of_x(build: Build, format: str, x: str, instruction: str) -> None:
    if x == "*fp16" and format.startswith("mx"):
        instruction = r"f32\.tf32\.tf32"
    many, few = (build("weight", format, rows, 90, x=x) for rows in (MANY, FEW))
    assert re.search(WGMMA + r"k\d+\." + instruction, many.ptx)
    assert re.search(MMA + r"k\d+\.row\.col\." + instruction, few.ptx)
    assert max(many.shared, few.shared) <= SHARED[90] * 1024


def test_tiles_are_fetched_ahead(build: Build) -> None:
    for kind, format in (("rows", "fp8"), ("blocks", "nvfp4"), ("weight", "nvfp4")):
        assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", build(kind, format, MANY, 90).ptx)


def test_hopper_leaves_its_short_fp8_accumulator_after_each_tile(build: Build) -> None:
    ptx = build("rows", "fp8", MANY, 90).ptx
    loop = ptx[ptx.index("wgmma.mma_async") :]
    assert len(re.findall(r"add\.(?:rn\.)?f32", loop)) >= 64  # an accumulator's values in a thread


LABELLED = {
    90: [
        *((k, f, r) for k, f in (("rows", "int8"), ("rows", "fp8")) for r in (FEW, SOME, MANY)),
        *(("blocks", f, r) for f in ("mxfp8", "mxfp4", "nvfp4") for r in (FEW, SOME, MANY)),
        *(("weight", f, r) for f in CODES for r in (FEW, MANY)),
    ],
    100: [
        *(("rows", f, MANY) for f in ("int8", "fp8")),
        *(("native", f, r) for f in ("mxfp8", "mxfp4", "nvfp4") for r in (FEW, MANY)),
    ],
    120: [
        *(("rows", f, MANY) for f in ("int8", "fp8")),
        *(("native", f, r) for f in ("mxfp8", "mxfp4", "nvfp4") for r in (FEW, MANY)),
    ],
}


@pytest.mark.parametrize("arch", LABELLED)
def test_golden_numbers(build: Build, golden_numbers: Callable[..., None], arch: int) -> None:
    kernels = {}
    for kind, format, rows in LABELLED[arch]:
        if not (kind == "native" and format == "nvfp4" and BEFORE_3_8):
            kernels[f"{kind} {format}, {rows} rows"] = build(kind, format, rows, arch)
    golden_numbers(f"linear-sm_{arch}", kernels)
    assert all(kernel.spills <= 16 and kernel.shared <= SHARED[arch] * 1024 for kernel in kernels.values())


@pytest.mark.parametrize(
    ("kind", "format", "arch"),
    [("rows", "fp8", 90), ("blocks", "nvfp4", 90), ("weight", "mxfp8", 90), ("native", "nvfp4", 100)],
)
def test_sums_that_end_inside_a_tile(build: Build, kind: str, format: str, arch: int) -> None:
    skip_native(kind, format)
    assert build(kind, format, MANY, arch, masked=True).spills == 0


def test_epilogue(compile_kernel: Build) -> None:
    types = SIGNATURE | {"y": "*i32"}
    kernel = compile_kernel(epilogue_kernel, types, {"BLOCK_M": 16, "BLOCK_N": 128}, 90, divisible=DIVISIBLE)
    assert kernel.spills <= 8 and re.search(r"ld\.global\.v4\.b32", kernel.ptx)
