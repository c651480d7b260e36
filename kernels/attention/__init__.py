"""Attention on 8-bit integers: what it means, and its kernel for CPUs with AVX512-VNNI."""

from .build import attention_reason
from .op import MAX_HEAD, TOLERANCE, attention_int8, attention_int8_reference

__all__ = ["MAX_HEAD", "TOLERANCE", "attention_int8", "attention_int8_reference", "attention_reason"]
