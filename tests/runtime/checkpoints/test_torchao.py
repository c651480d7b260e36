"""Checkpoints that torchao itself wrote, against torchao's own reading of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditc.runtime.checkpoints import CheckpointError, LoadReport, QuantizedLinear, load_quantized

pytest.importorskip("torchao")

from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    PerTensor,
    quantize_,
)

Net = Callable[..., nn.Module]


def nvfp4(w: Tensor, swizzled: bool, scaled: bool) -> Tensor:
    outer = w.abs().max().float() / (6 * 448) if scaled else None
    return NVFP4Tensor.to_nvfp4(w, per_tensor_scale=outer, is_swizzled_scales=swizzled)


def mx(w: Tensor, element: torch.dtype, swizzled: bool) -> Tensor:
    return MXTensor.to_mx(w, element, block_size=32, is_swizzled_scales=swizzled)


PACKERS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "nvfp4": ("nvfp4", lambda w: nvfp4(w, False, True)),
    "nvfp4 swizzled": ("nvfp4", lambda w: nvfp4(w, True, True)),
    "nvfp4 one level": ("nvfp4", lambda w: nvfp4(w, True, False)),
    "mxfp4": ("mxfp4", lambda w: mx(w, torch.float4_e2m1fn_x2, False)),
    "mxfp4 swizzled": ("mxfp4", lambda w: mx(w, torch.float4_e2m1fn_x2, True)),
    "mxfp8": ("mxfp8", lambda w: mx(w, torch.float8_e4m3fn, False)),
    "mxfp8 swizzled": ("mxfp8", lambda w: mx(w, torch.float8_e4m3fn, True)),
    "fp8 rows": ("fp8", lambda w: Float8Tensor.from_hp(w, granularity=PerRow())),
    "fp8 tensor": ("fp8", lambda w: Float8Tensor.from_hp(w, granularity=PerTensor())),
}


def write(folder: Path, model: nn.Module) -> Path:
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder


def load(source: nn.Module, model: nn.Module, folder: Path) -> LoadReport:
    """Loads what torchao wrote of ``source``, and compares each layer with torchao's decoding of it."""
    report = load_quantized(model, write(folder, source))
    assert report.producer == "torchao"
    for name, format in report.formats.items():
        layer, weight = model.get_submodule(name), source.get_submodule(name).weight
        assert isinstance(layer, QuantizedLinear) and layer.format == format
        torch.testing.assert_close(layer.weight, weight.dequantize().to(layer.weight.dtype), rtol=1e-6, atol=0)
    return report


@pytest.mark.parametrize("hidden", [96, 128])
@pytest.mark.parametrize("kind", PACKERS)
def test_weights(net: Net, tmp_path: Path, kind: str, hidden: int) -> None:
    source, model = net(0, hidden), net(1, hidden)
    for name in ("inner", "outer"):
        layer = source.get_submodule(name)
        layer.weight = nn.Parameter(PACKERS[kind][1](layer.weight.detach()), requires_grad=False)
    report = load(source, model, tmp_path)
    assert report.formats == {"inner": PACKERS[kind][0], "outer": PACKERS[kind][0]}
    assert torch.equal(model.get_submodule("inner").bias, source.get_submodule("inner").bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "format"), [(Int8DynamicActivationInt8WeightConfig, "int8"), (Float8WeightOnlyConfig, "fp8")]
)
def test_configurations(net: Net, tmp_path: Path, config: Any, format: str, dtype: torch.dtype) -> None:
    source, model = net().to(dtype), net(1).to(dtype)
    quantize_(source, config())
    report = load_quantized(model, write(tmp_path, source))
    assert report.formats == {"inner": format, "outer": format}
    for name in report.formats:
        expected, layer = source.get_submodule(name).weight, model.get_submodule(name)
        assert torch.equal(layer.weight_q.view(torch.uint8), expected.qdata.view(torch.uint8))
        assert torch.equal(layer.weight_scale, expected.scale.float())


def test_what_torchao_computes(net: Net, tmp_path: Path) -> None:
    """The whole network: torchao rounds activations too, so the outputs agree as far as int8 does."""
    source, model, x = net(), net(1), torch.randn(32, 64)
    quantize_(source, Int8DynamicActivationInt8WeightConfig())
    load_quantized(model, write(tmp_path, source))
    with torch.no_grad():
        ours, theirs = model(x), source(x)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_another_class_is_refused(net: Net, tmp_path: Path) -> None:
    source = net()
    tensors, metadata = flatten_tensor_state_dict(source.state_dict())
    metadata["inner.weight"] = '{"_type": "Int4Tensor", "_data": {}, "_tensor_data_names": []}'
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"inner\.weight is a torchao Int4Tensor; ditc reads Int8Tensor"):
        load_quantized(net(), tmp_path)


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("nvfp4", '"block_size": 16', '"block_size": 32', "NVFP4 has blocks of 16"),
        ("mxfp8", '"block_size": 32', '"block_size": 16', "in blocks of 16"),
        ("mxfp8", "float8_e4m3fn", "float8_e5m2", "MXTensor of float8_e5m2"),
        ("fp8 rows", '["qdata", "scale"]', '["qdata", "scale", "hadamard"]', "_weight_hadamard is missing"),
        ("fp8 rows", '["qdata", "scale"]', '["qdata"]', "without qdata or scale"),
        ("nvfp4", '"_type": "NVFP4Tensor"', '"type": "NVFP4Tensor"', "does not describe it"),
        ("nvfp4", '"is_swizzled_scales": false', '"is_swizzled_scales": true', "linear by its shape, but swizzled"),
    ],
)
def test_accounts_that_cannot_be_right(net: Net, tmp_path: Path, kind: str, old: str, new: str, message: str) -> None:
    source = net()
    source.inner.weight = nn.Parameter(PACKERS[kind][1](source.inner.weight.detach()), requires_grad=False)
    tensors, metadata = flatten_tensor_state_dict(source.state_dict())
    assert old in metadata["inner.weight"]
    metadata["inner.weight"] = metadata["inner.weight"].replace(old, new)
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(net(), tmp_path)


def test_zero_points_are_refused(net: Net, tmp_path: Path) -> None:
    source = net()
    quantize_(source, Int8DynamicActivationInt8WeightConfig())
    tensors, metadata = flatten_tensor_state_dict(source.state_dict())
    tensors["inner._weight_zero_point"][3] = 1
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="is not zero: ditc reads symmetric quantisation only"):
        load_quantized(net(), tmp_path)
