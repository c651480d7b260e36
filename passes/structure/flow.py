"""What each value is made from: which inputs, and which linears and attentions last.

``depends`` and ``learned`` need the graph alone. ``origins`` is a forward pass over the token path and the
conditioning path: for each value, the *producers* (linears, convolutions, attentions) that made it with nothing but
views, norms, activations and gating in between, and a :class:`Trace` of what lay in between. A residual sum has no
producers: whoever reads it starts afresh.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from .facts import NormKind
from .ops import argument, aten, content, graph_input, packet, shape, tensors, value


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split() if hasattr(aten, name))


VIEWS = _packets(
    "view reshape _unsafe_view flatten unflatten permute transpose t squeeze unsqueeze expand expand_as view_as "
    "clone contiguous alias detach to _to_copy type_as dropout lift_fresh_copy movedim swapaxes"
)
"""Operators that hand their first operand on: same elements, other shape, type or memory."""
CUTS = _packets("slice select narrow split split_with_sizes chunk tensor_split unbind glu") | {operator.getitem}
ACTIVATIONS = _packets(
    "gelu silu relu relu6 sigmoid tanh mish elu selu celu leaky_relu softplus hardswish hardsigmoid hardtanh erf "
    "log_sigmoid prelu softsign logit glu"
)
CONVOLUTIONS = _packets("conv1d conv2d conv3d convolution conv_transpose2d conv_transpose3d")
SUMS = _packets("add sub rsub addcmul addcdiv lerp")
PRODUCTS = _packets("mul div")
NORMS: Mapping[Any, NormKind] = {
    **dict.fromkeys(_packets("rms_norm rsqrt _fused_rms_norm"), "rms"),
    **dict.fromkeys(_packets("layer_norm native_layer_norm"), "layer"),
    **dict.fromkeys(_packets("linalg_vector_norm norm"), "l2"),
}


@dataclass
class Dependence:
    """Which inputs a value depends on.

    ``inputs`` are bit masks over the data placeholders, in order. ``learned`` marks what a weight's product went
    into: RoPE tables, masks and position grids are not learned. ``weights`` gives, for values made of weights alone,
    one weight that they are made of.
    """

    order: list[fx.Node] = field(default_factory=list)
    inputs: dict[fx.Node, int] = field(default_factory=dict)
    learned: set[fx.Node] = field(default_factory=set)
    weights: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def names(self, mask: int) -> list[str]:
        """The names of the data inputs in a bit mask."""
        found = [graph_input(node) for i, node in enumerate(self.order) if mask >> i & 1]
        return [fact.name for fact in found if fact is not None]


def dependence(graph: fx.Graph) -> Dependence:
    """One pass over the graph: see :class:`Dependence`."""
    result = Dependence()
    learning = _packets("linear addmm baddbmm mm") | CONVOLUTIONS
    for node in graph.nodes:
        if node.op == "placeholder":
            fact = graph_input(node)
            result.inputs[node] = 0
            if fact is not None and fact.is_weight:
                result.weights[node] = node
            elif fact is None or fact.kind == "data":
                result.inputs[node] = 1 << len(result.order)
                result.order.append(node)
            continue
        operands = content(node)
        mask = 0
        for operand in operands:
            mask |= result.inputs.get(operand, 0)
        result.inputs[node] = mask
        made_of = [result.weights[operand] for operand in operands if operand in result.weights]
        if made_of and not mask and packet(node) not in learning:
            result.weights[node] = made_of[0]
        # a table that comes in with the call is data: only a weight is learned
        multiplies = packet(node) in (aten.matmul, aten.bmm, aten.einsum, aten.embedding) and bool(made_of)
        learns = packet(node) in learning or multiplies or any(operand in result.learned for operand in operands)
        if learns and mask:
            result.learned.add(node)
    return result


@dataclass(frozen=True)
class Trace:
    """What lies between a producer and a value.

    ``part`` is the node that cut a part of the producer's features out, ``activated`` and ``gated`` say that an
    activation, or a product with another producer's value, was passed; ``beside`` that it was joined with others
    along the features.
    """

    activated: bool = False
    gated: bool = False
    beside: bool = False
    rope: bool = False
    norm: NormKind | None = None
    part: fx.Node | None = None

    def joined(self, other: Trace) -> Trace:
        return Trace(
            self.activated or other.activated,
            self.gated or other.gated,
            self.beside or other.beside,
            self.rope or other.rope,
            self.norm or other.norm,
            self.part if self.part is other.part else (self.part or other.part),
        )


Origins = dict[fx.Node, Trace]


def _union(*many: Origins) -> Origins:
    result: Origins = {}
    for origins in many:
        for producer, trace in origins.items():
            result[producer] = result[producer].joined(trace) if producer in result else trace
    return result


@dataclass
class Meeting:
    """How a value of the conditioning path enters the token path."""

    multiplies: bool = False
    adds: bool = False
    joins: bool = False
    cut: bool = False


@dataclass
class Flow:
    """The forward pass; see the module's docstring.

    ``producers`` are linears (with their data operand) and attentions (whose operands are read elsewhere);
    ``on_tokens`` says which values carry a token axis. Results: ``origins`` of every value, ``meetings`` of each
    producer without a token axis with the token path, ``gates``: pairs of producers whose values were multiplied,
    ``layers``: producers that are one layer in parts, ``residual``: residual sums.
    """

    dependence: Dependence
    producers: Mapping[fx.Node, fx.Node | None]
    attentions: frozenset[fx.Node]
    conditioning: frozenset[fx.Node]
    lengths: frozenset[int] = frozenset()
    origins: dict[fx.Node, Origins] = field(default_factory=dict)
    meetings: dict[fx.Node, Meeting] = field(default_factory=dict)
    gates: list[tuple[fx.Node, Trace, fx.Node, Trace]] = field(default_factory=list)
    layers: list[frozenset[fx.Node]] = field(default_factory=list)
    residual: set[fx.Node] = field(default_factory=set)

    def run(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if node in self.producers:
                self.origins[node] = {node: Trace()}
            elif node in self.dependence.learned:
                self.origins[node] = self._step(node)

    def of(self, node: fx.Node) -> Origins:
        return self.origins.get(node, {})

    def reaches_residual(self, node: fx.Node, steps: int = 12) -> bool:
        """Whether a value gets into a residual sum before another linear reads it."""
        here = {node}
        for _ in range(steps):
            if here & self.residual:
                return True
            here = {user for value in here for user in value.users if user not in self.producers}
        return False

    def _step(self, node: fx.Node) -> Origins:
        op, operands = packet(node), [n for n in content(node) if n in self.dependence.learned]
        if node not in self.conditioning:
            meeting = [n for n in operands if n in self.conditioning]
            for operand in meeting:
                self._meet(operand, op, node)
            operands = [n for n in operands if n not in self.conditioning] or operands
        if not operands:
            return {}
        if len(operands) == 1 or op in VIEWS:
            return self._unary(node, op, operands[0])
        if op in PRODUCTS:
            return self._multiply(node, operands)
        if op in SUMS:
            return self._add(node, operands)
        joined = _union(*(self.of(n) for n in operands))
        if op is aten.cat and self._features(node):
            return {producer: replace(trace, beside=True) for producer, trace in joined.items()}
        return joined

    def _features(self, node: fx.Node) -> bool:
        rank = len(shape(node) or ())
        dim = argument(node, 1, "dim", 0)
        return isinstance(dim, int) and dim % max(rank, 1) == rank - 1

    def _unary(self, node: fx.Node, op: Any, operand: fx.Node) -> Origins:
        origins = self.of(operand)
        if op in ACTIVATIONS:
            origins = {p: replace(t, activated=True) for p, t in origins.items()}
        if op in CUTS:
            origins = (
                {p: replace(t, part=node) for p, t in origins.items()} if self._is_part(node, operand) else origins
            )
        if op in NORMS:
            origins = {p: replace(t, norm=t.norm or NORMS[op]) for p, t in origins.items()}
        if op in PRODUCTS and self._rotates(node, operand):
            origins = {p: replace(t, rope=True) for p, t in origins.items()}
        return origins

    @staticmethod
    def _is_part(node: fx.Node, operand: fx.Node) -> bool:
        """Whether a cut really takes less than the whole; of a list, only getitem says which part it is."""
        whole = value(operand)
        if isinstance(whole, list | tuple):
            return len(whole) > 1
        return shape(node) is not None and shape(node) != shape(operand)

    def _rotates(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether a product's other operand is a table over positions and features: RoPE."""
        for other in tensors(node):
            sizes = shape(other) or ()
            if other is not operand and other not in self.dependence.learned and len(sizes) >= 2:
                longest = [size for size in sizes if size > 1]
                if len(longest) >= 2 and any(size in self.lengths for size in longest):
                    return True
        return False

    def _multiply(self, node: fx.Node, operands: list[fx.Node]) -> Origins:
        left, right = (self.of(n) for n in operands[:2])
        for a, trace_a in left.items():
            for b, trace_b in right.items():
                if a is not b or (trace_a.part is not trace_b.part and trace_a.activated != trace_b.activated):
                    self.gates.append((a, trace_a, b, trace_b))
        gated = bool(left and right) and set(left) != set(right)
        joined = _union(left, right)
        return {p: replace(t, gated=True) for p, t in joined.items()} if gated else joined

    def _add(self, node: fx.Node, operands: list[fx.Node]) -> Origins:
        many = [self.of(n) for n in operands]
        if node in self.conditioning:
            return _union(*many)  # sums of embeddings are not residuals
        if all(set(origins) == set(many[0]) for origins in many) and many[0]:
            return _union(*many)
        producers = set().union(*many)
        if all(many) and (producers <= self.attentions or self._one_layer(many)):
            self.layers.append(frozenset(producers - self.attentions))
            return _union(*many)
        self.residual.add(node)
        return {}

    def _one_layer(self, many: list[Origins]) -> bool:
        """Whether a sum is one layer in several parts (an adapter beside its linear): all read the same value."""
        traces = [(producer, trace) for origins in many for producer, trace in origins.items()]
        if any(trace.activated or producer in self.attentions for producer, trace in traces):
            return False
        return bool(set.intersection(*(self._near(origins) for origins in many)))

    def _near(self, origins: Origins) -> set[fx.Node]:
        """The values that producers read, one linear further back included."""
        found: set[fx.Node] = set()
        for producer in origins:
            source = self.producers.get(producer)
            if source is not None:
                found.add(source)
                found |= {s for p in self.of(source) if (s := self.producers.get(p)) is not None}
        return found

    def _meet(self, operand: fx.Node, op: Any, node: fx.Node) -> None:
        for producer, trace in self.of(operand).items():
            meeting = self.meetings.setdefault(producer, Meeting())
            meeting.multiplies |= op in PRODUCTS
            meeting.adds |= op in SUMS
            meeting.joins |= op is aten.cat
            meeting.cut |= trace.part is not None
