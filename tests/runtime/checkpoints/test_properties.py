"""Properties of the reader: every layout of every shape means the same, and no damage ends in another error."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ditc.runtime.checkpoints import CheckpointError, QuantizedLinear, load_quantized, save_modelopt

Swizzled = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor], dict[str, Tensor]]


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 150),
    blocks=st.integers(1, 9),
    layout=st.sampled_from(["linear", "swizzled"]),
    nibbles=st.sampled_from(["even-low", "even-high"]),
    exponent=st.integers(-30, 30),
)
def test_every_layout_means_the_same(
    pack: Pack, swizzled: Swizzled, N: int, blocks: int, layout: str, nibbles: str, exponent: int
) -> None:
    w = torch.randn(N, 16 * blocks, generator=torch.Generator().manual_seed(N)) * 2.0**exponent
    parts = pack(w)
    q = parts["q"] if nibbles == "even-low" else parts["q"] >> 4 | parts["q"] << 4
    scale = parts["scale"] if layout == "linear" else swizzled(parts["scale"])
    model = nn.Sequential(nn.Linear(16 * blocks, N, bias=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({"0.weight": q, "0.weight_scale": scale, "0.weight_scale_2": parts["outer"]}, path)
        load_quantized(model, path, scale_layout=layout, nibbles=nibbles)
        layer = model[0]
        assert isinstance(layer, QuantizedLinear) and torch.equal(layer.weight_q, parts["q"])
        assert torch.equal(layer.weight_scale.view(torch.uint8), parts["scale"].view(torch.uint8))
        torch.testing.assert_close(layer.weight, parts["values"], rtol=1e-6, atol=0)
        again = nn.Sequential(nn.Linear(16 * blocks, N, bias=False))
        load_quantized(again, save_modelopt(model, Path(folder) / "saved"))
        assert torch.equal(again[0].weight, layer.weight)


def whole_file(pack: Pack) -> bytes:
    parts = pack(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)))
    tensors = {"0.weight": parts["q"], "0.weight_scale": parts["scale"], "0.weight_scale_2": parts["outer"]}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return save(tensors | {"0.bias": torch.zeros(40)}, {"quantization_config": json.dumps(config)})


def attempt(path: Path) -> nn.Module | None:
    """Loads, or is refused; any other exception is a defect. A refused model is untouched."""
    model = nn.Sequential(nn.Linear(32, 40))
    old = model[0]
    try:
        load_quantized(model, path)
    except CheckpointError:
        assert model[0] is old
        return None
    return model


@settings(deadline=None, max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), length=st.booleans())
def test_a_damaged_header_is_refused_or_harmless(pack: Pack, place: float, byte: int, length: bool) -> None:
    content = bytearray(whole_file(pack))
    header = 8 + int.from_bytes(content[:8], "little")
    content[int(place * (8 if length else header))] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        model = attempt(path)
    assert model is None or bool(model(torch.ones(1, 32)).isfinite().all())


@settings(deadline=None, max_examples=60)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_shortened_file_is_refused(pack: Pack, cut: float) -> None:
    content = whole_file(pack)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content[: int(cut * len(content))])
        assert attempt(path) is None


KEYS = [
    *("quant_method", "quant_algo", "quantized_layers", "layers", "format", "0", "_type", "_data"),
    *("_tensor_data_names", "block_size", "elem_dtype", "is_swizzled_scales"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 40) | st.sampled_from(["", "NVFP4", "nvfp4", "FP8", "0", "0.weight"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=200)
@given(
    account=JSON,
    where=st.sampled_from(["quantization_config", "_quantization_metadata", "0.weight", "config.json"]),
    start=st.sampled_from(
        [{}, {"quant_method": "modelopt"}, {"layers": {"0": {"format": "nvfp4"}}}, {"_type": "MXTensor"}]
    ),
)
def test_metadata_of_any_form_are_believed_or_refused(
    pack: Pack, account: Any, where: str, start: dict[str, Any]
) -> None:
    account = start | account if isinstance(account, dict) else account
    parts = pack(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)))
    tensors = {"0.weight": parts["q"], "0.weight_scale": parts["scale"], "0.weight_scale_2": parts["outer"]}
    metadata = {where: json.dumps(account)} if where != "config.json" else {}
    if where == "0.weight":
        metadata["tensor_names"] = json.dumps(["0.weight"])
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors | {"0.bias": torch.zeros(40)}, Path(folder) / "model.safetensors", metadata or None)
        if where == "config.json":
            (Path(folder) / "config.json").write_text(json.dumps({"quantization_config": account}))
        model = attempt(Path(folder))
    if model is not None:
        expected = parts["values"]
        assert (model[0].weight - expected).norm() < 1e-5 * expected.norm()
