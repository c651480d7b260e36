"""Loading into models: on the meta device, from shards, folders and files, with ties, into other types; re-encoding."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditc.kernels.formats import FORMATS
from ditc.runtime.checkpoints import (
    CheckpointError,
    QuantizedLinear,
    load_and_quantize,
    load_quantized,
    parameters_on_meta,
    save_modelopt,
)

Net = Callable[..., nn.Module]
Write = Callable[..., Path]
Config = Callable[..., dict[str, Any]]
Tensors = Callable[[nn.Module], dict[str, Tensor]]
Zoo = dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]


@pytest.fixture
def path(net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config) -> Path:
    return write(nvfp4_tensors(net()), modelopt_config("NVFP4"))


def same(one: nn.Module, other: nn.Module) -> None:
    ones, others = one.state_dict(), other.state_dict()
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        assert tensor.dtype == others[name].dtype and tensor.shape == others[name].shape, name
        assert (
            torch.equal(tensor.cpu().view(torch.uint8), others[name].cpu().view(torch.uint8)) if tensor.dim() else True
        )


def test_a_model_on_meta_becomes_the_same(net: Net, path: Path) -> None:
    with parameters_on_meta():
        empty = net(1)
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
    full, x = net(1), torch.randn(3, 64)
    load_quantized(empty, path)
    report = load_quantized(full, path)
    same(empty, full)
    assert torch.equal(empty(x), full(x)) and not any(p.is_meta for p in empty.parameters())
    assert report.formats == {"inner": "nvfp4", "outer": "nvfp4"} and report.plain == 4
    assert report.packed_bytes == sum(part.nbytes for name in report.formats for part in full.get_submodule(name).parts)
    assert "layers 2 nvfp4; 4 tensors as they are" in str(report)


def test_parameters_on_meta_ends(net: Net) -> None:
    with pytest.raises(RuntimeError), parameters_on_meta():
        raise RuntimeError
    assert not any(p.is_meta for p in net().parameters())


def test_other_tensors_take_the_models_type_and_place(net: Net, path: Path) -> None:
    model = net(1).to(torch.bfloat16).train()
    model.norm.weight.requires_grad_(False)
    load_quantized(model, path)
    assert model.norm.weight.dtype == model.inner.bias.dtype == model.table.dtype == torch.bfloat16
    assert not model.norm.weight.requires_grad and model.norm.bias.requires_grad and model.inner.training
    assert model(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_everything_goes_to_the_device(net: Net, path: Path) -> None:
    model = net(1)
    load_quantized(model, path, device="cpu")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_onto_a_gpu(net: Net, path: Path) -> None:
    with parameters_on_meta():
        model = net(1)
    load_quantized(model, path, device="cuda")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    assert bool(model(torch.randn(3, 64, device="cuda")).isfinite().all())


def test_strict_off_reports_what_is_left(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config
) -> None:
    tensors = nvfp4_tensors(net()) | {"extra": torch.zeros(1)}
    del tensors["norm.weight"]
    folder, model = write(tensors, modelopt_config("NVFP4")), net(1)
    kept = model.norm.weight
    report = load_quantized(model, folder, strict=False)
    assert report.unused == ("extra",) and report.missing == ("norm.weight",) and model.norm.weight is kept
    assert "1 keys unused, 1 tensors missing" in str(report)
    del tensors["inner.bias"]
    report = load_quantized(model := net(1), write(tensors, modelopt_config("NVFP4")), strict=False)
    assert report.missing == ("inner.bias", "norm.weight") and torch.equal(model.inner.bias, net(1).inner.bias)
    with parameters_on_meta():
        model = net(1)
    with pytest.raises(CheckpointError, match=r"inner\.bias is missing, and the layer cannot be made without it"):
        load_quantized(model, folder, strict=False)


def test_shards_single_files_and_pipelines(net: Net, path: Path, tmp_path: Path) -> None:
    expected = net(1)
    load_quantized(expected, path)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (path.rename(pipeline / "transformer"))
    load_quantized(model := net(2), pipeline)
    same(model, expected)
    # a file by itself has no config.json: nothing says that the nibbles are modelopt's
    file = pipeline / "transformer" / "model.safetensors"
    with pytest.raises(CheckpointError, match="nibbles="):
        load_quantized(net(2), file)
    load_quantized(model := net(2), file, nibbles="even-low")
    same(model, expected)


def test_shards(net: Net, nvfp4_tensors: Tensors, tmp_path: Path, modelopt_config: Config) -> None:
    tensors, source = nvfp4_tensors(net()), net(1)
    places = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({key: t for key, t in tensors.items() if places[key] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps(modelopt_config("NVFP4")))
    load_quantized(source, tmp_path)
    assert torch.equal(source.inner.weight_q, tensors["inner.weight"])
    assert torch.equal(source.norm.bias, tensors["norm.bias"])


def test_tied_parameters_are_stored_once(write: Write, modelopt_config: Config, tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 16), nn.Embedding(8, 32))
        model[2].weight = model[0].weight
        return model

    source = tied()
    tensors = {k: t for k, t in source.state_dict().items() if k != "2.weight"}
    tensors |= {"1.weight": FORMATS["int8"].quantize(source[1].weight)[0], "1.weight_scale": torch.ones(16)}
    model = tied()
    report = load_quantized(model, write(tensors, modelopt_config("W8A8_SQ_PER_CHANNEL")))
    assert model[2].weight is model[0].weight and torch.equal(model[0].weight, source[0].weight) and not report.missing


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4", "mxfp8"])
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_diffusers_models(zoo: Zoo, tmp_path: Path, name: str, format: str) -> None:
    """Quantise, write, read into an empty model of the written configuration: the same, and close to the first."""
    source, args, kwargs = zoo[name]()
    formats = {n: format for n, m in source.named_modules() if isinstance(m, nn.Linear) and m.in_features % 32 == 0}
    source.save_pretrained(tmp_path / "plain")
    model = copy.deepcopy(source)
    load_and_quantize(model, tmp_path / "plain", formats)
    save_modelopt(model, tmp_path / "saved")
    config = type(source).load_config(tmp_path / "saved")
    with parameters_on_meta():
        loaded = type(source).from_config(config).eval()
    report = load_quantized(loaded, tmp_path / "saved")
    assert report.formats == formats and len(formats) >= 6
    same(loaded, model)
    with torch.no_grad():
        ours, theirs, plain = (m(*args, **kwargs)[0] for m in (loaded, model, source))
    assert torch.equal(ours, theirs)
    limit = {"int8": 0.03, "fp8": 0.1, "mxfp8": 0.1, "nvfp4": 0.4}[format]
    assert 0 < (ours - plain).norm() < limit * plain.norm()


@pytest.mark.parametrize("format", ["int8", "fp8", "nvfp4", "mxfp4", "mxfp8"])
def test_reencoding(net: Net, tmp_path: Path, format: str) -> None:
    """4-bit weights become FP8: MXFP4 exactly, NVFP4 nearly; the rest stays."""
    model = written(net, tmp_path, format)
    plain, other = net(1), net(1)
    read = {"nibbles": "even-low"} if format == "mxfp4" else {}
    load_quantized(plain, model, **read)
    report = load_quantized(other, model, reencode="fp8", **read)
    expected = "fp8" if format in ("nvfp4", "mxfp4") else format
    assert set(report.formats.values()) == {expected}
    one, two = plain.inner.weight, other.inner.weight
    if format == "nvfp4":
        assert 0 < (one - two).norm() < 0.05 * one.norm()
        assert other.inner.input_scale == plain.inner.input_scale * 6
    else:
        assert torch.equal(one, two)


def written(net: Net, folder: Path, format: str) -> Path:
    source = net()
    if format != "mxfp4":
        save_file(source.state_dict(), folder / "plain.safetensors")
        load_and_quantize(source, folder / "plain.safetensors", {"inner": format, "outer": format})
        source.inner.input_scale = torch.tensor(0.25)
        return save_modelopt(source, folder / "saved")
    tensors = {k: t for k, t in source.state_dict().items() if k not in ("inner.weight", "outer.weight")}
    for name in ("inner", "outer"):
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = FORMATS["mxfp4"].quantize(
            source.get_submodule(name).weight.detach()
        )
    save_file(tensors, folder / "mxfp4.safetensors")
    return folder / "mxfp4.safetensors"


def test_an_mxfp4_row_beyond_fp8_is_refused(write: Write) -> None:
    w = torch.ones(4, 64)
    w[2, 32:] = 2.0**-40
    q, scale = FORMATS["mxfp4"].quantize(w)
    folder, model = write({"0.weight": q, "0.weight_scale": scale}), nn.Sequential(nn.Linear(64, 4, bias=False))
    with pytest.raises(CheckpointError, match=r"0\.weight cannot become FP8 without loss: 1 of 4 rows"):
        load_quantized(model, folder, nibbles="even-low", reencode="fp8")
    load_quantized(model, folder, nibbles="even-low")
    assert isinstance(model[0], QuantizedLinear) and torch.equal(model[0].weight, w)
