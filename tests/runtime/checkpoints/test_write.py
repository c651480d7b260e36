"""Writing modelopt's layout: names, configuration, what has no such layout, files that appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditc.runtime.checkpoints import CheckpointError, QuantizedLinear, load_and_quantize, load_quantized, save_modelopt

Net = Callable[..., nn.Module]
Quantized = Callable[..., nn.Module]


@pytest.fixture
def quantized(net: Net, tmp_path: Path) -> Quantized:
    """``quantized(inner="int8", outer="int8")``: a network with these layers quantised."""

    def make(**formats: str) -> nn.Module:
        save_file(net().state_dict(), tmp_path / "plain.safetensors")
        model = net(1)
        load_and_quantize(model, tmp_path / "plain.safetensors", formats)
        return model

    return make


def saved(model: nn.Module, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    save_modelopt(model, folder)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "diffusion_pytorch_model.safetensors"), config["quantization_config"]


@pytest.mark.parametrize(
    ("format", "algorithm", "stored"),
    [
        ("int8", "W8A8_SQ_PER_CHANNEL", {"weight": (torch.int8, (96, 64)), "weight_scale": (torch.float32, (96,))}),
        (
            "fp8",
            "FP8_PER_CHANNEL_PER_TOKEN",
            {"weight": (torch.float8_e4m3fn, (96, 64)), "weight_scale": (torch.float32, (96,))},
        ),
        ("mxfp8", "MXFP8", {"weight": (torch.float8_e4m3fn, (96, 64)), "weight_scale": (torch.uint8, (96, 2))}),
        (
            "nvfp4",
            "NVFP4",
            {
                "weight": (torch.uint8, (96, 32)),
                "weight_scale": (torch.float8_e4m3fn, (96, 4)),
                "weight_scale_2": (torch.float32, ()),
            },
        ),
    ],
)
def test_names_and_types(
    quantized: Quantized, tmp_path: Path, format: str, algorithm: str, stored: dict[str, Any]
) -> None:
    tensors, config = saved(quantized(inner=format), tmp_path / "saved")
    found = {k.removeprefix("inner."): (t.dtype, tuple(t.shape)) for k, t in tensors.items() if k.startswith("inner.")}
    assert found == stored | {"bias": (torch.float32, (96,))}
    assert config["quant_algo"] == algorithm and config["quant_method"] == "modelopt" and config["ignore"] == ["outer"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"]


def test_one_fp8_scale_for_the_tensor_is_modelopts_fp8(quantized: Quantized, tmp_path: Path) -> None:
    model = quantized(inner="fp8")
    model.inner.weight_scale.fill_(0.5)
    model.inner.input_scale = torch.tensor(0.25)
    tensors, config = saved(model, tmp_path / "saved")
    assert config["quant_algo"] == "FP8" and not config["config_groups"]["group_0"]["input_activations"]["dynamic"]
    assert tensors["inner.weight_scale"].shape == () and tensors["inner.weight_scale"] == 0.5
    assert tensors["inner.input_scale"] == 0.25


@pytest.mark.parametrize("branch", [True, False])
def test_smoothing_and_branch(quantized: Quantized, tmp_path: Path, branch: bool) -> None:
    model = quantized(inner="nvfp4")
    sides = {"pre_quant_scale": torch.rand(64) + 0.5}
    if branch:
        sides |= {"lora_a": torch.randn(8, 64), "lora_b": torch.randn(96, 8)}
    model.inner = QuantizedLinear(model.inner.parts, "nvfp4", model.inner.bias, **sides)
    tensors, config = saved(model, tmp_path / "saved")
    group = config["config_groups"]["group_0"]
    assert config["quant_algo"] == ("NVFP4_SVD" if branch else "NVFP4_AWQ") and group["pre_quant_scale"]
    assert group.get("lora_rank") == (8 if branch else None)
    assert torch.equal(tensors["inner.pre_quant_scale"], sides["pre_quant_scale"])
    assert ("inner.svdquant_lora_a" in tensors) == ("inner.svdquant_lora_b" in tensors) == branch


def test_several_formats_are_mixed_precision(net: Net, quantized: Quantized, tmp_path: Path) -> None:
    model = quantized(inner="nvfp4", outer="int8")
    _, config = saved(model, tmp_path / "saved")
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == {
        "inner": {"quant_algo": "NVFP4", "group_size": 16},
        "outer": {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
    }
    assert [group["targets"] for group in config["config_groups"].values()] == [["inner"], ["outer"]]
    report = load_quantized(other := net(2), tmp_path / "saved")
    assert report.formats == {"inner": "nvfp4", "outer": "int8"}
    x = torch.randn(4, 64)
    assert torch.equal(other(x), model(x))


def test_the_model_is_left_alone_and_ties_are_written_twice(quantized: Quantized, tmp_path: Path) -> None:
    model = quantized(inner="int8")
    model.norm.bias = model.norm.weight
    model.norm.weight.data = torch.arange(192.0)[::2]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    tensors, _ = saved(model, tmp_path / "saved")
    assert torch.equal(tensors["norm.weight"], torch.arange(192.0)[::2]) and torch.equal(
        tensors["norm.weight"], tensors["norm.bias"]
    )
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_modelopt_has_no_layout_for(net: Net, quantized: Quantized, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    with pytest.raises(CheckpointError, match="no layer of the model is quantised"):
        save_modelopt(net(), folder)
    with pytest.raises(CheckpointError, match="inner is mxfp4, for which modelopt has no layout"):
        save_modelopt(quantized(inner="mxfp4"), folder)
    model = quantized(inner="nvfp4")
    model.inner.weight_outer[3] *= 2
    with pytest.raises(CheckpointError, match="inner has an outer scale per row"):
        save_modelopt(model, folder)
    for format in ("int8", "fp8", "mxfp8"):
        model = quantized(inner=format)
        branch = {"lora_a": torch.ones(2, 64), "lora_b": torch.ones(96, 2)}
        model.inner = QuantizedLinear(model.inner.parts, format, **branch)
        with pytest.raises(CheckpointError, match=f"inner is {format} with a branch of low rank"):
            save_modelopt(model, folder)
    model.inner = QuantizedLinear(model.inner.parts, "mxfp8", pre_quant_scale=torch.ones(64))
    with pytest.raises(CheckpointError, match="inner is mxfp8 with pre_quant_scale"):
        save_modelopt(model, folder)
    with pytest.raises(CheckpointError, match="on the meta device: there is nothing to save"):
        save_modelopt(quantized(inner="int8").to("meta"), folder)
    assert not folder.exists()


def test_replaces_an_earlier_save_and_nothing_else(quantized: Quantized, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    saved(quantized(inner="int8"), folder)
    (folder / "README.md").write_text("kept")
    assert (folder / "diffusion_pytorch_model.safetensors").stat().st_mode == (folder / "README.md").stat().st_mode
    assert saved(quantized(inner="nvfp4"), folder)[1]["quant_algo"] == "NVFP4"
    assert {p.name for p in folder.iterdir()} == {"README.md", "config.json", "diffusion_pytorch_model.safetensors"}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"another checkpoint \(diffusion_pytorch_model.safetensors.index.json\)"):
        save_modelopt(quantized(inner="int8"), folder)
    with pytest.raises(CheckpointError, match="is no folder"):
        save_modelopt(quantized(inner="int8"), folder / "README.md")


def test_a_failed_write_leaves_what_was_there(
    quantized: Quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    before = saved(quantized(inner="int8"), folder)

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half a file")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            save_modelopt(small(), target)
    monkeypatch.undo()
    assert not (tmp_path / "new").exists() and {p.name for p in tmp_path.iterdir()} == {"saved", "plain.safetensors"}
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, before[0][k]) for k, t in tensors.items())


def small() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 8))
    model[0] = QuantizedLinear([torch.ones(8, 64, dtype=torch.int8), torch.ones(8, 1)], "int8")
    return model
