"""Lowering through inductor, with CUDA graphs kept possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.compiler import config as compiler_config

from ditc.kernels import aten, linear, quantize

from ..plan import Plan
from ..rewrite import device_of, input_of


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's settings for one of ``torch.compile``'s modes."""
    return dict(torch._inductor.list_mode_options(mode)) if mode != "default" else {}


def lower_inductor(graph: fx.GraphModule, plan: Plan) -> Callable[..., Sequence[Any]]:
    """Compiles a rewritten graph.

    ditc's ops are decomposed into ATen on the way, so that inductor fuses what surrounds an integer GEMM into it, and
    some of ATen's own are decomposed into what inductor compiles better on the graph's device.

    Args:
        graph: in normal form, with fake values on its placeholders. It is handed over: inductor may change it.
        plan: gives the mode; its text is part of inductor's cache key.
    """
    placeholders = graph.graph.find_nodes(op="placeholder")
    examples = [node.meta["val"] for node in placeholders]
    _mark_static(graph, placeholders)
    _pin_operands(graph)
    device = device_of(graph)
    ours = (aten.lowerings(device), quantize.lowerings(device), linear.lowerings(device))
    table = {**select_decomp_table(), **ours[0], **ours[1], **ours[2]}
    with compiler_config.patch(cache_key_tag=f"ditc-{plan.key()}"):  # type: ignore[attr-defined]
        compiled = compile_fx(graph, examples, config_patches=mode_options(plan.mode), decompositions=table)
    return cast(Callable[..., Sequence[Any]], compiled)


def _pin_operands(graph: fx.GraphModule) -> None:
    """Holds the operands of branches to the layout that the branches were traced with: inductor compiles those first
    and may then lay out differently what is in front of them."""
    for branch in graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        operands = []
        for operand in branch.args[3]:
            if operand.op == "call_function" and isinstance(operand.meta["val"], torch.Tensor):
                strides = list(operand.meta["val"].stride())
                with graph.graph.inserting_before(branch):
                    pinned = graph.graph.call_function(
                        torch.ops.prims.inductor_force_stride_order.default, (operand, strides)
                    )
                pinned.meta = dict(operand.meta)
                operand = pinned
            operands.append(operand)
        branch.args = (*branch.args[:3], tuple(operands))
    graph.recompile()


def _mark_static(graph: fx.GraphModule, placeholders: Sequence[fx.Node]) -> None:
    """Tells inductor which inputs keep their address, so that CUDA graphs do not copy weights at every replay.

    AOTAutograd takes this from three marks that Dynamo leaves on its own graphs and that a rewritten graph has lost.
    """
    context = torch._guards.CompileContext.try_get()
    if context is None or context.compile_id is None:
        return
    graph.meta["dynamo_compile_id"] = context.compile_id
    setattr(graph, "_param_name_to_source", {})  # noqa: B010 - a module's attributes are typed as tensors
    for node in placeholders:
        if not hasattr(node, "_dynamo_source"):
            node._dynamo_source = None
        if input_of(node).is_weight:
            node.meta["tensor_dict"] = {**node.meta.get("tensor_dict", {}), "_dynamo_static_input_type": "unguarded"}
