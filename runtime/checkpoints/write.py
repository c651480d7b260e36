"""Writes a model in modelopt's layout, for whatever reads modelopt's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ditc.kernels.errors import CheckpointError

from .module import QuantizedLinear

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"

_BITS = {
    "NVFP4": (4, "float", 16),
    "NVFP4_SVD": (4, "float", 16),
    "NVFP4_AWQ": (4, "float", 16),
    "FP8": (8, "float", None),
    "FP8_PER_CHANNEL_PER_TOKEN": (8, "float", None),
    "W8A8_SQ_PER_CHANNEL": (8, "int", None),
    "MXFP8": (8, "float", 32),
}
_PER_CHANNEL = ("FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL")


def save_modelopt(model: nn.Module, folder: str | Path) -> Path:
    """Writes a model whose layers were quantised, as modelopt exports one for diffusers.

    The folder gets ``config.json`` with ``quantization_config``, and one safetensors file; scales of blocks lie in
    rows and even elements in the low nibble. Codes and scales are written bit for bit. The files are written aside
    and moved into place when they are whole; a new folder appears at once.

    Args:
        model: a module with at least one :class:`~.module.QuantizedLinear`.
        folder: where to; it may hold an earlier save, which is replaced, and no other checkpoint.

    Returns:
        The folder.

    Raises:
        CheckpointError: nothing is quantised, modelopt has no such layout (MXFP4; NVFP4 with an outer scale per row;
            a branch of low rank or ``pre_quant_scale`` beside another format than its own), or the folder holds
            another checkpoint.
    """
    folder = Path(folder)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not layers:
        raise CheckpointError("no layer of the model is quantised: save it with its own library")
    algorithms = {name: _algorithm(name, layer) for name, layer in layers.items()}
    config = _model_config(model) | {"quantization_config": _quantization_config(model, layers, algorithms)}
    tensors = _tensors(model, layers, algorithms)
    _refuse_others(folder)
    _write(folder, tensors, config)
    return folder


def _algorithm(name: str, layer: QuantizedLinear) -> str:
    """modelopt's name for how a layer is quantised."""
    smoothed, branched = layer.pre_quant_scale is not None, layer.lora_a is not None
    match layer.format:
        case "nvfp4":
            outer = layer.weight_outer
            if outer is None or not bool((outer == outer[:1]).all()):
                raise CheckpointError(f"{name} has an outer scale per row; modelopt stores one per weight")
            return "NVFP4_SVD" if branched else "NVFP4_AWQ" if smoothed else "NVFP4"
        case "int8" if not branched:
            return "W8A8_SQ_PER_CHANNEL"
        case "fp8" if not branched and not smoothed:
            return "FP8" if bool((layer.weight_scale == layer.weight_scale[:1]).all()) else "FP8_PER_CHANNEL_PER_TOKEN"
        case "mxfp8" if not branched and not smoothed:
            return "MXFP8"
    extras = [what for what, there in (("pre_quant_scale", smoothed), ("a branch of low rank", branched)) if there]
    beside = f" with {' and '.join(extras)}" if extras else ""
    raise CheckpointError(f"{name} is {layer.format}{beside}, for which modelopt has no layout")


def _tensors(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], algorithms: Mapping[str, str]
) -> dict[str, Tensor]:
    """What goes into the file, on the CPU, contiguous, no two in one storage."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers:
            tensors[name] = tensor
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _stored(layer, algorithms[name]).items()}
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(f"{meta[0]} is on the meta device: there is nothing to save")
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != kept.numel() * kept.element_size():
            kept = kept.clone()
        storages.add(kept.untyped_storage().data_ptr())
        own[name] = kept
    return own


def _stored(layer: QuantizedLinear, algorithm: str) -> dict[str, Tensor]:
    """One layer's tensors under modelopt's names."""
    scale = layer.weight_scale
    if algorithm == "FP8":
        scale = scale[0, 0]
    elif algorithm in _PER_CHANNEL:
        scale = scale[:, 0]
    found = {
        "weight": layer.weight_q,
        "weight_scale": scale,
        "weight_scale_2": None if layer.weight_outer is None else layer.weight_outer[0, 0],
        "bias": layer.bias,
        "input_scale": layer.input_scale,
        "pre_quant_scale": layer.pre_quant_scale,
        "svdquant_lora_a": layer.lora_a,
        "svdquant_lora_b": layer.lora_b,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _model_config(model: nn.Module) -> dict[str, Any]:
    """The configuration of a diffusers model; of any other module, the name of its class."""
    to_json = getattr(model, "to_json_string", None)
    if not callable(to_json):
        return {"_class_name": type(model).__name__}
    values: dict[str, Any] = json.loads(to_json())
    return values


def _quantization_config(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], algorithms: Mapping[str, str]
) -> dict[str, Any]:
    plain = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kinds = sorted(set(algorithms.values()))
    named = {kind: [name for name, other in algorithms.items() if other == kind] for kind in kinds}
    groups = {
        f"group_{i}": _group(kind, [layers[name] for name in named[kind]])
        | {"targets": ["Linear"] if len(kinds) == 1 else sorted(named[kind])}
        for i, kind in enumerate(kinds)
    }
    config: dict[str, Any] = {
        "config_groups": groups,
        "ignore": plain,
        "quant_algo": kinds[0] if len(kinds) == 1 else "MIXED_PRECISION",
        "producer": {"name": "ditc", "version": version("ditc")},
        "quant_method": "modelopt",
    }
    if len(kinds) > 1:
        config["quantized_layers"] = {name: _layer_entry(kind) for name, kind in sorted(algorithms.items())}
    return config


def _group(kind: str, layers: list[QuantizedLinear]) -> dict[str, Any]:
    bits, number, block = _BITS[kind]
    size = {} if block is None else {"group_size": block}
    dynamic = any(layer.input_scale is None for layer in layers)
    weights = {"dynamic": False, "num_bits": bits, "type": number} | size
    if kind in _PER_CHANNEL:
        weights["strategy"] = "channel"
    group: dict[str, Any] = {
        "input_activations": {"dynamic": dynamic, "num_bits": bits, "type": number} | size,
        "weights": weights,
    }
    if kind in ("NVFP4_SVD", "NVFP4_AWQ"):
        group |= {"has_zero_point": False, "pre_quant_scale": True}
    ranks = {layer.lora_a.shape[0] for layer in layers if layer.lora_a is not None}
    if len(ranks) == 1:
        group["lora_rank"] = ranks.pop()
    return group


def _layer_entry(kind: str) -> dict[str, Any]:
    block = _BITS[kind][2]
    return {"quant_algo": kind} | ({} if block is None else {"group_size": block})


def _refuse_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    others = [p.name for p in folder.glob("*.safetensors*") if p.name != WEIGHTS] if folder.is_dir() else []
    if others:
        raise CheckpointError(f"{folder} holds another checkpoint ({sorted(others)[0]}): choose another folder")


def _write(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        whole = aside / "whole"
        whole.mkdir()
        save_file(tensors, whole / WEIGHTS, metadata={"format": "pt"})
        (whole / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # safetensors makes files that nobody else may read
        (whole / WEIGHTS).chmod((whole / CONFIG).stat().st_mode)
        for name in (WEIGHTS, CONFIG):
            with (whole / name).open("rb") as written:
                os.fsync(written.fileno())
        if folder.exists():
            for name in (WEIGHTS, CONFIG):
                (whole / name).replace(folder / name)
        else:
            whole.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
