"""What must not be loaded is refused, with a message that says why, and the model stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditc.runtime.checkpoints import CheckpointError, load_quantized

Net = Callable[..., nn.Module]
Write = Callable[..., Path]
Config = Callable[..., dict[str, Any]]
Tensors = Callable[[nn.Module], dict[str, Tensor]]


def refused(model: nn.Module, path: Path, message: str, **options: Any) -> None:
    """Loading raises, and changes nothing in the model: same modules, same tensors, same values."""
    modules = list(model.modules())
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(CheckpointError, match=message):
        load_quantized(model, path, **options)
    after = model.state_dict(keep_vars=True)
    assert list(model.modules()) == modules and after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner.weight_scale": None}, r"inner\.weight .*inner\.weight_scale is missing"),
        ({"outer.weight_scale_2": None}, r"outer\.weight_scale_2 is missing"),
        ({"inner.bias": None}, r"nothing for 1 tensors of the model: inner\.bias"),
        ({"norm.weight": None, "table": None}, r"nothing for 2 tensors of the model: norm\.weight, table"),
        ({"extra.weight": torch.zeros(3)}, r"no module takes 1 tensors of the checkpoint: extra\.weight"),
        ({"inner.k_scale": torch.ones(())}, r"no module takes .*inner\.k_scale"),
        ({"inner.weight_scale": torch.ones(96, 3).to(torch.float8_e4m3fn)}, "in no layout"),
        ({"inner.weight_scale": torch.ones(96, 4)}, "no format that ditc knows"),
        ({"inner.weight": torch.zeros(95, 32, dtype=torch.uint8)}, "in no layout"),
        ({"inner.weight": torch.zeros(96, 32, dtype=torch.int8)}, "no format that ditc knows"),
        ({"inner.weight_scale_2": torch.ones(2)}, "one float32 number is wanted"),
        ({"inner.weight_scale_2": torch.ones((), dtype=torch.float16)}, "one float32 number is wanted"),
        ({"inner.weight_scale_2": torch.tensor(0.0)}, "zero or negative"),
        ({"inner.weight_scale_2": torch.tensor(-1.0)}, "zero or negative"),
        ({"inner.weight_scale_2": torch.tensor(float("nan"))}, "NaN"),
        ({"inner.input_scale": torch.tensor(float("inf"))}, r"inner\.input_scale holds NaN or infinity"),
        ({"inner.input_scale": torch.ones(3)}, r"inner\.input_scale .*does not fit"),
        ({"inner.input_scale": torch.ones((), dtype=torch.int32)}, "floating point"),
        ({"inner.pre_quant_scale": torch.zeros(64)}, r"inner\.pre_quant_scale is zero or negative"),
        ({"inner.svdquant_lora_a": torch.ones(4, 64)}, "one half of a branch"),
        ({"inner.svdquant_lora_a": torch.ones(4, 64), "inner.svdquant_lora_b": torch.ones(96, 3)}, "does not fit"),
        ({"norm.weight": torch.zeros(97)}, r"norm\.weight .*does not fit"),
        ({"norm.weight": torch.zeros(96, dtype=torch.int32)}, "is no torch.float32"),
        ({"norm.weight": torch.zeros(96).to(torch.float8_e4m3fn)}, "norm.weight_scale is missing"),
        ({"inner.bias": torch.zeros(96).to(torch.float8_e4m3fn)}, "looks quantised"),
        ({"norm.weight": torch.zeros(96, dtype=torch.uint8), "norm.weight_scale": torch.ones(6, 4)}, "no format"),
    ],
)
def test_wrong_tensors(
    net: Net,
    nvfp4_tensors: Tensors,
    write: Write,
    modelopt_config: Config,
    change: dict[str, Tensor | None],
    message: str,
) -> None:
    model = net()
    tensors = nvfp4_tensors(model) | change
    path = write({k: t for k, t in tensors.items() if t is not None}, modelopt_config("NVFP4"))
    refused(model, path, message)


@pytest.mark.parametrize("bits", [0x00, 0x7F, 0xFF, 0x80, 0xB8])
def test_block_scales_that_no_quantiser_writes(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config, bits: int
) -> None:
    tensors = nvfp4_tensors(net())
    tensors["inner.weight_scale"].view(torch.uint8)[3, 1] = bits
    refused(net(), write(tensors, modelopt_config("NVFP4")), "zero, negative or no number")


def test_a_block_scale_of_zero_over_codes_of_zero_is_a_block_of_zeros(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config
) -> None:
    tensors, model = nvfp4_tensors(net()), net()
    tensors["inner.weight_scale"].view(torch.uint8)[3, 1] = 0
    tensors["inner.weight"][3, 8:16] = torch.tensor([0x00, 0x08, 0x80, 0x88, 0, 0, 0, 0], dtype=torch.uint8)
    load_quantized(model, write(tensors, modelopt_config("NVFP4")))
    assert torch.all(model.get_submodule("inner").weight[3, 16:32] == 0)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_no_number(net: Net, write: Write, modelopt_config: Config, code: int) -> None:
    tensors = dict(net().state_dict())
    q = torch.ones(96, 64).to(torch.float8_e4m3fn)
    q.view(torch.uint8)[5, 7] = code
    tensors |= {"inner.weight": q, "inner.weight_scale": torch.ones(())}
    refused(net(), write(tensors, modelopt_config("FP8")), r"inner\.weight holds codes that are no number")


def test_mx_scales_that_are_no_number(net: Net, write: Write, modelopt_config: Config) -> None:
    tensors = dict(net().state_dict())
    scale = torch.full((96, 2), 127, dtype=torch.uint8)
    scale[0, 1] = 255
    tensors |= {"inner.weight": torch.ones(96, 64).to(torch.float8_e4m3fn), "inner.weight_scale": scale}
    refused(net(), write(tensors, modelopt_config("MXFP8")), "scales that are no number")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "'W4A16_AWQ' is unknown; ditc reads NVFP4,"),
        ({"quant_method": "modelopt"}, "None is unknown"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, r"say that inner is fp8, but .* is nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "lists no quantized_layers"),
        ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'; ditc reads modelopt's"),
        ({"quant_method": "gguf"}, "quantised by 'gguf'"),
        ([], "is no object"),
    ],
)
def test_foreign_quantisers(net: Net, nvfp4_tensors: Tensors, write: Write, config: Any, message: str) -> None:
    refused(net(), write(nvfp4_tensors(net()), {"quantization_config": config}), message)


def test_mixed_precision_that_says_another_thing(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config
) -> None:
    tensors = nvfp4_tensors(net())
    layers = {"inner": {"quant_algo": "NVFP4"}}
    config = modelopt_config("MIXED_PRECISION", quantized_layers=layers)
    refused(net(), write(tensors, config), "say that outer is not quantised")
    layers |= {"outer": {"quant_algo": "NVFP4"}, "norm": {"quant_algo": "NVFP4"}}
    refused(
        net(), write(tensors, config | modelopt_config("MIXED_PRECISION", quantized_layers=layers)), "norm is nvfp4"
    )


def test_a_checkpoint_in_full_precision(net: Net, write: Write) -> None:
    refused(net(), write(net().state_dict()), "no layer .* is quantised; load_and_quantize reads")


def test_a_module_that_is_no_linear_layer(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config
) -> None:
    path = write(nvfp4_tensors(net()), modelopt_config("NVFP4"))
    model = net()
    model.inner = nn.Conv1d(64, 96, 1)
    refused(model, path, "inner is a Conv1d; only linear layers")
    refused(nn.Sequential(nn.Linear(64, 96)), path, "inner is quantised in the checkpoint, and Sequential has none")


def test_a_k_that_the_format_does_not_admit(write: Write, modelopt_config: Config) -> None:
    tensors = {"0.weight": torch.zeros(16, 12, dtype=torch.uint8), "0.weight_scale_2": torch.ones(())}
    tensors["0.weight_scale"] = torch.ones(16, 1).to(torch.float8_e4m3fn)
    refused(nn.Sequential(nn.Linear(24, 16, bias=False)), write(tensors, modelopt_config("NVFP4")), "K = 24")


def test_a_model_that_is_quantised_already(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config
) -> None:
    path, model = write(nvfp4_tensors(net()), modelopt_config("NVFP4")), net()
    load_quantized(model, path)
    with pytest.raises(CheckpointError, match="inner is a QuantizedLinear"):
        load_quantized(model, path)


def test_a_buffer_on_meta_that_no_checkpoint_holds(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config
) -> None:
    path, model = write(nvfp4_tensors(net()), modelopt_config("NVFP4")), net().to("meta")
    with pytest.raises(CheckpointError, match="positions; make it within parameters_on_meta"):
        load_quantized(model, path)


@pytest.mark.parametrize(
    "options", [{"scale_layout": "rows"}, {"nibbles": "low"}, {"reencode": "int8"}], ids=lambda o: next(iter(o))
)
def test_unknown_options(net: Net, nvfp4_tensors: Tensors, write: Write, options: dict[str, str]) -> None:
    refused(net(), write(nvfp4_tensors(net())), f"{next(iter(options))} is one of", **options)


# files


@pytest.fixture
def folder(net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config) -> Path:
    return write(nvfp4_tensors(net()), modelopt_config("NVFP4"))


@pytest.mark.parametrize("cut", [1, 100, 5000, 10_000])
def test_truncated(net: Net, folder: Path, cut: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    refused(net(), folder, "truncated")


def test_longer_than_its_header_says(net: Net, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    refused(net(), folder, "longer than its header says")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, or no safetensors file: 0 bytes"),
        (b"PK\x03\x04 a zip archive, as torch.save writes", "truncated, or no safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "header of .* cannot be read"),
        (b"\x02\0\0\0\0\0\0\0{]", "header of .* cannot be read"),
        (b'\x0d\0\0\0\0\0\0\0{"a": {"x":1}}', "cannot be read"),
    ],
)
def test_no_safetensors_file(net: Net, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    refused(net(), file, message)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}, "type F4, which torch cannot read"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}, "has 8 bytes, which is not F32"),
    ],
)
def test_headers_that_make_no_sense(net: Net, tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(entry["data_offsets"][1]))
    refused(net(), file, message)


def test_folders_without_one_checkpoint(net: Net, folder: Path, tmp_path: Path) -> None:
    refused(net(), tmp_path / "nowhere", "neither a safetensors file nor a folder")
    (tmp_path / "empty").mkdir()
    refused(net(), tmp_path / "empty", "no safetensors file")
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    refused(net(), folder, "several safetensors files and no index")
    (folder / "config.json").write_text("{")
    refused(net(), folder, "cannot be read as JSON")


@pytest.fixture
def shards(net: Net, nvfp4_tensors: Tensors, tmp_path: Path, modelopt_config: Config) -> Path:
    folder, tensors = tmp_path / "shards", nvfp4_tensors(net())
    folder.mkdir()
    places = {key: f"model-{1 + key.startswith('outer')}-of-2.safetensors" for key in tensors}
    for file in set(places.values()):
        save_file({key: t for key, t in tensors.items() if places[key] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(modelopt_config("NVFP4")))
    return folder


def test_a_shard_is_missing(net: Net, shards: Path) -> None:
    (shards / "model-2-of-2.safetensors").unlink()
    refused(net(), shards, "lists model-2-of-2.safetensors, missing beside it")


def test_shards_that_contradict_their_index(net: Net, shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"gone": "model-1-of-2.safetensors"}}))
    refused(net(), shards, "gone should be in model-1-of-2.safetensors and is in no file")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in places.items() if k != "inner.bias"}}))
    refused(net(), shards, "inner.bias should be in no file and is in model-1-of-2.safetensors")
    index.write_text(json.dumps({"weight_map": {}}))
    refused(net(), shards, "has no weight_map")
    index.write_text(json.dumps({"weight_map": places}))
    (shards / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    refused(net(), shards, "several indices")


def test_a_key_in_two_shards(net: Net, shards: Path) -> None:
    save_file({"inner.bias": torch.zeros(96)}, shards / "model-2-of-2.safetensors")
    refused(net(), shards, "stored twice")
