"""Models quantised live by modelopt: recognised, lowered to real operators, with the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import ditc
from ditc.passes.capture import capture_dynamo
from ditc.passes.pipeline import Rewritten, rewrite
from ditc.passes.plan import Plan

mtq = pytest.importorskip("modelopt.torch.quantization")
ops = torch.ops.ditc
pytestmark = pytest.mark.usefixtures("portable")


def quantized(make_dit: Any, inputs: tuple[Tensor, ...], configuration: Any) -> torch.nn.Module:
    model = make_dit(width=32)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.bias)
    chosen = copy.deepcopy(configuration)
    result: torch.nn.Module = mtq.quantize(model, chosen, lambda m: m(*inputs))
    return result


def captured(model: torch.nn.Module, inputs: tuple[Tensor, ...], plan: Plan) -> list[Rewritten]:
    """The rewritten graphs of a model, as the backend gets them."""
    from modelopt.torch.quantization.utils import export_torch_mode

    found: list[Rewritten] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        found.append(rewrite(capture_dynamo(gm, example_inputs), plan))
        return gm.forward

    with torch.no_grad(), export_torch_mode():
        # NVFP4's simulation runs on CUDA alone: what matters is what was captured
        torch.compile(model, backend=backend)(*inputs) if _runs_here(model) else _trace(model, backend, inputs)
    return found


def _runs_here(model: torch.nn.Module) -> bool:
    return all(getattr(m, "block_sizes", None) is None for m in model.modules())


def _trace(model: torch.nn.Module, backend: Any, inputs: tuple[Tensor, ...]) -> None:
    class CapturedError(Exception):
        pass

    def stop(gm: Any, example_inputs: Any) -> Any:
        backend(gm, example_inputs)

        def run(*_: Any) -> Any:
            raise CapturedError

        return run

    with pytest.raises(CapturedError):
        torch.compile(model, backend=stop)(*inputs)


def count(done: Rewritten, target: Any) -> int:
    return len(done.graph.graph.find_nodes(op="call_function", target=target))


def test_fp8_gives_modelopts_numbers(make_dit: Any, dit_inputs: Any) -> None:
    from modelopt.torch.quantization.utils import export_torch_mode

    inputs = dit_inputs()
    model = quantized(make_dit, inputs, mtq.FP8_DEFAULT_CFG)
    plain = make_dit(width=32)
    for block in plain.blocks:
        torch.nn.init.normal_(block.modulation.bias)
    with torch.no_grad(), export_torch_mode():
        expected = model(*inputs)
        # of the head's output modelopt quantises nothing more, so that all of the difference is the order of sums
        compiled = ditc.compile(model, {"fuse": False, "lower": "eager"})
        actual = compiled(*inputs)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert float((actual - expected).norm() / expected.norm()) < 3e-3
    stats = ditc.stats(compiled)
    lowered = next(item for item in stats.programs[0].passes if item.name == "modelopt")
    assert lowered.rewrites == 2 + 2 * 8 + 1
    assert any("quantises no operand of a linear" in skip.reason for skip in lowered.skipped), "the patch convolution"


def test_nvfp4_keeps_modelopts_outer_range(make_dit: Any, dit_inputs: Any) -> None:
    inputs = dit_inputs()
    model = quantized(make_dit, inputs, mtq.NVFP4_DEFAULT_CFG)
    (done,) = captured(model, inputs, Plan())
    linears = done.graph.graph.find_nodes(op="call_function", target=ops.quantized_linear.default)
    assert len(linears) == 2 + 2 * 8 + 1 and {node.args[5] for node in linears} == {"nvfp4"}
    assert count(done, ops.quantize.default) + count(done, ops.norm_quantize.default) > 0
    assert done.prologue is not None


def test_weights_alone(make_dit: Any, dit_inputs: Any) -> None:
    inputs = dit_inputs()
    chosen = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    model = quantized(make_dit, inputs, chosen)
    for module in model.modules():
        if hasattr(module, "input_quantizer"):
            module.input_quantizer.disable()
    (done,) = captured(model, inputs, Plan(fuse=False))
    assert count(done, ops.weight_linear.default) == 2 + 2 * 8 + 1
    assert count(done, ops.quantized_linear.default) == 0


def test_what_modelopt_leaves_is_ours_to_quantise(make_dit: Any, dit_inputs: Any) -> None:
    inputs = dit_inputs()
    model = quantized(make_dit, inputs, mtq.FP8_DEFAULT_CFG)
    for block in model.blocks:
        for quantizer in (block.up.input_quantizer, block.up.weight_quantizer):
            quantizer.disable()
    (done,) = captured(model, inputs, Plan(quantize="int8", fuse=False))
    linears = done.graph.graph.find_nodes(op="call_function", target=ops.quantized_linear.default)
    assert sorted({node.args[5] for node in linears}) == ["fp8", "int8"]
    assert sum(node.args[5] == "int8" for node in linears) == 2
