"""Canonicalisation: what means nothing goes, and what can be written in several ways is written in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from .base import PassContext, PassReport
from .rewrite import aten, is_weight, new_call

_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.contiguous.default,
}
_ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh.default}
_SAME_SHAPE = {aten.view.default, aten.reshape.default, aten.expand.default, aten.flatten.using_ints}
_TRANSPOSES = {aten.t.default, aten.permute.default, aten.transpose.int, aten.numpy_T.default}


@dataclass(frozen=True)
class Canonicalize:
    """Rewrite rules, each keeping every bit of the outputs:

    1. assertions about metadata go (the compiled graph is guarded by Dynamo);
    2. dropout that drops nothing (evaluation mode, or p = 0) becomes its input;
    3. casts, views, expansions and copies-if-needed that change nothing become their input;
    4. what remains of casts is a ``_to_copy``, of ``contiguous`` a ``clone`` (as ``torch.export`` writes them);
    5. copies that only computations read (none that the caller could see) become their input;
    6. ``detach``, ``alias`` and switches of the gradient mode go (the graph is an inference graph);
    7. ``view`` becomes ``reshape``, so that later passes may change strides;
    8. ``scaled_dot_product_attention`` takes q, k, v, mask, dropout and causality by position, scale and
       ``enable_gqa`` by keyword and only when they are not the default;
    9. ``addmm``/``mm``/``matmul`` with a two-dimensional weight on the right is a ``linear`` with its transpose.
    """

    name: ClassVar[str] = "canonicalize"

    def __call__(self, graph: fx.GraphModule, ctx: PassContext) -> PassReport:
        """Applies the rules to every node once."""
        counts = normalize(graph)
        details = tuple(f"{label}: {count}" for label, count in counts.items())
        return PassReport(self.name, sum(counts.values()), details=details)


def normalize(graph: fx.GraphModule) -> dict[str, int]:
    """Applies the rules of :class:`Canonicalize` to every node once; says how often each was applied."""
    counts: dict[str, int] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        for label, rule in _RULES:
            if rule(graph, node):
                counts[label] = counts.get(label, 0) + 1
                break
    graph.graph.eliminate_dead_code()
    return counts


def _replace(node: fx.Node, value: fx.Node) -> bool:
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)
    return True


def _drop_assertion(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not aten._assert_tensor_metadata.default:
        return False
    node.graph.erase_node(node)
    return True


def _drop_dropout(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target not in _DROPOUTS:
        return False
    source, p, train = node.args[:3]
    assert isinstance(source, fx.Node)
    return bool(not train or p == 0.0) and _replace(node, source)


def _same(a: Any, b: Any) -> bool:
    """Whether two fake tensors agree in dtype, device, shape and strides, as far as this is known for certain."""
    if a.dtype != b.dtype or a.device != b.device or len(a.shape) != len(b.shape):
        return False
    pairs = [*zip(a.shape, b.shape, strict=True), *zip(a.stride(), b.stride(), strict=True)]
    return all(x is y or (isinstance(x, int) and isinstance(y, int) and x == y) or str(x) == str(y) for x, y in pairs)


def _drop_identity(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target not in _CASTS and node.target not in _SAME_SHAPE:
        return False
    if node.kwargs.get("copy") or (node.target is aten.to.dtype and True in node.args[3:4]):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _same(source.meta["val"], node.meta["val"]):
        return False
    return _replace(node, source)


def _one_cast(graph: fx.GraphModule, node: fx.Node) -> bool:
    source = node.args[0] if node.target in _CASTS else None
    if not isinstance(source, fx.Node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    if before.dtype == after.dtype and before.device == after.device:
        node.target, node.args = aten.clone.default, (source,)
        node.kwargs = {"memory_format": torch.contiguous_format}
        return True
    changes = {"dtype": after.dtype} if before.dtype != after.dtype else {}
    if before.device != after.device:
        changes["device"] = after.device
    node.target, node.args, node.kwargs = aten._to_copy.default, (source,), changes
    return True


def _drop_clone(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not aten.clone.default:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not _same(source.meta["val"], node.meta["val"]) or not all(map(_computes_anew, node.users)):
        return False
    return _replace(node, source)


def _computes_anew(user: fx.Node) -> bool:
    """Whether what ``user`` returns shares no memory with what it reads."""
    if user.target in _CASTS | _DROPOUTS or not isinstance(user.target, torch._ops.OpOverload):
        return False
    return all(value.alias_info is None for value in user.target._schema.returns)


def _drop_alias(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is torch._C._set_grad_enabled:
        node.graph.erase_node(node)
        return True
    source = node.args[0] if node.target in _ALIASES else None
    return isinstance(source, fx.Node) and _replace(node, source)


def _view_to_reshape(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target not in (aten.view.default, aten._unsafe_view.default):
        return False
    node.target = aten.reshape.default
    return True


def _normal_attention(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    named = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False}
    given = dict(zip(("query", "key", "value", *named), node.args, strict=False)) | node.kwargs
    args = (given["query"], given["key"], given["value"], *(given.get(k, v) for k, v in named.items()))
    kwargs = {}
    if given.get("scale") is not None:
        kwargs["scale"] = given["scale"]
    if given.get("enable_gqa"):
        kwargs["enable_gqa"] = True
    if args == node.args and kwargs == node.kwargs:
        return False
    node.args, node.kwargs = args, kwargs
    return True


def _transposed_weight(node: Any) -> fx.Node | None:
    """The weight [N, K] of which ``node`` is the transpose [K, N]."""
    if not isinstance(node, fx.Node) or node.target not in _TRANSPOSES or not is_weight(node.args[0]):
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.meta["val"].dim() != 2:
        return None
    if node.target is aten.permute.default and list(node.args[1]) not in ([1, 0], [-1, 0], [1, -2], [-1, -2]):  # type: ignore[arg-type]
        return None
    if node.target is aten.transpose.int and {d % 2 for d in node.args[1:3]} != {0, 1}:  # type: ignore[operator]
        return None
    return source


def _matmul_to_linear(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, w = node.args
    elif node.target in (aten.mm.default, aten.matmul.default):
        bias, (x, w) = None, node.args
    else:
        return False
    plain_bias = bias is None or (is_weight(bias) and bias.meta["val"].dim() == 1)  # type: ignore[union-attr]
    if not plain_bias or not isinstance(x, fx.Node) or not isinstance(w, fx.Node) or x.meta["val"].dim() < 2:
        return False
    weight = _transposed_weight(w)
    with graph.graph.inserting_before(node):
        if weight is None:
            if not is_weight(w) or w.meta["val"].dim() != 2:
                return False
            weight = new_call(graph, node, aten.t.default, (w,))
            weight.meta["val"] = w.meta["val"].t()
        linear = new_call(graph, node, aten.linear.default, (x, weight) if bias is None else (x, weight, bias))
    linear.meta["val"] = node.meta["val"]
    return _replace(node, linear)


_RULES: tuple[tuple[str, Callable[[fx.GraphModule, fx.Node], bool]], ...] = (
    ("assertions dropped", _drop_assertion),
    ("dropout that drops nothing", _drop_dropout),
    ("casts and views that change nothing", _drop_identity),
    ("casts in one form", _one_cast),
    ("copies that nobody sees", _drop_clone),
    ("aliases and gradient switches", _drop_alias),
    ("view to reshape", _view_to_reshape),
    ("attention arguments in one layout", _normal_attention),
    ("matmul by a weight to linear", _matmul_to_linear),
)
