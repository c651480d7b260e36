"""Models that modelopt has quantised live: its simulated quantisers become ditc's real operators.

``mtq.quantize`` puts a quantiser in front of each operand; captured under ``export_torch_mode`` they are calls of

- ``tensorrt::quantize_op(x, amax, num_bits, exponent_bits, unsigned, narrow_range)``: INT8 (8, 0) or FP8 E4M3 (8, 4),
  with one range for the tensor, or one per output channel of a weight;
- ``tensorrt::dynamic_block_quantize_op(x, block, amax, num_bits, exponent_bits, scale_bits, scale_exponent_bits)``:
  NVFP4 (blocks of 16, E4M3 scales), MXFP4 and MXFP8 (blocks of 32, power-of-two scales).

Both return values that are rounded to the format and no smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ditc.kernels import linear as _linear  # registers the ops  # noqa: F401
from ditc.kernels import quantize as _quantize  # noqa: F401
from ditc.kernels.linear import supported

from ..base import PACK, PACKED_FROM, PassContext, PassReport, Skip
from ..rewrite import aten, calls, made_from_weights, new_call
from .calibration import weight_name
from .parts import unpack

_QUANTIZE = "tensorrt.quantize_op.default"
_BLOCKS = ("tensorrt.dynamic_block_quantize_op.default", "tensorrt.dynamic_block_quantize_op.overload")

_LARGEST = {"int8": 127.0, "fp8": 448.0, "nvfp4": 6.0 * 448.0}


@dataclass(frozen=True)
class LowerModelopt:
    """Rewrite rules, for a linear whose weight goes through one of modelopt's quantisers:

    1. with the input quantised to the same format, it becomes ``quantized_linear``, with modelopt's ranges;
    2. with the input as it is, it becomes ``weight_linear``.

    Quantisers of anything else (convolutions, attention operands) and pairs of different formats stay modelopt's.
    """

    name: ClassVar[str] = "modelopt"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Lowers every linear that can be."""
        rewrites, skipped = 0, list[Skip]()
        shared: dict[fx.Node, list[fx.Node]] = {}
        for node in calls(graph, aten.linear.default):
            weight = _quantizer(node.args[1])
            inputs = _quantizer(node.args[0])
            if weight is None and inputs is None:
                continue
            reason = _reason_to_skip(node, inputs, weight, ctx.device)
            if reason is not None:
                skipped.append(Skip(node.name, reason))
                continue
            assert weight is not None
            _lower(graph, node, inputs, weight, shared)
            rewrites += 1
        graph.graph.eliminate_dead_code()
        for node in graph.graph.nodes:
            if _quantizer(node) is not None and not any(user.target is aten.linear.default for user in node.users):
                skipped.append(Skip(node.name, "it quantises no operand of a linear: it stays modelopt's"))
        return PassReport(self.name, rewrites, tuple(skipped))


@dataclass(frozen=True)
class _Quantizer:
    """One of modelopt's quantisers: the node, what it reads, its range, and the format (``None`` if not ours)."""

    node: fx.Node
    source: fx.Node
    amax: fx.Node | None
    format: str | None


def _quantizer(node: Any) -> _Quantizer | None:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name, args = str(node.target), list[Any](node.args)
    if name == _QUANTIZE:
        source, amax, bits, exponent, unsigned, _narrow = args
        format = {(8, 0): "int8", (8, 4): "fp8"}.get((bits, exponent)) if not unsigned else None
        return _Quantizer(node, source, amax, format)
    if name in _BLOCKS:
        source, block, amax, *bits = args
        kinds = {(16, 4, 2, 8, 4): "nvfp4", (32, 4, 2, 8, 8): "mxfp4", (32, 8, 4, 8, 8): "mxfp8"}
        return _Quantizer(node, source, amax, kinds.get((block, *bits)))
    return None


def _reason_to_skip(
    node: fx.Node, inputs: _Quantizer | None, weight: _Quantizer | None, device: torch.device
) -> str | None:
    if weight is None:
        return "modelopt quantises its input and not its weight"
    for quantizer in (weight, *([inputs] if inputs is not None else [])):
        if quantizer.format is None:
            return f"modelopt's quantiser {quantizer.node.format_node()} is of no format that ditc has"
        if quantizer.amax is not None and made_from_weights(quantizer.amax) is None:
            return "the range of a quantiser depends on an input"
    if inputs is not None and inputs.format != weight.format:
        return f"its operands have different formats: {inputs.format} and {weight.format}"
    if weight_name(weight.source) is None:
        return "its weight depends on an input"
    if inputs is not None and inputs.amax is not None and inputs.amax.meta["val"].numel() != 1:
        return "its input has a range per channel, which no integer product can undo"
    N, K = weight.source.meta["val"].shape
    assert weight.format is not None
    return supported(device, weight.format, int(K), int(N))


def _lower(
    graph: fx.GraphModule,
    node: fx.Node,
    inputs: _Quantizer | None,
    weight: _Quantizer,
    shared: dict[fx.Node, list[fx.Node]],
) -> None:
    format, ops = weight.format, torch.ops.ditc
    assert format is not None
    bias = node.args[2] if len(node.args) > 2 else None
    with graph.graph.inserting_before(weight.node):
        parts = _weight_parts(graph, weight, format)
    for made in made_from_weights(weight.source) or ():
        made.meta[PACK] = True
    if inputs is None:
        with graph.graph.inserting_before(node):
            new = new_call(graph, node, ops.weight_linear.default, (node.args[0], parts, bias, format))
    else:
        if inputs.node not in shared:
            with graph.graph.inserting_before(inputs.node):
                args: tuple[Any, ...] = (inputs.source, format)
                if inputs.amax is not None and not format.startswith("mx"):
                    args += (_scale(graph, inputs, format),)
                shared[inputs.node] = unpack(graph, new_call(graph, inputs.node, ops.quantize.default, args), format)
        with graph.graph.inserting_before(node):
            dtype = node.meta["val"].dtype
            quantized = (shared[inputs.node], parts, bias, None, None, format, dtype)
            new = new_call(graph, node, ops.quantized_linear.default, quantized)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)


def _scale(graph: fx.GraphModule, quantizer: _Quantizer, format: str) -> fx.Node:
    """``amax / largest`` as one float32 number, computed once per set of weights."""
    flat = _packed(graph, quantizer.node, aten.reshape.default, quantizer.amax, [])
    wide = _packed(graph, quantizer.node, aten._to_copy.default, flat, dtype=torch.float32)
    return _packed(graph, quantizer.node, aten.div.Tensor, wide, _LARGEST[format])


def _weight_parts(graph: fx.GraphModule, weight: _Quantizer, format: str) -> list[fx.Node]:
    ops, node = torch.ops.ditc, weight.node
    per_tensor = weight.amax is not None and weight.amax.meta["val"].numel() == 1 and not format.startswith("mx")
    if per_tensor:
        made = _packed(graph, node, ops.quantize.default, weight.source, format, _scale(graph, weight, format))
    elif weight.amax is not None and format in ("int8", "fp8"):
        return _with_ranges(graph, weight, format)
    else:
        made = _packed(graph, node, ops.quantize_weight.default, weight.source, format)
    parts = unpack(graph, made, format)
    for part in parts:
        part.meta[PACK] = True
    (parts[1] if format in ("int8", "fp8") else parts[-1]).meta[PACKED_FROM] = weight_name(weight.source)
    return parts


def _with_ranges(graph: fx.GraphModule, weight: _Quantizer, format: str) -> list[fx.Node]:
    """The parts of a weight with a calibrated range per output channel, which may be less than its largest value."""
    node, largest = weight.node, _LARGEST[format]
    wide = _packed(graph, node, aten._to_copy.default, weight.amax, dtype=torch.float32)
    scale = _packed(graph, node, aten.div.Tensor, _packed(graph, node, aten.reshape.default, wide, [-1, 1]), largest)
    values = _packed(graph, node, aten._to_copy.default, weight.source, dtype=torch.float32)
    ratio = _packed(graph, node, aten.div.Tensor, values, scale)
    if format == "int8":
        ratio = _packed(graph, node, aten.round.default, ratio)
    held = _packed(graph, node, aten.clamp.default, ratio, -largest, largest)
    dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
    scale.meta[PACKED_FROM] = weight_name(weight.source)
    return [_packed(graph, node, aten._to_copy.default, held, dtype=dtype), scale]


def _packed(graph: fx.GraphModule, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    made = new_call(graph, like, target, args, **kwargs)
    made.meta[PACK] = True
    for argument in made.all_input_nodes:
        # a range may come through detach and the like
        for between in made_from_weights(argument) or ():
            between.meta[PACK] = True
    return made
