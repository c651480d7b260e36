"""Quantises a checkpoint in full precision while it is read, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import ditc.kernels.quantize  # noqa: F401  (registers ditc::quantize_weight)
from ditc.kernels.errors import CheckpointError
from ditc.kernels.formats import FORMATS
from ditc.kernels.operands import FLOATS

from .files import Checkpoint, Rename, StoredTensor, open_checkpoint
from .load import LoadReport
from .module import QuantizedLinear
from .parts import check_values
from .place import fit_plain, linear_of, read_plain, target_device

CHUNK = 1 << 19
"""Values that are quantised at once: the intermediate results of a whole weight would take many times its memory."""


def load_and_quantize(
    model: nn.Module,
    path: str | Path,
    formats: Mapping[str, str],
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
    rename: Rename | None = None,
) -> LoadReport:
    """Loads a checkpoint in full precision and quantises the listed layers as they are read.

    At no time is more than one of these layers in full precision: with the model on the ``meta`` device, memory peaks
    at the finished model and twice its largest layer.

    Args:
        model: a module of the checkpoint's architecture, best with its parameters on the ``meta`` device
            (:func:`~.place.parameters_on_meta`).
        path: a folder in the layout of diffusers, or one safetensors file.
        formats: path of each linear layer to quantise, and the name of its format.
        device: where to quantise and keep everything; by default where each tensor of the model is, the CPU for
            ``meta``.
        strict: refuse keys that no module takes, and parameters and persistent buffers that get nothing.
        rename: what a key of the checkpoint is called in the model, where the two differ.

    Raises:
        CheckpointError: as :func:`~.load.load_quantized`, and for a layer whose format does not admit it or whose
            weight holds NaN or infinity. The model is then as it was.
    """
    checkpoint = open_checkpoint(path, rename)
    layers = {module: linear_of(model, module) for module in formats}
    for module, layer in layers.items():
        _check(checkpoint, module, layer, formats[module])
    fit = fit_plain(model, checkpoint, set(layers), {f"{module}.weight" for module in layers}, strict)
    staged = read_plain(model, checkpoint, fit, device)
    # what stays is allocated before what goes, so that no hole between two packed layers is held by the allocator
    packed = {module: _allocated(layer, formats[module], device) for module, layer in layers.items()}
    for module, layer in layers.items():
        _pack(checkpoint, checkpoint.tensors[f"{module}.weight"], formats[module], packed[module])
        bias = staged.bias_of(module, layer)
        staged.layers[module] = QuantizedLinear(packed[module], formats[module], bias, dtype=layer.weight.dtype)
    report = LoadReport("plain", dict(formats), {}, len(fit.plain), staged.packed_bytes, fit.unused, fit.missing)
    staged.assign(model, device)
    return report


def _allocated(layer: nn.Linear, format: str, device: torch.device | str | None) -> list[Tensor]:
    place = target_device(layer.weight, device)
    types = FORMATS[format].part_types((layer.out_features, layer.in_features))
    return [torch.empty(shape, dtype=dtype, device=place) for shape, dtype in types]


def _pack(checkpoint: Checkpoint, stored: StoredTensor, format: str, packed: list[Tensor]) -> None:
    """Quantises one weight into ``packed``, some rows at a time; its full precision is gone when this returns."""
    weight = checkpoint.read(stored).to(packed[0].device)
    with torch.no_grad():
        low, high = torch.aminmax(weight)
        largest = torch.maximum(-low, high).float()
        if not torch.isfinite(largest):
            raise CheckpointError(f"{stored} holds NaN or infinity and cannot be quantised")
        outer = None
        if format == "nvfp4":  # the one range that rows share, and it depends on their largest magnitude only
            outer = torch.ops.ditc.quantize_weight(largest.expand(1, 16), format)[2].reshape(())
        rows = max(1, CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            parts = torch.ops.ditc.quantize(weight[start : start + rows], format, outer)
            for place, part in zip(packed, parts, strict=True):
                place[start : start + rows].copy_(part)
    check_values(stored.key, format, packed)


def _check(checkpoint: Checkpoint, module: str, layer: nn.Linear, format: str) -> None:
    if format not in FORMATS:
        raise CheckpointError(f"{module} cannot be {format!r}: there are {', '.join(FORMATS)}")
    reason = FORMATS[format].unsupported(layer.in_features)
    if reason is not None:
        raise CheckpointError(f"{module} cannot be quantised: {reason}")
    stored = checkpoint.tensors.get(f"{module}.weight")
    if stored is None:
        raise CheckpointError(f"{module} is to be quantised, and {checkpoint.path} holds no {module}.weight")
    if stored.dtype not in FLOATS:
        raise CheckpointError(f"{stored} is to be quantised; float32, bfloat16 or float16 are wanted")
    if stored.shape != (layer.out_features, layer.in_features):
        raise CheckpointError(f"{stored} does not fit {module} of [{layer.out_features}, {layer.in_features}]")
