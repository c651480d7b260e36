"""The timestep input: what feeds sine and cosine and then linears.

Rotary tables are sines too, but of positions, and they multiply queries and keys instead of feeding a linear.
Embeddings of guidance, resolution or frame rate look exactly like the timestep's: there the argument's name decides,
or else the order, and the evidence says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from .facts import TimestepInput
from .flow import CUTS, VIEWS, Dependence, _packets
from .ops import aten, content, display_name, graph_input, packet, shape
from .products import Product

_HINT = re.compile(
    r"(^|_)(t|time|times|timestep|timesteps|tstep|step|sigma|sigmas|noise_level|log_snr)(_|\d|$)|time_?step"
)
_WAVES = _packets("sin cos")


@dataclass(frozen=True)
class Candidate:
    """An input that is embedded as a timestep is: how, and by which linear (or table) first."""

    input: fx.Node
    name: str
    into: fx.Node
    where: str
    how: str

    @property
    def hinted(self) -> bool:
        return bool(_HINT.search(self.name.rsplit(".", 1)[-1].lower()))


def sinusoids(graph: fx.Graph, flow: Dependence, products: list[Product]) -> list[Candidate]:
    """Inputs whose sine or cosine reaches a linear with nothing learned in between, in program order."""
    by_node = {product.node: product for product in products}
    waves: set[fx.Node] = set()
    found: dict[str, Candidate] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        operands = content(node)
        product = by_node.get(node)
        if product is not None:
            if product.source in waves:
                _add(found, flow, product, "sine and cosine")
            continue
        mask = flow.inputs.get(node, 0)
        if not mask or node in flow.learned:
            continue
        started = packet(node) in _WAVES
        carried = any(n in waves for n in operands)
        if started or (carried and all(flow.inputs.get(n, 0) in (0, mask) for n in operands)):
            waves.add(node)
    return list(found.values())


def _add(found: dict[str, Candidate], flow: Dependence, product: Product, how: str) -> None:
    mask = flow.inputs.get(product.source, 0)
    for bit, node in enumerate(flow.order):
        fact = graph_input(node)
        if mask >> bit & 1 and fact is not None and fact.name not in found:
            found[fact.name] = Candidate(node, fact.name, product.node, product.name, how)


def raw_scalars(graph: fx.Graph, flow: Dependence, products: list[Product]) -> list[Candidate]:
    """Without sinusoids: inputs of one number per sample that index a table or feed a linear directly."""
    found: dict[str, Candidate] = {}
    direct: dict[fx.Node, fx.Node] = {}
    by_node = {product.node: product for product in products}
    for node in graph.nodes:
        fact = graph_input(node)
        if fact is not None and fact.kind == "data" and _is_scalar(node):
            direct[node] = node
            continue
        operands = content(node) if node.op == "call_function" else []
        if packet(node) is aten.embedding and operands[1] in direct:
            _note(found, direct[operands[1]], node, flow.weights.get(operands[0]), "index of a table")
        elif node in by_node and by_node[node].source in direct:
            _note(found, direct[by_node[node].source], node, by_node[node].weight, "linear of the number itself")
        elif node not in flow.learned and _plain(node, operands, flow):
            source = next((direct[n] for n in operands if n in direct), None)
            if source is not None:
                direct[node] = source
    return list(found.values())


def _plain(node: fx.Node, operands: list[fx.Node], flow: Dependence) -> bool:
    return packet(node) in VIEWS | CUTS or sum(bool(flow.inputs.get(n)) for n in operands) == 1


def _is_scalar(node: fx.Node) -> bool:
    sizes = shape(node)
    return sizes is not None and (len(sizes) < 2 or (len(sizes) == 2 and sizes[1] == 1))


def _note(found: dict[str, Candidate], node: fx.Node, into: fx.Node, weight: fx.Node | None, how: str) -> None:
    fact, table = graph_input(node), graph_input(weight) if weight is not None else None
    if fact is not None and fact.name not in found:
        found[fact.name] = Candidate(node, fact.name, into, display_name(table.name) if table else into.name, how)


def choose(waves: list[Candidate], scalars: list[Candidate], per_token: set[str]) -> tuple[TimestepInput | None, str]:
    """The timestep among the candidates, and a note where there is none.

    ``per_token`` names the candidates whose embedding has a token axis: a timestep per token, or positions.
    """
    plain = [c for c in waves if c.name not in per_token]
    candidates = plain or [c for c in waves if c.hinted] or waves or scalars
    if not candidates:
        return None, "No timestep: no input feeds sine and cosine and then a linear, nor a table or a linear directly."
    hinted = [c for c in candidates if c.hinted]
    best = (hinted or candidates)[0]
    alike = [f"`{c.name}`" for c in candidates if c is not best]
    others = " and ".join(alike) + (" looks" if len(alike) == 1 else " look")
    evidence = f"{best.how} of `{best.name}` feed {best.where}"
    if best.how != "sine and cosine":
        evidence = f"`{best.name}` is the {best.how}: {best.where}"
    if best.name in per_token:
        evidence += ", one per token"
    if alike and hinted:
        evidence += f"; {others} the same, the argument's name decides"
    elif alike:
        evidence += f"; {others} the same, this one comes first"
    elif best.hinted:
        evidence += "; the argument's name agrees"
    return TimestepInput(best.name, best.input.name, evidence), ""
