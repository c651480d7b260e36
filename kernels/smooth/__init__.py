"""Queries and keys of NVFP4 attention from what their projections left: norm, rotation, smoothing, codes, in one op.

``op`` is the meaning. Importing this package registers ``torch.ops.ditc.{smooth_queries, smooth_keys}``.
"""

from . import cuda as _cuda  # registers the CUDA implementations  # noqa: F401
from .op import (
    MAX_HEAD,
    MOST_PIECES,
    NORMS,
    partners,
    smooth_keys,
    smooth_keys_reference,
    smooth_queries,
    smooth_queries_reference,
    turned,
)

__all__ = [
    "MAX_HEAD",
    "MOST_PIECES",
    "NORMS",
    "partners",
    "smooth_keys",
    "smooth_keys_reference",
    "smooth_queries",
    "smooth_queries_reference",
    "turned",
]
