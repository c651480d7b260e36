"""Where ``ditc explain`` takes a model from: a class of diffusers and a configuration, or a local checkpoint folder."""

from __future__ import annotations

import difflib
import json
import math
from pathlib import Path
from typing import Any

import torch

from ditc.passes.errors import CaptureError, DitcError


class ModelSourceError(DitcError):
    """No model can be made from what the user named."""


def build_model(source: str, config: Path | None, device: str) -> torch.nn.Module:
    """A model in evaluation mode, with random weights: structure does not depend on their values.

    Args:
        source: the name of a class in ``diffusers``, or a folder that holds ``config.json`` (of a model, or of a
            pipeline with a ``transformer`` folder).
        config: JSON with the arguments of the class; its defaults where ``None``.
        device: ``meta`` allocates nothing.

    Raises:
        ModelSourceError: no such class or folder, or a configuration that the class refuses.
    """
    folder = Path(source)
    values: dict[str, Any] = {}
    if folder.is_dir():
        if config is not None:
            raise ModelSourceError("a folder has its own config.json: leave --config out")
        source, values = _read_folder(folder)
    elif config is not None:
        values = _read_json(config)
    values = {key: value for key, value in values.items() if not key.startswith("_")}
    kind = _diffusers_class(source)
    try:
        with torch.device(device):
            model: torch.nn.Module = kind.from_config(values) if values else kind()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelSourceError(f"{source} cannot be built from this configuration: {error}") from error
    return model.eval()


def _diffusers_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ModelSourceError("this needs diffusers: pip install 'ditc[diffusers]'") from error
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        near = difflib.get_close_matches(name, [n for n in dir(diffusers) if "Transformer" in n or "DiT" in n], n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ModelSourceError(f"diffusers has no model class {name!r}, and no such folder exists{hint}")
    return kind


def _read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    inner = folder / "transformer"
    path = (inner if (inner / "config.json").is_file() else folder) / "config.json"
    if not path.is_file():
        raise ModelSourceError(f"{folder} holds no config.json (nor does {inner})")
    values = _read_json(path)
    name = values.get("_class_name")
    if not isinstance(name, str):
        raise ModelSourceError(f"{path} does not say its _class_name")
    return name, values


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ModelSourceError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelSourceError(f"{path} holds a {type(values).__name__}, an object is wanted")
    return values


def parse_input(text: str, model: torch.nn.Module) -> tuple[str, Any]:
    """``NAME=2x16x64[:dtype]`` as a name and a random tensor; ``NAME=int:7`` as a plain number.

    Raises:
        CaptureError: the text says something else.
    """
    name, _, spec = text.partition("=")
    if spec.startswith("int:") and spec[4:].isdigit():
        return name, int(spec[4:])
    shape, _, kind = spec.partition(":")
    sizes = shape.split("x")
    dtype = getattr(torch, kind, None) if kind else next(iter(model.parameters())).dtype
    if not name or not all(size.isdigit() for size in sizes) or not isinstance(dtype, torch.dtype):
        raise CaptureError(f"--input {text!r}: wanted is NAME=2x16x64, NAME=2x16:int64 or NAME=int:7")
    device = next(iter(model.parameters())).device
    dimensions = [int(size) for size in sizes]
    if math.prod(dimensions) == 0:
        raise CaptureError(f"--input {text!r}: no size may be 0")
    if dtype.is_floating_point:
        return name, torch.randn(dimensions, device=device, dtype=dtype)
    return name, torch.ones(dimensions, device=device, dtype=dtype)
