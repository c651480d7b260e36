"""torchao's safetensors layout: tensor subclasses taken apart, with an account of each in the file's header.

The weight ``a.weight`` is stored as ``a._weight_qdata``, ``a._weight_scale`` and the like; the header maps
``a.weight`` to a JSON object with its class and attributes, and lists all names under ``tensor_names``. What torchao
wrote before it packed even elements into the low nibble (up to 0.14) had no 4-bit tensors in this layout.
"""

from __future__ import annotations

import json
from typing import Any

from ditc.kernels.errors import CheckpointError

from .files import Checkpoint, StoredTensor

KINDS = ("Int8Tensor", "Float8Tensor", "NVFP4Tensor", "MXTensor")
"""The classes of torchao's tensors that ditc reads."""

_SIDES = {"act_per_tensor_scale": "input_scale", "act_quant_scale": "input_scale", "act_pre_scale": "pre_quant_scale"}
_MX = {"float8_e4m3fn": "mxfp8", "float4_e2m1fn_x2": "mxfp4"}


def torchao_layers(checkpoint: Checkpoint) -> dict[str, dict[str, Any]] | None:
    """The quantised layers of a checkpoint in torchao's layout, as arguments of :class:`~.stored.StoredWeight`.

    ``None`` where no header is torchao's.

    Raises:
        CheckpointError: a class of tensor that ditc does not read, or one with tensors missing.
    """
    accounts: dict[str, dict[str, Any]] = {}
    for text in checkpoint.metadata:
        names = _parsed(text.get("tensor_names"))
        if isinstance(names, list):
            accounts |= {str(name): _account(checkpoint, str(name), text) for name in names}
    if not accounts:
        return None
    quantised = {name: account for name, account in accounts.items() if account["_type"] != "Tensor"}
    layers = {name: _layer(checkpoint, name, account) for name, account in quantised.items()}
    return {checkpoint.name(name).removesuffix(".weight"): layer for name, layer in layers.items()}


def _account(checkpoint: Checkpoint, name: str, text: Any) -> dict[str, Any]:
    account = _parsed(text.get(name))
    if not isinstance(account, dict) or not isinstance(account.get("_type"), str):
        raise CheckpointError(f"the header of {checkpoint.path} lists {name} and does not describe it")
    return account


def _layer(checkpoint: Checkpoint, name: str, account: dict[str, Any]) -> dict[str, Any]:
    kind, attributes, parts = account["_type"], account.get("_data"), account.get("_tensor_data_names")
    if kind not in KINDS:
        raise CheckpointError(f"{name} is a torchao {kind}; ditc reads {', '.join(KINDS)}")
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        raise CheckpointError(f"{name} is quantised; ditc reads quantised weights of linear layers only")
    if not isinstance(attributes, dict) or not isinstance(parts, list):
        raise CheckpointError(f"the header of {checkpoint.path} describes {name} without its attributes and tensors")
    stored: dict[str, StoredTensor] = {}
    for part in map(str, parts):
        key = f"{module}._weight_{part}"
        if checkpoint.name(key) not in checkpoint.tensors:
            raise CheckpointError(f"{name} is a torchao {kind}, but {key} is missing")
        stored[part] = checkpoint.tensors[checkpoint.name(key)]
    if "qdata" not in stored or "scale" not in stored:
        raise CheckpointError(f"{name} is a torchao {kind} without qdata or scale")
    layer: dict[str, Any] = {
        "format": _format(name, kind, attributes),
        "q": stored.pop("qdata"),
        "scale": stored.pop("scale"),
        "outer": stored.pop("per_tensor_scale", None),
        "nibbles": "even-low",
        "scale_layout": "swizzled" if attributes.get("is_swizzled_scales") else "linear",
    }
    # symmetric quantisation has zero points of zero, which the loader checks
    strange = sorted(stored.keys() - _SIDES.keys() - {"zero_point"})
    if strange:
        raise CheckpointError(f"{name} is a torchao {kind} with {strange[0]}, which ditc does not know")
    sides = {_SIDES.get(part, part): tensor for part, tensor in stored.items()}
    return layer | {"sides": sides}


def _format(name: str, kind: str, attributes: dict[str, Any]) -> str:
    block = attributes.get("block_size")
    if kind == "Int8Tensor":
        return "int8"
    if kind == "Float8Tensor":
        return "fp8"
    if kind == "NVFP4Tensor":
        if block != 16:
            raise CheckpointError(f"{name} is a torchao NVFP4Tensor with blocks of {block}; NVFP4 has blocks of 16")
        return "nvfp4"
    described = attributes.get("elem_dtype")
    element = str(described.get("_data")) if isinstance(described, dict) else ""
    if block != 32 or element not in _MX:
        known = ", ".join(_MX)
        raise CheckpointError(
            f"{name} is a torchao MXTensor of {element} in blocks of {block}; ditc reads {known} of 32"
        )
    return _MX[element]


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, json.JSONDecodeError):
        return None
