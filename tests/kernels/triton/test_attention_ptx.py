"""The attention compiled for GPUs that are not here: its instructions, and what it takes of a multiprocessor."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'ditc[triton]'")

import triton

from ditc.kernels.attention import RECIPES
from ditc.kernels.attention.triton_kernel import attention_kernel
from ditc.kernels.attention.triton_tiles import FEW, block_of, tile_for
from ditc.kernels.hardware import NVFP4_TRITON

pytestmark = pytest.mark.ptx

MANY = 4096
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a program may take."""
CODES = {"int8": "*i8", "fp8": "*fp8e4nv", "nvfp4": "*u8", "fp16": "*fp16"}
INTEGERS = ("H", "Lq", "Lk", "v_batch", "v_head", "v_stride", "mask_b", "mask_h", "mask_q", "mask_k", "window")
SIGNATURE = {
    **dict.fromkeys(INTEGERS, "i32"),
    **dict.fromkeys(("q_blocks", "k_blocks", "v_blocks", "blocks"), "*u8"),
    **dict.fromkeys(("q_scale", "k_scale", "v_scale", "bias"), "*fp32"),
    "out": "*bf16",
    "scale": "fp32",
}
BEFORE_3_8 = tuple(int(v) for v in triton.__version__.split(".")[:2]) < NVFP4_TRITON

Build = Callable[..., Any]


@pytest.fixture(scope="module")
def build(compile_kernel: Build) -> Build:
    """``build(recipe, arch, features=64, queries=4096, mode="", mask=None, ...)``: as its launcher would compile it."""
    known: dict[tuple[Any, ...], Any] = {}

    def compiled(
        recipe: str, arch: int, features: int = 64, queries: int = MANY, mode: str = "", mask: str | None = None,
        mask_rows: bool = False, sparse: bool = False, causal: bool = False, banded: bool = False,
        ragged: bool = False,
    ) -> Any:  # fmt: skip
        key = (recipe, arch, features, queries, mode, mask, mask_rows, sparse, causal, banded, ragged)
        if key not in known:
            if mode == "native" and BEFORE_3_8:
                pytest.skip("native NVFP4 needs Triton 3.8")
            known[key] = _compile(compile_kernel, *key)
        return known[key]

    return compiled


def _compile(
    compile_kernel: Build, recipe: str, arch: int, features: int, queries: int, mode: str, mask: str | None,
    mask_rows: bool, sparse: bool, causal: bool, banded: bool, ragged: bool,
) -> Any:  # fmt: skip
    found = RECIPES[recipe]
    D = -(-features // 16) * 16 if found.qk == "nvfp4" else features
    tile = tile_for(found.qk, mode == "native", D, queries, (arch // 10, arch % 10))
    types = SIGNATURE | {"q": CODES[found.qk], "k": CODES[found.qk], "v": CODES[found.pv]}
    if mode == "decode":
        types = {name: "*u8" if kind == "*fp8e4nv" else kind for name, kind in types.items()}
    native = mode == "native"
    constants: dict[str, Any] = {
        "GROUP": 1, "QK": found.qk, "PV": found.pv, "NATIVE": native, "FP8": "decode" if mode == "decode" else "cast",
        "D": D, "DV": features, "BLOCK_D": block_of(D, native), "BLOCK_DV": block_of(features, native),
        "BLOCK_M": tile.M, "MASK_ROWS": mask_rows, "CAUSAL": causal, "BANDED": banded, "RAGGED": ragged,
    }  # fmt: skip
    constants |= {} if found.qk == "nvfp4" else {"q_blocks": None, "k_blocks": None}
    constants |= {} if found.pv == "nvfp4" else {"v_blocks": None}
    constants |= {} if found.smooth_queries else {"bias": None}
    constants |= {} if sparse else {"blocks": None}
    if mask is None:
        constants |= {"mask": None, "mask_b": 0, "mask_h": 0, "mask_q": 0, "mask_k": 0}
    else:
        types |= {"mask": mask}
        constants |= {"mask_k": 1}
    divisible = ("v_batch", "v_head", "v_stride", "mask_b", "mask_h", "mask_q", *(() if ragged else ("Lk",)))
    return compile_kernel(attention_kernel, types, constants, arch, tile.warps, tile.stages, divisible)


def instructions(ptx: str) -> set[str]:
    return set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*", ptx))


WGMMA, MMA, TCGEN05 = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+", r"mma\.sync\.aligned\.m16n8", r"tcgen05\.mma\.\S*"
USED = [
    # Hopper
    ("int8_fp16", "", 90, {WGMMA + r"k32\.s32\.s8\.s8", WGMMA + r"k16\.f32\.f16\.f16"}),
    ("int8_fp8", "", 90, {WGMMA + r"k32\.s32\.s8\.s8", WGMMA + r"k32\.f32\.e4m3\.e4m3"}),
    ("fp8", "", 90, {WGMMA + r"k32\.f32\.e4m3\.e4m3"}),
    ("nvfp4", "", 90, {WGMMA + r"k16\.f32\.f16\.f16"}),
    # Blackwell, data centre
    ("int8_fp16", "", 100, {TCGEN05 + r"kind::i8", TCGEN05 + r"kind::f16"}),
    ("int8_fp8", "", 100, {TCGEN05 + r"kind::i8", TCGEN05 + r"kind::f8f6f4"}),
    ("fp8", "", 100, {TCGEN05 + r"kind::f8f6f4"}),
    ("nvfp4", "native", 100, {TCGEN05 + r"kind::mxf4nvf4\.block_scale\.block16"}),
    # Blackwell, workstation
    ("int8_fp16", "", 120, {MMA + r"k32\.row\.col\.satfinite\.s32\.s8\.s8", MMA + r"k16\.row\.col\.f32\.f16\.f16"}),
    ("int8_fp8", "", 120, {MMA + r"k32\.row\.col\.satfinite\.s32\.s8\.s8", MMA + r"k32\.row\.col\.f32\.e4m3\.e4m3"}),
    ("fp8", "", 120, {MMA + r"k32\.row\.col\.f32\.e4m3\.e4m3"}),
    ("nvfp4", "native", 120, {MMA + r"k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X\.f32\.e2m1\.e2m1"}),
    # before Hopper
    ("fp8", "", 89, {MMA + r"k32\.row\.col\.f32\.e4m3\.e4m3"}),
    ("int8_fp8", "decode", 80, {MMA + r"k32\.row\.col\.satfinite\.s32", MMA + r"k16\.row\.col\.f32\.f16\.f16"}),
    ("nvfp4", "decode", 80, {MMA + r"k16\.row\.col\.f32\.f16\.f16"}),
]


@pytest.mark.parametrize(("recipe", "mode", "arch", "wanted"), USED)
def test_both_products_use_the_tensor_cores_of_their_types(
    build: Build, recipe: str, mode: str, arch: int, wanted: set[str]
) -> None:
    if BEFORE_3_8 and arch == 100:
        pytest.skip("int8 goes by the instruction of older GPUs before Triton 3.8")
    kernel = build(recipe, arch, mode=mode)
    used = instructions(kernel.ptx)
    assert all(any(re.match(pattern, name) for pattern in wanted) for name in used), used
    assert all(any(re.match(pattern, name) for name in used) for pattern in wanted), used
    assert kernel.spills == 0 and kernel.shared <= SHARED[arch] * 1024


def test_weights_are_rounded_by_the_hardware(build: Build) -> None:
    for arch in (90, 100, 120):
        assert "cvt.rn.satfinite.e4m3x2.f32" in build("fp8", arch).ptx
    for arch in (100, 120):
        ptx = build("nvfp4", arch, mode="native").ptx
        assert "cvt.rn.satfinite.e2m1x2.f32" in ptx and "cvt.rn.satfinite.e4m3x2.f32" in ptx


def test_hopper_leaves_its_short_fp8_accumulator_after_each_tile(build: Build) -> None:
    ptx = build("fp8", 90).ptx
    loop = ptx[ptx.index("wgmma.mma_async") :]
    assert len(re.findall(r"add\.(?:rn\.)?f32", loop)) >= 32  # a result's values in a thread


def test_tiles_are_fetched_ahead(build: Build) -> None:
    for recipe, bytes_ in (("int8_fp16", "0x10"), ("fp8", "0x10"), ("nvfp4", "0x8")):
        pattern = rf"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], {bytes_},"
        assert re.search(pattern, build(recipe, 90).ptx), recipe


FEATURES = {
    "odd length, causal": {"ragged": True, "causal": True},
    "odd length, keys padded": {"ragged": True, "mask": "*u8"},
    "window": {"banded": True},
    "bf16 mask": {"mask": "*bf16", "mask_rows": True},
    "sparse": {"sparse": True},
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("recipe", "mode", "arch"), [("int8_fp8", "", 90), ("nvfp4", "native", 100)])
def test_features_keep_the_instructions(build: Build, recipe: str, mode: str, arch: int, feature: str) -> None:
    plain, kernel = build(recipe, arch, mode=mode), build(recipe, arch, mode=mode, **FEATURES[feature])
    assert instructions(kernel.ptx) == instructions(plain.ptx)
    assert kernel.spills == 0 and kernel.shared <= SHARED[arch] * 1024


@pytest.mark.parametrize(
    ("recipe", "mode", "arch"),
    [("int8_fp16", "", 90), ("fp8", "", 90), ("fp8", "decode", 80), ("nvfp4", "native", 100), ("nvfp4", "native", 120)],
)
def test_small_heads_compile(build: Build, recipe: str, mode: str, arch: int) -> None:
    assert instructions(build(recipe, arch, 16, mode=mode).ptx)


LABELLED = {
    90: [
        *((recipe, "", D) for recipe in RECIPES for D in (64, 128)),
        *(("int8_fp8", "", D) for D in (72, 256)),
    ],
    100: [
        *((recipe, "", D) for recipe in ("int8_fp16", "int8_fp8", "fp8") for D in (64, 128)),
        *(("nvfp4", "native", D) for D in (64, 128)),
    ],
    120: [
        *((recipe, "", D) for recipe in ("int8_fp16", "int8_fp8", "fp8") for D in (64, 128)),
        *(("nvfp4", "native", D) for D in (64, 128)),
    ],
}


@pytest.mark.parametrize("arch", LABELLED)
def test_golden_numbers(build: Build, golden_numbers: Callable[..., None], arch: int) -> None:
    labelled = [entry for entry in LABELLED[arch] if not (entry[1] == "native" and BEFORE_3_8)]
    kernels = {
        " ".join(f"{recipe} {mode}".split()) + f", head of {features}": build(recipe, arch, features, mode=mode)
        for recipe, mode, features in labelled
    }
    kernels["int8_fp8, head of 64, few queries"] = build("int8_fp8", arch, queries=FEW)
    golden_numbers(f"attention-sm_{arch}", kernels)
    assert all(kernel.spills == 0 and kernel.shared <= SHARED[arch] * 1024 for kernel in kernels.values())
