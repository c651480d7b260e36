"""Attention written out by hand becomes one call, so that another pass can choose how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ..base import PassContext, PassReport, Skip
from ..rewrite import aten
from ..structure import FACTS, AttentionSite
from ..trace import trace_in
from .product import prove
from .written import Unproven, Written, as_one_call

SITE = "ditc_attention"
"""Key in the ``meta`` of a call that took an attention's place: the name of the node that made its output."""

UNPROVEN = "ditc_attention_unproven"
"""Key in the ``meta`` of a node that makes an attention's output: why it is not one call."""


@dataclass(frozen=True)
class RecogniseAttention:
    """Rewrite rule: ``softmax(q k^T * scale + mask) v`` becomes ``scaled_dot_product_attention(q, k, v, mask, scale)``.

    The analysis says where an attention seems to be written out; :func:`.product.prove` makes sure of it. Products may
    be matrix products or einsums; the scores may be scaled, masked by addition, ``masked_fill`` and ``where``, cast and
    reshaped. Only sites whose kind the plan wants changed are touched, unless ``everywhere``.
    """

    name: ClassVar[str] = "recognise attention"

    everywhere: bool = False

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Rewrites what can be proven, and says of each other why it cannot."""
        by_name = {node.name: node for node in graph.graph.nodes}
        done, skipped = 0, list[Skip]()
        for site in ctx.structure.attentions if ctx.structure is not None else ():
            node = by_name.get(site.node)
            if site.written != "explicit" or node is None:
                continue
            if not self.everywhere and ctx.plan.attention_for(site.kind) == "native":
                continue
            try:
                _rewrite(graph, node, prove(node), site)
                done += 1
            except Unproven as reason:
                node.meta[UNPROVEN] = str(reason)
                skipped.append(Skip(node.name, str(reason)))
        return PassReport(self.name, done, tuple(skipped))


def _rewrite(graph: fx.GraphModule, node: fx.Node, found: Written, site: AttentionSite) -> None:
    run = as_one_call(found, node.meta["val"].dtype)
    new = trace_in(graph, node, run, found.query, found.key, found.value, *(mask.node for mask in found.masks))
    assert isinstance(new, fx.Node)
    call = new
    while call.target is not aten.scaled_dot_product_attention.default:
        # what brings the result into the layout of the second product
        assert isinstance(call.args[0], fx.Node)
        call = call.args[0]
    call.meta[SITE] = site.node
    if FACTS in node.meta:
        call.meta[FACTS] = node.meta[FACTS]
    assert isinstance(new.meta["val"], torch.Tensor)
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
