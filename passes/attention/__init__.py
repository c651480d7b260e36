"""How attention is computed."""

from .int8 import UseInt8Attention

__all__ = ["UseInt8Attention"]
