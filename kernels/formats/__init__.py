"""Quantised number formats: elements, scales, how a tensor becomes a list of parts and is read back.

``format`` names the five formats and what they share; ``int8``, ``fp8``, ``mx`` and ``nvfp4`` hold the recipes with all
their parameters; ``e2m1`` and ``e8m0`` their parts; ``layouts`` other orders of the same bytes;
``reencode`` FP4 as FP8; ``sqnr`` what a format keeps.
"""

from .e2m1 import E2M1_MAX
from .format import FORMATS, Format, format_of
from .fp8 import E4M3_MAX, dequantize_fp8, quantize_fp8
from .int8 import INT8_MAX, dequantize_int8, quantize_int8
from .layouts import concatenate, row_outer, split, swap_nibbles, swizzle_scales, tensor_outer, unswizzle_scales
from .mx import dequantize_mxfp4, dequantize_mxfp8, quantize_mxfp4, quantize_mxfp8
from .nvfp4 import SMALLEST_OUTER, dequantize_nvfp4, quantize_nvfp4
from .ranges import SMALLEST_SCALE, Granularity
from .reencode import fp8_from_mxfp4, fp8_from_nvfp4
from .sqnr import sqnr

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "FORMATS",
    "INT8_MAX",
    "SMALLEST_OUTER",
    "SMALLEST_SCALE",
    "Format",
    "Granularity",
    "concatenate",
    "dequantize_fp8",
    "dequantize_int8",
    "dequantize_mxfp4",
    "dequantize_mxfp8",
    "dequantize_nvfp4",
    "format_of",
    "fp8_from_mxfp4",
    "fp8_from_nvfp4",
    "quantize_fp8",
    "quantize_int8",
    "quantize_mxfp4",
    "quantize_mxfp8",
    "quantize_nvfp4",
    "row_outer",
    "split",
    "sqnr",
    "swap_nibbles",
    "swizzle_scales",
    "tensor_outer",
    "unswizzle_scales",
]
