"""Inputs that a guard adds to a graph: tensors that it carries from step to step, and the numbers of each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ditc.runtime.artifact import Controls, StateEntry

from ..base import PassContext
from ..capture import INPUT, GraphInput, fake_mode_of
from .sizes import state_size


def add_state(
    graph: fx.GraphModule, ctx: PassContext, name: str, shape: Sequence[Any], dtype: torch.dtype, like: Tensor
) -> fx.Node:
    """Declares a tensor of state, called as in ``cache.step``, on the device of ``like``; returns its placeholder."""
    entry = StateEntry(name, tuple(state_size(graph, size) for size in shape), dtype)
    ctx.declare_state(entry)
    return _placeholder(graph, f"state_{name.replace('.', '_')}", GraphInput(name, "state"), shape, dtype, like)


def add_controls(
    graph: fx.GraphModule,
    ctx: PassContext,
    name: str,
    named: Mapping[str, float],
    table: tuple[float, ...],
    like: Tensor,
) -> fx.Node:
    """Declares the numbers that come with each call, with their defaults; returns the placeholder of their vector."""
    ctx.controls = Controls(tuple(named), tuple(named.values()), table)
    size = (len(named) + len(table),)
    return _placeholder(graph, name.replace(".", "_"), GraphInput(name, "control"), size, torch.float32, like)


def _placeholder(
    graph: fx.GraphModule, name: str, what: GraphInput, shape: Sequence[Any], dtype: torch.dtype, like: Tensor
) -> fx.Node:
    with graph.graph.inserting_after(graph.graph.find_nodes(op="placeholder")[-1]):
        node = graph.graph.placeholder(name)
    with fake_mode_of(graph):
        node.meta = {"val": torch.empty(tuple(shape), dtype=dtype, device=like.device)}
    node.meta[INPUT] = what
    return node
