"""Checkpoints with quantised weights: read without the library that wrote them, made layer by layer, written.

``load_quantized`` puts a quantised checkpoint into a model, ``load_and_quantize`` one in full precision;
``save_modelopt`` writes what they made. ``QuantizedLinear`` is what a linear layer becomes. ``files`` reads headers,
``stored`` and ``torchao`` tell whose layout it is, ``evidence`` in which order things lie, ``parts`` checks and
converts values, ``place`` changes the model.
"""

from ditc.kernels.errors import CheckpointError

from .load import LoadReport, load_quantized
from .module import QuantizedLinear
from .pack import load_and_quantize
from .place import parameters_on_meta
from .write import save_modelopt

__all__ = [
    "CheckpointError",
    "LoadReport",
    "QuantizedLinear",
    "load_and_quantize",
    "load_quantized",
    "parameters_on_meta",
    "save_modelopt",
]
