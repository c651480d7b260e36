"""INT8 dynamic quantisation of token-path linears: per token x per output channel."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ditc.kernels import int8

from ..base import PACK, PACKED_FROM, PassContext, PassReport, Skip
from ..rewrite import aten, calls, facts_of, input_of, is_weight, made_from_weights, new_call
from ..structure import Role

QUANTIZED = frozenset(
    {
        *(Role.QUERY, Role.KEY, Role.VALUE, Role.QKV, Role.QKV_MLP, Role.GATE, Role.OUT, Role.OUT_MLP),
        *(Role.MLP_UP, Role.MLP_GATE, Role.MLP_GATE_UP, Role.MLP_DOWN),
        Role.TOKEN,
    }
)
"""Token-path roles inside blocks. Conditioning, embedders and head stay: they are small, and errors there reach all."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizeInt8:
    """Rewrite rules, for a linear whose role is one of :data:`QUANTIZED`:

    1. ``linear(x, w, b)`` becomes ``int8_linear(*quantize_int8(x), *quantize_int8_weight(w), b, dtype of x)``;
    2. all linears that read one ``x`` share one ``quantize_int8(x)``;
    3. ``quantize_int8_weight(w)`` depends on weights alone and is computed once per set of weights; so is ``w``
       itself where the graph makes it from weights (a transpose, a concatenation, a low-rank update).
    """

    name: ClassVar[str] = "quantize"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Quantises every linear that qualifies and says why the others stay."""
        shared: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        skipped: list[Skip] = []
        kept: dict[str, int] = {}
        rewrites = 0
        for node in calls(graph, aten.linear.default):
            facts = facts_of(node)
            if facts is None or facts.role not in QUANTIZED:
                role = "no role" if facts is None or facts.role is None else str(facts.role)
                kept[role] = kept.get(role, 0) + 1
                continue
            reason = _reason_to_skip(node, ctx.device)
            if reason is not None:
                skipped.append(Skip(node.name, reason))
                continue
            _quantize(graph, node, shared)
            rewrites += 1
        details = [f"{rewrites} linears read {len(shared)} quantised inputs"] if rewrites else []
        details += [f"kept for its role: {role} x {count}" for role, count in sorted(kept.items())]
        return PassReport(self.name, rewrites, tuple(skipped), requested=True, details=tuple(details))


def _reason_to_skip(node: fx.Node, device: torch.device) -> str | None:
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    if made_from_weights(weight) is None:
        return "its weight depends on an input"
    for operand, what in ((x, "input"), (weight, "weight")):
        dtype = operand.meta["val"].dtype
        if dtype not in _FLOATS:
            return f"its {what} is {str(dtype).removeprefix('torch.')}; float32, bfloat16 or float16 is wanted"
    N, K = weight.meta["val"].shape
    return int8.supported(device, int(K), int(N))


def _quantize(graph: fx.GraphModule, node: fx.Node, shared: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    bias = node.args[2] if len(node.args) > 2 else None
    ops = torch.ops.ditc
    if x not in shared:
        # right behind its producer, so that it stands in front of every reader
        with graph.graph.inserting_after(x):
            pair = new_call(graph, node, ops.quantize_int8.default, (x,))
        shared[x] = _unpack(graph, pair)
    for made in made_from_weights(weight) or ():
        made.meta[PACK] = True
    with graph.graph.inserting_before(node):
        packed = new_call(graph, node, ops.quantize_int8_weight.default, (weight,))
        weight_q, weight_scale = _unpack(graph, packed)
        for part in (packed, weight_q, weight_scale):
            part.meta[PACK] = True
        weight_scale.meta[PACKED_FROM] = _names(weight)
        dtype = node.meta["val"].dtype
        args = (*shared[x], weight_q, weight_scale, bias, dtype)
        linear = new_call(graph, node, ops.int8_linear.default, args)
        linear.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(linear)
    graph.graph.erase_node(node)


def _unpack(graph: fx.GraphModule, pair: fx.Node) -> tuple[fx.Node, fx.Node]:
    with graph.graph.inserting_after(pair):
        second = new_call(graph, pair, operator.getitem, (pair, 1))
        first = new_call(graph, pair, operator.getitem, (pair, 0))
    return first, second


def _names(weight: fx.Node) -> str:
    """The names of all weights behind a weight."""
    if is_weight(weight):
        return input_of(weight).name
    parts = {part: None for made in made_from_weights(weight) or () for part in made.all_input_nodes if is_weight(part)}
    return " + ".join(input_of(part).name for part in parts)
