"""Fusion of quantised linears with what stands before and behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from ditc.kernels.linear import broadcasts

from ..base import PassContext, PassReport
from ..rewrite import aten, calls, new_call

_ops = torch.ops.ditc
_NORMS: dict[Any, str] = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}
_ACTIVATIONS: dict[Any, str] = {aten.silu.default: "silu", aten.relu.default: "relu", aten.gelu.default: "gelu"}


@dataclass(frozen=True)
class FuseNeighbours:
    """Rewrite rules; an intermediate value is fused away only where nobody else reads it:

    1. ``quantize(norm(x, w, b) * m + s, f)`` becomes ``norm_quantize(x, norm, eps, w, b, m, s, f)``, with any of
       ``w, b, m, s`` missing, the norm over the last dimension;
    2. ``quantize(activation(x) * y, f)`` becomes ``activation_quantize(x, activation, y, f)``, with or without ``y``;
    3. ``r + g * quantized_linear(...)`` becomes ``quantized_linear(..., gate=g, residual=r)``, with either or both.

    Values that were rounded to the model's type in between stay in float32 now, so results are a little nearer to
    those of a float32 model.
    """

    name: ClassVar[str] = "fuse-neighbours"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Fuses what matches; a linear with other neighbours keeps them."""
        norms = activations = epilogues = 0
        for node in calls(graph, _ops.quantize.default):
            if _fuse_norm(graph, node):
                norms += 1
            elif _fuse_activation(graph, node):
                activations += 1
        for node in calls(graph, _ops.quantized_linear.default):
            epilogues += _fuse_epilogue(graph, node)
        counts = ((norms, "norms"), (activations, "activations"), (epilogues, "gates and residuals"))
        details = tuple(f"{count} {what}" for count, what in counts if count)
        return PassReport(self.name, norms + activations + epilogues, details=details)


def _alone(node: Any, target: Any) -> bool:
    """Whether a node is a call of ``target`` that one other node reads, once."""
    return isinstance(node, fx.Node) and node.target is target and len(node.users) == 1


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a binary operator, where both are nodes and it scales neither."""
    a, b = node.args[:2]
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b and not node.kwargs and len(node.args) == 2:
        return a, b
    return None


def _without_cast(node: fx.Node) -> fx.Node:
    """What a cast between float types reads, where nobody else reads the cast."""
    if _alone(node, aten._to_copy.default):
        inner = node.args[0]
        if isinstance(inner, fx.Node) and inner.meta["val"].is_floating_point() and len(inner.users) == 1:
            return inner
    return node


def _broadcasts_to(value: fx.Node, like: fx.Node) -> bool:
    """Whether a float value broadcasts to the shape of another without widening it."""
    return value.meta["val"].is_floating_point() and broadcasts(value.meta["val"], tuple(like.meta["val"].shape))


def _norm_below(node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None] | None:
    """``(norm, multiplier, shift)`` for ``norm * multiplier + shift`` that ends in ``node``."""
    multiplier = shift = None
    node = _without_cast(node)
    added = _split_either(node, aten.add.Tensor, lambda inner: _is_norm(inner) or inner.target is aten.mul.Tensor)
    if added is not None:
        node, shift = _without_cast(added[0]), added[1]
    scaled = _split_either(node, aten.mul.Tensor, _is_norm)
    if scaled is not None:
        node, multiplier = _without_cast(scaled[0]), scaled[1]
    return (node, multiplier, shift) if _is_norm(node) else None


def _split_either(node: fx.Node, target: Any, wanted: Any) -> tuple[fx.Node, fx.Node] | None:
    if not _alone(node, target):
        return None
    pair = _operands(node)
    if pair is None:
        return None
    for main, other in (pair, pair[::-1]):
        if wanted(_without_cast(main)) and len(main.users) == 1 and _broadcasts_to(other, main):
            return main, other
    return None


def _is_norm(node: fx.Node) -> bool:
    return node.target in _NORMS and len(node.users) == 1 and len(node.args[1]) == 1  # type: ignore[arg-type]


def _fuse_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    x, format, *static = node.args
    found = _norm_below(x) if isinstance(x, fx.Node) and len(x.users) == 1 else None
    if found is None:
        return False
    norm, multiplier, shift = found
    given = dict(zip((argument.name for argument in norm.target._schema.arguments), norm.args, strict=False))  # type: ignore[union-attr]
    given |= norm.kwargs
    # rms_norm's default depends on the type
    default = 1e-5 if norm.target is aten.layer_norm.default else torch.finfo(norm.meta["val"].dtype).eps
    eps = default if given.get("eps") is None else given["eps"]
    affine = given.get("weight"), given.get("bias")
    args = (norm.args[0], _NORMS[norm.target], eps, *affine, multiplier, shift, format, *static)
    _replace(graph, node, _ops.norm_quantize.default, args)
    return True


def _fuse_activation(graph: fx.GraphModule, node: fx.Node) -> bool:
    x, format, *static = node.args
    if not isinstance(x, fx.Node) or len(x.users) != 1:
        return False
    product = _split_either(x, aten.mul.Tensor, lambda inner: _activation(inner) is not None)
    multiplier = None
    if product is not None and tuple(product[0].meta["val"].shape) == tuple(product[1].meta["val"].shape):
        x, multiplier = _without_cast(product[0]), product[1]
    else:
        x = _without_cast(x)
    activation = _activation(x)
    if activation is None:
        return False
    _replace(graph, node, _ops.activation_quantize.default, (x.args[0], activation, multiplier, format, *static))
    return True


def _activation(node: fx.Node) -> str | None:
    name = _ACTIVATIONS.get(node.target)
    if name is None or len(node.users) != 1:
        return None
    return "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" or "tanh" in node.args[1:] else name


def _replace(graph: fx.GraphModule, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        new = new_call(graph, node, target, args)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _fuse_epilogue(graph: fx.GraphModule, node: fx.Node) -> int:
    """Takes the gate and the residual behind one quantised linear into it."""
    x, weight, bias, gate, residual, format, dtype = node.args
    if gate is not None or residual is not None:
        return 0  # a low-rank branch is added before anything else
    last = node
    for target in (aten.mul.Tensor, aten.add.Tensor):
        user = next(iter(last.users)) if len(last.users) == 1 else None
        pair = _operands(user) if user is not None and user.target is target else None
        if user is None or pair is None or user.meta["val"].dtype != dtype:
            continue
        other = pair[1] if pair[0] is last else pair[0]
        if tuple(user.meta["val"].shape) != tuple(node.meta["val"].shape):
            break
        if target is aten.mul.Tensor and _broadcasts_to(other, node):
            gate, last = other, user
        elif target is aten.add.Tensor and tuple(other.meta["val"].shape) == tuple(node.meta["val"].shape):
            residual, last = other, user
    if last is node:
        return 0
    # at the place of the last of them, where all operands exist
    with graph.graph.inserting_before(last):
        args = (x, weight, bias, gate, residual, format, dtype)
        new = new_call(graph, last, _ops.quantized_linear.default, args)
    new.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(new)
    graph.graph.eliminate_dead_code()
    return 1
