"""Puts a quantised checkpoint into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ditc.kernels.errors import CheckpointError

from .evidence import Choice, decide
from .files import Checkpoint, Rename, open_checkpoint
from .parts import check_shapes, read_layer
from .place import Fit, Staged, fit_plain, linear_of, read_plain, target_device
from .stored import Recognised, StoredWeight, recognise

REENCODINGS = ("auto", "fp8")


@dataclass(frozen=True)
class LoadReport:
    """What was put into a model.

    Attributes:
        producer: whose layout the checkpoint has: ``modelopt``, ``torchao``, ``comfy``, ``unknown``, or ``plain``.
        formats: format of each quantised layer, as it is in the model now.
        layouts: of each layer with blocks, how its scales and its 4-bit codes lay in the file.
        plain: how many tensors were taken as they are.
        packed_bytes: bytes of the quantised layers' parts.
        unused: keys of the checkpoint that no module took (``strict=False`` only).
        missing: parameters and buffers that got nothing (``strict=False`` only).
    """

    producer: str
    formats: Mapping[str, str]
    layouts: Mapping[str, str]
    plain: int
    packed_bytes: int
    unused: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = sorted(set(self.formats.values()))
        counts = ", ".join(f"{list(self.formats.values()).count(kind)} {kind}" for kind in kinds)
        left = (
            f"; {len(self.unused)} keys unused, {len(self.missing)} tensors missing"
            if self.unused or self.missing
            else ""
        )
        return (
            f"{self.producer} checkpoint: layers {counts}; {self.plain} tensors as they are; "
            f"{self.packed_bytes / 2**20:.1f} MiB quantised{left}"
        )


def load_quantized(
    model: nn.Module,
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    strict: bool = True,
    scale_layout: str | None = None,
    nibbles: str | None = None,
    reencode: str | None = "auto",
    rename: Rename | None = None,
) -> LoadReport:
    """Loads a checkpoint that somebody quantised, without the library that wrote it.

    Each linear layer that is quantised in the checkpoint is replaced by a :class:`~.module.QuantizedLinear`; every
    other tensor goes to the parameter or buffer of its name, in that one's type. Headers are checked first, then
    values; the model is changed only when all of the checkpoint has been read, so a failed load leaves it as it was.

    Args:
        model: a module of the checkpoint's architecture; its parameters may be on the ``meta`` device
            (:func:`~.place.parameters_on_meta`), and then nothing is held twice.
        path: a folder in the layout of diffusers, or one safetensors file.
        device: where to put everything; by default where each tensor of the model is, the CPU for ``meta``.
        strict: refuse keys that no module takes, and parameters and persistent buffers that get nothing.
        scale_layout: ``linear`` or ``swizzled``, how the scales of blocks lie, where the checkpoint does not say.
        nibbles: ``even-low`` or ``even-high``, which 4-bit code is the first, where the checkpoint does not say.
        reencode: ``fp8`` turns 4-bit weights into row-wise FP8: exact for MXFP4 (or refused), rounded once more for
            NVFP4. ``auto`` does it for GPUs that have FP8 arithmetic and no FP4 (Ada, Hopper); ``None`` never does.
        rename: what a key of the checkpoint is called in the model, where the two differ; it must take the keys of
            scales as it takes those of weights.

    Raises:
        CheckpointError: files that are missing or truncated; a quantiser that ditc does not know; a layout that
            nothing decides; tensors that are missing, left over, of a wrong shape or type, or no numbers.
    """
    if reencode not in (None, *REENCODINGS):
        raise CheckpointError(f"reencode is one of {', '.join(REENCODINGS)}; got {reencode!r}")
    checkpoint = open_checkpoint(path, rename)
    found = recognise(checkpoint)
    weights = decide(found.weights, Choice(scale_layout, nibbles))
    layers = {module: linear_of(model, module) for module in weights}
    for module, weight in weights.items():
        check_shapes(module, weight, layers[module].out_features, layers[module].in_features)
    fit = fit_plain(model, checkpoint, set(layers), _taken(checkpoint, found), strict)
    staged = read_plain(model, checkpoint, fit, device)
    for module, weight in weights.items():
        layer = layers[module]
        shape, bias = (layer.out_features, layer.in_features), staged.bias_of(module, layer)
        place = target_device(layer.weight, device)
        wanted = reencoding_for(place) if reencode == "auto" else reencode
        staged.layers[module] = read_layer(checkpoint, weight, shape, bias, layer.weight.dtype, place, wanted)
    report = _report(found, weights, staged, fit)
    staged.assign(model, device)
    return report


def reencoding_for(device: torch.device) -> str | None:
    """``fp8`` for a GPU with FP8 arithmetic and without FP4 (compute capability 8.9 and 9.0), else ``None``.

    On a CPU 4-bit weights are storage alone, and the smaller storage is the better one.
    """
    if device.type != "cuda":
        return None
    return "fp8" if torch.cuda.get_device_capability(device) in ((8, 9), (9, 0)) else None


def _taken(checkpoint: Checkpoint, found: Recognised) -> set[str]:
    keys = {key for weight in found.weights.values() for key in weight.keys}
    return set(found.markers) | {name for name, tensor in checkpoint.tensors.items() if tensor.key in keys}


def _report(found: Recognised, weights: Mapping[str, StoredWeight], staged: Staged, fit: Fit) -> LoadReport:
    layouts = {
        module: f"{weight.scale_layout}, {weight.nibbles}" if weight.format != "mxfp8" else str(weight.scale_layout)
        for module, weight in weights.items()
        if weight.format in ("nvfp4", "mxfp4", "mxfp8")
    }
    return LoadReport(
        producer=found.producer,
        formats={module: layer.format for module, layer in staged.layers.items()},
        layouts=layouts,
        plain=len(fit.plain),
        packed_bytes=staged.packed_bytes,
        unused=fit.unused,
        missing=fit.missing,
    )
