"""QuantizedLinear: what it computes, how it survives casts and moves, what the compiler sees of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditc.kernels.formats import FORMATS, format_of
from ditc.passes.capture import capture_dynamo
from ditc.passes.rewrite import calls, made_from_weights
from ditc.runtime.checkpoints import QuantizedLinear


def layer(format: str, dtype: torch.dtype = torch.float32, **sides: torch.Tensor) -> QuantizedLinear:
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    return QuantizedLinear(format_of(format).quantize(w), format, torch.arange(48.0), dtype=dtype, **sides)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_with_the_decoded_weight(format: str, dtype: torch.dtype) -> None:
    module, x = layer(format, dtype).to(dtype), torch.randn(3, 5, 64).to(dtype)
    weight = format_of(format).dequantize(module.parts, dtype)
    assert torch.equal(module(x), F.linear(x, weight, torch.arange(48.0).to(dtype)))
    assert torch.equal(module.weight, weight)


def test_smooths_the_input_and_adds_the_branch() -> None:
    smooth, a, b = torch.rand(64) + 0.5, torch.randn(4, 64), torch.randn(48, 4)
    module, x = layer("int8", pre_quant_scale=smooth, lora_a=a, lora_b=b), torch.randn(7, 64)
    expected = F.linear(x * smooth, module.weight + b @ a, torch.arange(48.0))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_casts_touch_neither_codes_nor_scales(format: str) -> None:
    module = layer(format, input_scale=torch.tensor(0.3), pre_quant_scale=torch.ones(64))
    before = [part.clone() for part in module.parts]
    nn.Sequential(module).to(torch.bfloat16).half().float().bfloat16()
    assert all(new.dtype == old.dtype for new, old in zip(module.parts, before, strict=True))
    assert all(
        torch.equal(new.view(torch.uint8), old.view(torch.uint8)) for new, old in zip(module.parts, before, strict=True)
    )
    assert module.input_scale is not None and module.input_scale.dtype == torch.float32
    assert module.weight.dtype == module.bias.dtype == module.pre_quant_scale.dtype == torch.bfloat16
    assert module.to("meta").weight_q.is_meta


def test_state_dict_round_trip() -> None:
    module, other = layer("nvfp4"), layer("nvfp4")
    other.weight_q.zero_()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


@pytest.mark.parametrize("format", FORMATS)
def test_a_captured_graph_shows_a_linear_behind_dequantize(format: str) -> None:
    module, x = layer(format), torch.randn(2, 64)
    exported = torch.export.export(module, (x,))
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.ditc.dequantize.default, torch.ops.aten.linear.default]
    assert torch.equal(exported.module()(x), module(x))


@pytest.mark.parametrize("format", FORMATS)
def test_the_compilers_normal_form_keeps_the_weight_apart(format: str) -> None:
    """What the quantising pass looks for: a plain linear layer, its weight made from weights by one op."""
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        found.append(capture_dynamo(gm, inputs).graph)
        return gm.forward

    module = nn.Sequential(layer(format), nn.GELU(), nn.Linear(48, 8))
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True)(torch.randn(2, 64))
    torch._dynamo.reset()
    (decoded,) = calls(found[0], torch.ops.ditc.dequantize.default)
    (user,) = decoded.users
    assert user.target == torch.ops.aten.linear.default and user.args[1] is decoded
    assert made_from_weights(decoded) == [decoded] and made_from_weights(user) is None
    assert decoded.args[1] == format and decoded.args[2] == torch.float32


def test_compiles_without_a_graph_break() -> None:
    module, x = layer("nvfp4", pre_quant_scale=torch.ones(64)), torch.randn(2, 64)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp5"}, "no format"),
        ({"format": "fp8"}, "has the parts"),
        ({"bias": torch.zeros(47)}, "bias has shape"),
        ({"pre_quant_scale": torch.ones(48)}, "pre_quant_scale has shape"),
        ({"input_scale": torch.ones(1)}, "input_scale has shape"),
        ({"lora_a": torch.ones(4, 64)}, "both lora_a and lora_b"),
        ({"lora_a": torch.ones(4, 64), "lora_b": torch.ones(48, 3)}, "lora_b has shape"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    arguments = {"parts": layer("int8").parts, "format": "int8"} | change
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(**arguments)  # type: ignore[arg-type]
