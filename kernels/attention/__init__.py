"""Attention on few bits: what it means in plain torch, and its kernels.

``quantized`` is the op on operands that are quantised already, and what quantises them; ``recipe`` the formats to
choose from; ``visible`` masks, windows and blocks; ``sparse`` which blocks of keys are worth looking at. ``int8`` is an
op of its own for CPUs with AVX512-VNNI, from float operands.
"""

from . import cuda as _cuda  # registers the CUDA implementation  # noqa: F401
from .build import attention_reason
from .int8 import MAX_HEAD, TOLERANCE, attention_int8, attention_int8_reference
from .quantized import (
    Operands,
    attend,
    attention_quantized,
    attention_quantized_reference,
    quantize_operands,
    quantize_values,
)
from .recipe import KEYS, QUERIES, RECIPES, VALUE_BLOCK, Recipe, Tolerance, recipe_of
from .sparse import attention_blocks
from .visible import SPARSE_BLOCK, check_visible, hidden

__all__ = [
    "KEYS",
    "MAX_HEAD",
    "QUERIES",
    "RECIPES",
    "SPARSE_BLOCK",
    "TOLERANCE",
    "VALUE_BLOCK",
    "Operands",
    "Recipe",
    "Tolerance",
    "attend",
    "attention_blocks",
    "attention_int8",
    "attention_int8_reference",
    "attention_quantized",
    "attention_quantized_reference",
    "attention_reason",
    "check_visible",
    "hidden",
    "quantize_operands",
    "quantize_values",
    "recipe_of",
]
