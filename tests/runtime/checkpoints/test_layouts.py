"""Which way scales and 4-bit codes lie: found from metadata, from shapes, from the caller, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditc.runtime.checkpoints import CheckpointError, QuantizedLinear, load_quantized

Net = Callable[..., nn.Module]
Write = Callable[..., Path]
Config = Callable[..., dict[str, Any]]
Tensors = Callable[[nn.Module], dict[str, Tensor]]
Swizzled = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], dict[str, Tensor]]

COMFY = {"format_version": "1.0", "layers": {name: {"format": "nvfp4"} for name in ("inner", "outer")}}
ONE_READING, TWO_READINGS = 96, 128  # rows of ``inner``: 128 x 4 scales look the same swizzled


def as_comfy(tensors: dict[str, Tensor], swizzled: Swizzled) -> dict[str, Tensor]:
    """The same weights as ComfyUI stores them."""
    found = dict(tensors)
    for name in ("inner", "outer"):
        q = found[f"{name}.weight"]
        found[f"{name}.weight"] = q >> 4 | q << 4
        found[f"{name}.weight_scale"] = swizzled(found[f"{name}.weight_scale"])
    return found


def check(model: nn.Module, source: nn.Module, pack: Pack) -> None:
    for name in ("inner", "outer"):
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear) and layer.format == "nvfp4"
        expected = pack(source.get_submodule(name).weight.detach())["values"]
        torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=0)


def test_modelopt_says_rows_and_low(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config, pack: Pack
) -> None:
    source, model = net(0, TWO_READINGS), net(1, TWO_READINGS)
    report = load_quantized(model, write(nvfp4_tensors(source), modelopt_config("NVFP4")))
    check(model, source, pack)
    assert report.producer == "modelopt" and set(report.layouts.values()) == {"linear, even-low"}


@pytest.mark.parametrize("hidden", [ONE_READING, TWO_READINGS])
@pytest.mark.parametrize("marked", ["header", "tensors"])
def test_comfy_says_swizzled_and_high(
    net: Net, nvfp4_tensors: Tensors, write: Write, swizzled: Swizzled, pack: Pack, hidden: int, marked: str
) -> None:
    source, model = net(0, hidden), net(1, hidden)
    tensors = as_comfy(nvfp4_tensors(source), swizzled)
    entry = {"format": "nvfp4", "full_precision_matrix_mult": True}
    if marked == "tensors":
        text = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
        tensors |= {"inner.comfy_quant": text, "outer.comfy_quant": text.clone()}
    metadata = {"_quantization_metadata": COMFY} if marked == "header" else None
    report = load_quantized(model, write(tensors, metadata=metadata))
    check(model, source, pack)
    assert report.producer == "comfy" and set(report.layouts.values()) == {"swizzled, even-high"}


def test_padding_rows_are_dropped(write: Write, swizzled: Swizzled, pack: Pack) -> None:
    w = torch.randn(40, 32)
    padded = pack(torch.cat([w, torch.zeros(8, 32)]))
    layers = {"_quantization_metadata": {"layers": {"0": {"format": "nvfp4"}}}}
    tensors = {"0.weight": padded["q"] >> 4 | padded["q"] << 4, "0.weight_scale": swizzled(padded["scale"])}
    tensors["0.weight_scale_2"] = padded["outer"]
    model = nn.Sequential(nn.Linear(32, 40, bias=False))
    load_quantized(model, write(tensors, metadata=layers))
    torch.testing.assert_close(model[0].weight, padded["values"][:40], rtol=1e-6, atol=0)
    tensors["0.weight"][45, 3] = 1
    with pytest.raises(CheckpointError, match="rows beyond 40 that are not padding"):
        load_quantized(nn.Sequential(nn.Linear(32, 40, bias=False)), write(tensors, metadata=layers))


@pytest.mark.parametrize(
    "shape", [(128, 8), (1024,), (32, 32), (2, 32, 16)], ids=["padded", "flat", "torchao", "tiles"]
)
def test_the_shape_shows_swizzling(
    net: Net, nvfp4_tensors: Tensors, write: Write, swizzled: Swizzled, pack: Pack, shape: tuple[int, ...]
) -> None:
    source, model = net(), net(1)
    tensors = nvfp4_tensors(source)
    tensors["outer.weight_scale"] = swizzled(tensors["outer.weight_scale"]).reshape(shape)
    tensors["inner.weight_scale"] = swizzled(tensors["inner.weight_scale"])
    report = load_quantized(model, write(tensors), nibbles="even-low")
    check(model, source, pack)
    assert report.layouts["outer"] == "swizzled, even-low"


def test_the_shape_shows_rows(net: Net, nvfp4_tensors: Tensors, write: Write, pack: Pack) -> None:
    source, model = net(), net(1)
    report = load_quantized(model, write(nvfp4_tensors(source)), nibbles="even-low")
    check(model, source, pack)
    assert report.producer == "unknown" and report.layouts["inner"] == "linear, even-low"


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_one_layer_speaks_for_the_others(
    net: Net, nvfp4_tensors: Tensors, write: Write, swizzled: Swizzled, pack: Pack, layout: str
) -> None:
    source, model = net(0, TWO_READINGS), net(1, TWO_READINGS)  # ``outer`` has 48 rows, which admit one reading
    tensors = nvfp4_tensors(source)
    if layout == "swizzled":
        tensors |= {f"{n}.weight_scale": swizzled(tensors[f"{n}.weight_scale"]) for n in ("inner", "outer")}
    report = load_quantized(model, write(tensors), nibbles="even-low")
    check(model, source, pack)
    assert report.layouts["inner"] == f"{layout}, even-low"


@pytest.fixture
def undecided(pack: Pack, write: Write, swizzled: Swizzled) -> Callable[..., tuple[Path, Tensor]]:
    """A file with one layer of 128 x 64 and no metadata, and the values that it holds."""

    def make(layout: str, **more: Any) -> tuple[Path, Tensor]:
        parts = pack(torch.randn(128, 64, generator=torch.Generator().manual_seed(3)))
        scale = swizzled(parts["scale"]) if layout == "swizzled" else parts["scale"]
        tensors = {"0.weight": parts["q"], "0.weight_scale": scale, "0.weight_scale_2": parts["outer"]}
        return write(tensors, **more), parts["values"]

    return make


@pytest.mark.parametrize("layout", ["linear", "swizzled"])
def test_ambiguity_is_refused_until_the_caller_decides(
    undecided: Callable[..., tuple[Path, Tensor]], layout: str
) -> None:
    path, values = undecided(layout)
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    with pytest.raises(
        CheckpointError, match=r"128 x 4 scales in rows \(linear\).*no other layer decides.*scale_layout="
    ):
        load_quantized(model, path)
    with pytest.raises(CheckpointError, match=r"low nibble \(modelopt, torchao\) or in the high one.*nibbles="):
        load_quantized(model, path, scale_layout=layout)
    load_quantized(model, path, scale_layout=layout, nibbles="even-low")
    torch.testing.assert_close(model[0].weight, values, rtol=1e-6, atol=0)


def test_the_readings_differ(undecided: Callable[..., tuple[Path, Tensor]]) -> None:
    """What the refusal is for: each wrong reading loads without complaint and means other weights."""
    path, values = undecided("linear")
    for options in (
        {"scale_layout": "swizzled", "nibbles": "even-low"},
        {"scale_layout": "linear", "nibbles": "even-high"},
    ):
        model = nn.Sequential(nn.Linear(64, 128, bias=False))
        load_quantized(model, path, **options)
        assert (model[0].weight - values).norm() > 0.1 * values.norm()


def test_modelopts_swizzling_leaves_only_a_copy_in_the_header(
    undecided: Callable[..., tuple[Path, Tensor]], modelopt_config: Config
) -> None:
    config = modelopt_config("NVFP4")
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    path, values = undecided("swizzled", config=config, metadata={"quantization_config": config["quantization_config"]})
    with pytest.raises(CheckpointError, match="scale_layout="):
        load_quantized(model, path)
    load_quantized(model, path, scale_layout="swizzled")
    torch.testing.assert_close(model[0].weight, values, rtol=1e-6, atol=0)


def test_two_accounts_of_one_file_leave_the_nibbles_open(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config, pack: Pack
) -> None:
    config = modelopt_config("NVFP4")
    metadata = {"quantization_config": config["quantization_config"], "_quantization_metadata": COMFY}
    source, model = net(), net(1)
    path = write(nvfp4_tensors(source), config, metadata)
    with pytest.raises(CheckpointError, match="nibbles="):
        load_quantized(model, path)
    load_quantized(model, path, nibbles="even-low")
    check(model, source, pack)


@pytest.mark.parametrize("swapped", [True, False])
def test_sglangs_addition_to_the_configuration(
    net: Net, nvfp4_tensors: Tensors, write: Write, modelopt_config: Config, pack: Pack, swapped: bool
) -> None:
    source, model = net(), net(1)
    tensors = nvfp4_tensors(source)
    if swapped:
        tensors |= {
            f"{n}.weight": tensors[f"{n}.weight"] >> 4 | tensors[f"{n}.weight"] << 4 for n in ("inner", "outer")
        }
    load_quantized(model, write(tensors, modelopt_config("NVFP4", swap_weight_nibbles=swapped)))
    check(model, source, pack)


def test_contradictions_are_refused(
    net: Net, nvfp4_tensors: Tensors, write: Write, swizzled: Swizzled, modelopt_config: Config
) -> None:
    tensors = nvfp4_tensors(net())
    both = tensors | {"inner.weight_scale": swizzled(tensors["inner.weight_scale"])}
    with pytest.raises(CheckpointError, match="swizzled by its shape, but linear by the metadata"):
        load_quantized(net(), write(both, modelopt_config("NVFP4")))
    with pytest.raises(CheckpointError, match="linear by its shape, but swizzled by the keyword"):
        load_quantized(net(), write(tensors, modelopt_config("NVFP4")), scale_layout="swizzled")


def test_layers_that_contradict_each_other(write: Write, swizzled: Swizzled, pack: Pack) -> None:
    tensors: dict[str, Tensor] = {}
    for i, (rows, swizzle) in enumerate(((48, True), (48, False), (128, False))):
        parts = pack(torch.randn(rows, 64))
        scale = swizzled(parts["scale"]) if swizzle else parts["scale"]
        tensors |= {f"{i}.weight": parts["q"], f"{i}.weight_scale": scale, f"{i}.weight_scale_2": parts["outer"]}
    model = nn.Sequential(*(nn.Linear(64, rows, bias=False) for rows in (48, 48, 128)))
    with pytest.raises(CheckpointError, match="the layers 1 and 0 contradict each other"):
        load_quantized(model, write(tensors), nibbles="even-low")


@pytest.mark.parametrize(
    ("account", "message"),
    [
        ({"layers": {"inner": {"format": "int8_tensorwise"}}}, r"stored as .*int8_tensorwise.*ditc reads nvfp4"),
        ({"layers": {"inner": {"format": "nvfp4", "convrot": True}}}, "convrot = True, which ditc does not know"),
        ({"layers": {"inner": {"format": "nvfp4"}}}, "say that outer is not quantised"),
        ({"layers": {"inner": {"format": "nvfp4"}, "outer": {"format": "mxfp8"}}}, "say that outer is mxfp8"),
        (
            {"layers": {"inner": {"format": "nvfp4"}, "outer": {"format": "nvfp4"}, "x": {"format": "nvfp4"}}},
            "x is nvfp4",
        ),
        ({"layers": []}, "list no layers"),
        ("{", "is no JSON"),
    ],
)
def test_accounts_that_ditc_does_not_believe(
    net: Net, nvfp4_tensors: Tensors, write: Write, account: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_quantized(net(), write(nvfp4_tensors(net()), metadata={"_quantization_metadata": account}))


def test_comfys_fp8_and_mxfp8(write: Write, swizzled: Swizzled) -> None:
    torchao = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    w = torch.randn(48, 64)
    mx = torchao.MXTensor.to_mx(w, torch.float8_e4m3fn, block_size=32)
    scale = w.abs().max() / 448
    tensors = {
        "0.weight": (w / scale).to(torch.float8_e4m3fn),
        "0.weight_scale": scale,
        "0.input_scale": torch.tensor(0.1),
    }
    tensors |= {"1.weight": mx.qdata, "1.weight_scale": swizzled(mx.scale.view(torch.uint8))}
    account = {"layers": {"0": {"format": "float8_e4m3fn"}, "1": {"format": "mxfp8"}}}
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False))
    load_quantized(model, write(tensors, metadata={"_quantization_metadata": account}))
    torch.testing.assert_close(model[0].weight, tensors["0.weight"].float() * scale)
    assert model[0].input_scale == torch.tensor(0.1)
    assert torch.equal(model[1].weight, mx.dequantize(torch.float32))


def test_comfy_kitchen_agrees(write: Write) -> None:
    """The library that ComfyUI reads and writes these files with."""
    kitchen = pytest.importorskip("comfy_kitchen")
    w = torch.randn(144, 64)
    q, scale = kitchen.quantize_nvfp4(w, w.abs().max() / 2688)
    tensors = {"0.weight": q, "0.weight_scale": scale, "0.weight_scale_2": w.abs().max() / 2688}
    model = nn.Sequential(nn.Linear(64, 144, bias=False))
    load_quantized(model, write(tensors, metadata={"_quantization_metadata": {"layers": {"0": {"format": "nvfp4"}}}}))
    expected = kitchen.dequantize_nvfp4(q, w.abs().max() / 2688, scale, torch.float32)
    torch.testing.assert_close(model[0].weight, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("prefixed", [True, False])
def test_other_names(
    net: Net, nvfp4_tensors: Tensors, write: Write, swizzled: Swizzled, pack: Pack, prefixed: bool
) -> None:
    """ComfyUI's whole-model files put a prefix before the keys, and only some before the names in the header."""
    source, model, prefix = net(), net(1), "model.diffusion_model."
    tensors = {f"{prefix}{k}": t for k, t in as_comfy(nvfp4_tensors(source), swizzled).items()}
    layers = {f"{prefix if prefixed else ''}{name}": entry for name, entry in COMFY["layers"].items()}
    path = write(tensors, metadata={"_quantization_metadata": {"layers": layers}})
    with pytest.raises(CheckpointError):
        load_quantized(model, path)
    load_quantized(model, path, rename=lambda key: key.removeprefix(prefix))
    check(model, source, pack)
    assert torch.equal(model.norm.bias, source.norm.bias)
    with pytest.raises(CheckpointError, match="are both renamed to x"):
        load_quantized(net(1), path, rename=lambda key: "x")
