"""What a checkpoint holds for each quantised layer, told apart by key names, types and metadata.

Three producers share one naming (``<layer>.weight``, ``weight_scale``, ``weight_scale_2``, ``input_scale``) and differ
in what the bytes mean, which nothing in the tensors shows:

- modelopt's export: even elements in the low nibble; scales of blocks in rows, unless its post-processing was asked to
  swizzle them, which leaves ``quantization_config`` in the header of the file as its only trace;
- ComfyUI's files, and FLUX.2-NVFP4 as its authors publish it: ``_quantization_metadata`` in the header (or a
  ``comfy_quant`` tensor per layer), even elements in the high nibble, scales always swizzled and padded;
- files without a word about it.

torchao's files say everything in their headers (:mod:`.torchao`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ditc.kernels.errors import CheckpointError

from .files import Checkpoint, StoredTensor
from .torchao import torchao_layers

MODELOPT_ALGORITHMS = {
    "NVFP4": "nvfp4",
    "NVFP4_SVD": "nvfp4",
    "NVFP4_AWQ": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "W8A8_SQ_PER_CHANNEL": "int8",
    "MXFP8": "mxfp8",
}
"""modelopt's names of algorithms, and the format of the weights that they leave."""

COMFY_FORMATS = {"nvfp4": "nvfp4", "float8_e4m3fn": "fp8", "mxfp8": "mxfp8"}
"""ComfyUI's names of formats, and ours."""

CODES = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types that no plain weight has."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
_SIDES = {
    "input_scale": "input_scale",
    "pre_quant_scale": "pre_quant_scale",
    "svdquant_lora_a": "lora_a",
    "svdquant_lora_b": "lora_b",
}
_COMFY_ENTRIES = {"format", "full_precision_matrix_mult", "group_size", "orig_dtype", "orig_shape"}


@dataclass(frozen=True)
class StoredWeight:
    """How a checkpoint stores the weight of one linear layer.

    Attributes:
        format: a name in :data:`ditc.kernels.formats.FORMATS`.
        q, scale, outer: the tensors that hold its parts, as stored.
        nibbles: ``even-low`` or ``even-high`` where the metadata say which 4-bit code comes first.
        scale_layout: ``linear`` or ``swizzled`` where the metadata say how the scales of blocks lie.
        sides: what else belongs to the layer, by the names of :class:`~.module.QuantizedLinear`.
    """

    format: str
    q: StoredTensor
    scale: StoredTensor
    outer: StoredTensor | None = None
    nibbles: str | None = None
    scale_layout: str | None = None
    sides: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The keys, in the file, of all tensors of this layer but its bias."""
        parts = [self.q, self.scale, *([] if self.outer is None else [self.outer]), *self.sides.values()]
        return {tensor.key for tensor in parts}


@dataclass(frozen=True)
class Recognised:
    """Whose checkpoint it is, its quantised layers, and the keys that only describe others."""

    producer: str
    weights: Mapping[str, StoredWeight]
    markers: frozenset[str] = frozenset()


def recognise(checkpoint: Checkpoint) -> Recognised:
    """Finds the quantised layers of a checkpoint.

    Raises:
        CheckpointError: nothing in it is quantised, or by something that ditc does not know, or a weight comes
            without its scales.
    """
    layers = torchao_layers(checkpoint)
    if layers is not None:
        weights = {module: StoredWeight(**layer) for module, layer in layers.items()}
        return _some(checkpoint, Recognised("torchao", weights))
    config, from_header = _quantization_config(checkpoint)
    comfy, markers = _comfy_layers(checkpoint)
    if config is not None and config.get("quant_method") != "modelopt":
        raise CheckpointError(
            f"{checkpoint.path} was quantised by {config.get('quant_method')!r}; ditc reads modelopt's, torchao's and "
            "ComfyUI's (FLUX.2-NVFP4's) checkpoints"
        )
    if config is not None:
        return _some(checkpoint, _modelopt(checkpoint, config, from_header, bool(comfy), markers))
    if comfy:
        formats = {module: _comfy_format(module, entry) for module, entry in comfy.items()}
        weights = _collect(checkpoint, formats, nibbles="even-high", scale_layout="swizzled")
        return _some(checkpoint, Recognised("comfy", weights, markers))
    return _some(checkpoint, Recognised("unknown", _collect(checkpoint, None, None, None)))


def _some(checkpoint: Checkpoint, found: Recognised) -> Recognised:
    if not found.weights:
        raise CheckpointError(
            f"no layer of {checkpoint.path} is quantised; load_and_quantize reads checkpoints in full precision"
        )
    return found


def _quantization_config(checkpoint: Checkpoint) -> tuple[Mapping[str, Any] | None, bool]:
    """The configuration of the quantiser, and whether a header repeats it."""
    config = checkpoint.config.get("quantization_config")
    texts = [text["quantization_config"] for text in checkpoint.metadata if "quantization_config" in text]
    if config is None and texts:
        config = _json(texts[0], f"the quantization_config in the header of {checkpoint.path}")
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(f"the quantization_config of {checkpoint.path} is no object")
    return config, bool(texts)


def _modelopt(
    checkpoint: Checkpoint, config: Mapping[str, Any], from_header: bool, comfy: bool, markers: frozenset[str]
) -> Recognised:
    algorithm = config.get("quant_algo")
    formats: str | dict[str, str]
    if algorithm == "MIXED_PRECISION":
        layers = config.get("quantized_layers")
        if not isinstance(layers, dict) or not all(isinstance(layer, dict) for layer in layers.values()):
            raise CheckpointError(f"{checkpoint.path} says MIXED_PRECISION and lists no quantized_layers")
        formats = {_module(checkpoint, k): _modelopt_format(layer.get("quant_algo")) for k, layer in layers.items()}
    else:
        formats = _modelopt_format(algorithm)
    # a header with both accounts was written for ComfyUI by who knows which packer
    nibbles = None if comfy else "even-low"
    swapped = config.get("swap_weight_nibbles")  # SGLang's addition to modelopt's configuration
    if isinstance(swapped, bool):
        nibbles = "even-high" if swapped else "even-low"
    weights = _collect(checkpoint, formats, nibbles, None if from_header else "linear")
    return Recognised("modelopt", weights, markers)


def _modelopt_format(algorithm: Any) -> str:
    if not isinstance(algorithm, str) or algorithm not in MODELOPT_ALGORITHMS:
        known = ", ".join([*MODELOPT_ALGORITHMS, "MIXED_PRECISION"])
        raise CheckpointError(f"quant_algo {algorithm!r} is unknown; ditc reads {known}")
    return MODELOPT_ALGORITHMS[algorithm]


def _comfy_layers(checkpoint: Checkpoint) -> tuple[dict[str, Any], frozenset[str]]:
    """What ComfyUI's metadata say of each layer, and the keys of the tensors that say it."""
    layers: dict[str, Any] = {}
    for text in checkpoint.metadata:
        if "_quantization_metadata" in text:
            account = _json(text["_quantization_metadata"], f"the _quantization_metadata of {checkpoint.path}")
            if not isinstance(account, dict) or not isinstance(account.get("layers"), dict):
                raise CheckpointError(f"the _quantization_metadata of {checkpoint.path} list no layers")
            layers |= account["layers"]
    markers = frozenset(key for key in checkpoint.tensors if key.endswith(".comfy_quant"))
    for key in markers:
        marker = checkpoint.tensors[key]
        described = bytes(checkpoint.read(marker).to(torch.uint8).tolist()).decode("utf-8", errors="replace")
        layers[marker.key.removesuffix(".comfy_quant")] = _json(described, key)
    return {_module(checkpoint, key): entry for key, entry in layers.items()}, markers


def _module(checkpoint: Checkpoint, name: str) -> str:
    """A module of the file by its name in the model."""
    return checkpoint.name(f"{name}.weight").removesuffix(".weight")


def _comfy_format(module: str, entry: Any) -> str:
    format = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(format, str) or format not in COMFY_FORMATS:
        raise CheckpointError(f"{module} is stored as {entry!r}; ditc reads {', '.join(COMFY_FORMATS)}")
    strange = sorted(key for key, value in entry.items() if key not in _COMFY_ENTRIES and value)
    if strange:
        raise CheckpointError(f"{module} is stored with {strange[0]} = {entry[strange[0]]!r}, which ditc does not know")
    return COMFY_FORMATS[format]


def _collect(
    checkpoint: Checkpoint, formats: str | Mapping[str, str] | None, nibbles: str | None, scale_layout: str | None
) -> dict[str, StoredWeight]:
    """The quantised layers by their key names; ``formats`` is what the metadata say they are."""
    tensors = checkpoint.tensors
    weights = {}
    for key, q in tensors.items():
        module, _, name = key.rpartition(".")
        if name != "weight" or q.dtype not in CODES:
            continue
        scale, outer = tensors.get(f"{key}_scale"), tensors.get(f"{key}_scale_2")
        if scale is None:
            raise CheckpointError(f"{q} is quantised, but {key}_scale is missing")
        format = _format_by_types(q, scale, outer)
        said = formats if isinstance(formats, str) or formats is None else formats.get(module, "not quantised")
        if said not in (None, format):
            raise CheckpointError(f"the metadata say that {module} is {said}, but {q} with {scale} is {format}")
        sides = {ours: tensors[f"{module}.{name}"] for name, ours in _SIDES.items() if f"{module}.{name}" in tensors}
        weights[module] = StoredWeight(format, q, scale, outer, nibbles, scale_layout, sides)
    if isinstance(formats, Mapping) and (absent := sorted(formats.keys() - weights.keys())):
        raise CheckpointError(
            f"the metadata say that {absent[0]} is {formats[absent[0]]}, but no such weight is stored"
        )
    return weights


def _format_by_types(q: StoredTensor, scale: StoredTensor, outer: StoredTensor | None) -> str:
    if q.dtype == torch.uint8 and scale.dtype == torch.float8_e4m3fn:
        if outer is None:
            raise CheckpointError(f"{q} is NVFP4, but {scale.key}_2 is missing")
        return "nvfp4"
    known = {
        (torch.uint8, _EXPONENTS): "mxfp4",
        (torch.float8_e4m3fn, _FLOATS): "fp8",
        (torch.float8_e4m3fn, _EXPONENTS): "mxfp8",
        (torch.int8, _FLOATS): "int8",
    }
    for (dtype, scales), format in known.items():
        if q.dtype == dtype and scale.dtype in scales and outer is None:
            return format
    extra = "" if outer is None else f" and {outer}"
    raise CheckpointError(f"{q} with {scale}{extra} is no format that ditc knows")


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{what} is no JSON: {error}") from error
