"""ATen ops for which inductor's own decomposition is slow on a device, decomposed otherwise.

These change how an op is computed, not what it means: float32 results differ in the last digits only.
"""

from .lowering import gelu, layer_norm, lowerings

__all__ = ["gelu", "layer_norm", "lowerings"]
