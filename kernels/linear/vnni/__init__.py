"""Integer linear layers for CPUs with AVX512-VNNI, compiled from C++ on first use."""

from .build import vnni_reason
from .op import COLUMNS, linear, linear_quantize, norm_linear, pack, weight_linear

__all__ = ["COLUMNS", "linear", "linear_quantize", "norm_linear", "pack", "vnni_reason", "weight_linear"]
