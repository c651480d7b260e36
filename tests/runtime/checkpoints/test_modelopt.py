"""Against modelopt itself: what its exporter wrote is read, and what ditc wrote runs in modelopt's own layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditc.kernels.formats import FORMATS
from ditc.runtime.checkpoints import QuantizedLinear, load_and_quantize, load_quantized, save_modelopt

pytest.importorskip("modelopt")
pytest.importorskip("diffusers")

import modelopt.torch.quantization as mtq
from diffusers import DiTTransformer2DModel
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

Net = Callable[..., nn.Module]
INPUTS: dict[str, Any] = {
    "hidden_states": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([5, 900]),
    "class_labels": torch.tensor([1, 3]),
}
ALGORITHMS = {
    "FP8": ("fp8", mtq.FP8_DEFAULT_CFG),
    "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG),
    "W8A8_SQ_PER_CHANNEL": ("int8", mtq.INT8_SMOOTHQUANT_CFG),
    "NVFP4": ("nvfp4", mtq.NVFP4_DEFAULT_CFG),
    "NVFP4_AWQ": ("nvfp4", mtq.NVFP4_AWQ_LITE_CFG),
    "NVFP4_SVD": ("nvfp4", mtq.NVFP4_SVDQUANT_DEFAULT_CFG),
    "MXFP8": ("mxfp8", mtq.MXFP8_DEFAULT_CFG),
}


def dit(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=32, in_channels=4, num_layers=1, sample_size=8
        )
        for parameter in model.parameters():  # the defaults leave some of them zero
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**INPUTS).sample
    return output


@pytest.fixture(scope="module", autouse=True)
def blocks_on_cpu() -> Iterator[None]:
    """modelopt rounds to formats with blocks by a CUDA kernel; its own tensor classes do the same on a CPU."""

    def rounded(x: Tensor, block: int, amax: Tensor, *_: Any) -> Tensor:
        values: Tensor
        if block == 32:
            packed, scale = MXFP8QTensor.quantize(x.clone())
            values = packed.dequantize(dtype=x.dtype, scale=scale)
            return values
        packed, scale, outer = NVFP4QTensor.quantize(x.clone(), block, None, amax.float() / (6 * 448))
        values = packed.dequantize(dtype=x.dtype, scale=scale, double_scale=outer, block_sizes={-1: block})
        return values

    patch = pytest.MonkeyPatch()
    patch.setattr(tensor_quant, "dynamic_block_quantize_op", rounded)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``exported(algorithm, **options)``: a folder that modelopt's exporter wrote of ``dit()``."""

    @cache
    def export(algorithm: str, **options: Any) -> Path:
        config = copy.deepcopy(ALGORITHMS[algorithm][1])
        # the exporter smooths q, k and v anew with what is common to them, which no model can be asked for
        alone = ("*to_q*", "*to_k*") if algorithm in ("NVFP4_AWQ", "NVFP4_SVD") else ()
        for name in ("*pos_embed*", "*embedder*", "*proj_out*", *alone):
            config["quant_cfg"].append({"quantizer_name": name, "enable": False})
        folder = tmp_path_factory.mktemp(algorithm)
        model = mtq.quantize(dit(), config, run)
        export_hf_checkpoint(exporting := copy.deepcopy(model), export_dir=folder, **options)
        for name, module in exporting.named_modules():  # the exporter gives q, k and v one range
            if getattr(module, "_amax", None) is not None:
                model.get_submodule(name)._amax.copy_(module._amax)
        torch.save(without_activations(model), folder / "expected.pt")
        return folder

    return export


def without_activations(model: nn.Module) -> Tensor:
    """What modelopt's model computes with weights rounded, inputs smoothed, and activations not rounded."""
    quantizers = [m for name, m in model.named_modules() if name.endswith("input_quantizer") and m.is_enabled]
    for quantizer in quantizers:
        quantizer.disable_quant()
    output = run(model)
    for quantizer in quantizers:
        quantizer.enable_quant()
    return output


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reads_what_modelopt_exports(exported: Callable[..., Path], algorithm: str) -> None:
    folder, model = exported(algorithm), dit(1)
    report = load_quantized(model, folder)
    stored = load_file(folder / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == algorithm and report.producer == "modelopt"
    assert set(report.formats.values()) == {ALGORITHMS[algorithm][0]}
    assert len(report.formats) == sum(name.endswith(".weight_scale") for name in stored) >= 5
    for name in report.formats:
        layer = model.get_submodule(name)
        assert torch.equal(bits(layer.weight_q), bits(stored[f"{name}.weight"]))
        assert ("input_scale" in layer.state_dict()) == (f"{name}.input_scale" in stored)
    expected = torch.load(folder / "expected.pt")
    ours = run(model)
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert (run(dit(0)) - expected).norm() > 1e-3 * expected.norm()  # the rounding is there to be seen


def test_svdquant_has_its_branch(exported: Callable[..., Path]) -> None:
    model = dit(1)
    report = load_quantized(model, exported("NVFP4_SVD"))
    for name in report.formats:
        layer = model.get_submodule(name)
        assert layer.lora_a.shape == (32, layer.in_features) and layer.lora_b.shape == (layer.out_features, 32)
        assert layer.pre_quant_scale is not None


@pytest.mark.parametrize("options", [{"enable_swizzle_layout": True}, {"padding_strategy": "row"}], ids=str)
def test_reads_what_modelopt_post_processes(exported: Callable[..., Path], options: dict[str, Any]) -> None:
    """Swizzled or not shows in the shapes here; the configuration is the same."""
    folder, model = exported("NVFP4", **options), dit(1)
    report = load_quantized(model, folder)
    layout = "swizzled" if "enable_swizzle_layout" in options else "linear"
    assert set(report.layouts.values()) == {f"{layout}, even-low"}
    expected = torch.load(folder / "expected.pt")
    assert (run(model) - expected).norm() < 1e-4 * expected.norm()


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def test_writes_what_it_read_bit_for_bit(exported: Callable[..., Path], tmp_path: Path) -> None:
    """Read, write: the same tensors under the same names, from each of modelopt's exports."""
    for algorithm in ALGORITHMS:
        model = dit(1)
        load_quantized(model, exported(algorithm))
        folder = save_modelopt(model, tmp_path / algorithm)
        theirs = load_file(exported(algorithm) / "diffusion_pytorch_model.safetensors")
        ours = load_file(folder / "diffusion_pytorch_model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
            assert torch.equal(bits(ours[name]), bits(tensor)), name
        written, original = (json.loads((f / "config.json").read_text()) for f in (folder, exported(algorithm)))
        assert written["quantization_config"]["quant_algo"] == algorithm
        assert written["_class_name"] == original["_class_name"] == "DiTTransformer2DModel"


REAL = {"nvfp4": mtq.NVFP4_DEFAULT_CFG, "fp8": mtq.FP8_DEFAULT_CFG, "int8": mtq.INT8_DEFAULT_CFG}


def into_modelopt(tensors: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
    """A model of modelopt's packed layers (``RealQuantLinear``) that holds the stored ``tensors``."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace(".weight_scale_2", ".weight_quantizer._double_scale")
        renamed[name.replace(".weight_scale", ".weight_quantizer._scale")] = tensor
    state = model.state_dict()
    for name, tensor in state.items():
        if "_amax" not in name:
            assert tensor.dtype == renamed[name].dtype
            tensor.data.copy_(renamed[name].reshape(tensor.shape))
    assert {name for name in state if "_amax" not in name} == renamed.keys()
    return model


@pytest.mark.parametrize("format", REAL)
def test_modelopts_layers_run_what_ditc_writes(net: Net, tmp_path: Path, format: str) -> None:
    """ditc quantises and writes; modelopt's own packed layers take the stored tensors and decode them."""
    x, source = torch.randn(16, 64), net()
    torch.save(source.state_dict(), tmp_path / "unused.pt")
    model = quantized(source, format, tmp_path)
    if format == "fp8":  # modelopt's FP8 has one scale a tensor
        for layer in (model.inner, model.outer):
            parts = FORMATS["fp8"].quantize(layer.weight, granularity="tensor")
            layer.weight_q, layer.weight_scale = parts
    folder = save_modelopt(model, tmp_path / "saved")
    theirs = mtq.quantize(net(1), copy.deepcopy(REAL[format]), lambda m: m(x))
    mtq.compress(theirs)
    for name, module in theirs.named_modules():
        if name.endswith("input_quantizer"):
            module.disable()
    into_modelopt(load_file(folder / "diffusion_pytorch_model.safetensors"), theirs)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


def quantized(source: nn.Module, format: str, folder: Path) -> nn.Module:
    from safetensors.torch import save_file

    save_file(dict(source.state_dict()), folder / "plain.safetensors")
    model = copy.deepcopy(source)
    load_and_quantize(model, folder / "plain.safetensors", {"inner": format, "outer": format})
    assert isinstance(model.inner, QuantizedLinear)
    return model
