"""The working state of an analysis, from axes to flow: what the later stages ask."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from .facts import TimestepInput
from .flow import CONVOLUTIONS, Dependence, Flow, dependence
from .linear_attention import linear_site
from .ops import graph_input, packet, shape, tensors, value
from .products import Product, find_products
from .rules import propagate
from .sites import Site, find_sites
from .timestep import choose, raw_scalars, sinusoids
from .tokens import Tokens, find_tokens
from .walk import Walk


@dataclass
class Findings:
    """Everything known about a graph before blocks and roles."""

    graph: fx.Graph
    nodes: list[fx.Node]
    position: dict[fx.Node, int]
    walk: Walk
    flow: Dependence
    products: dict[fx.Node, Product]
    sites: dict[fx.Node, Site]
    tokens: Tokens
    timestep: TimestepInput | None
    conditioning: frozenset[fx.Node]
    trace: Flow
    notes: list[str] = field(default_factory=list)

    def on_tokens(self, node: fx.Node) -> bool:
        """Whether a value belongs to the token path: made from data, with a token axis, and not conditioning."""
        return node in self.flow.learned and node not in self.conditioning


def find(graph: fx.Graph) -> Findings:
    """Runs the stages that need no blocks."""
    walk, flow = propagate(graph), dependence(graph)
    products = find_products(graph, flow)
    sites = find_sites(graph, walk, flow)
    sites += [site for node in graph.nodes if (site := linear_site(node, walk, flow)) is not None]
    largest = max((p.M * p.N * p.K for p in products), default=0)
    big = [p for p in products if largest <= 4 * p.M * p.N * p.K]
    rows = [dim for p in big for dim in walk.dims(p.source)[:-1] if not _is_batch(dim)]
    tokens = find_tokens(graph, walk, flow, sites, rows)
    waves = sinusoids(graph, flow, products)
    per_token = {c.name for c in waves if tokens.carried_by(walk, c.into)}
    scalars = [] if waves else raw_scalars(graph, flow, products)
    timestep, note = choose(waves, scalars, per_token)
    embedded = {c.name for c in waves if c.name not in per_token or (timestep and c.name == timestep.name)}
    conditioning = _conditioning(graph, walk, flow, tokens, embedded)
    sources: dict[fx.Node, fx.Node | None] = {p.node: p.source for p in products}
    for node in graph.nodes:
        if packet(node) in CONVOLUTIONS:
            sources.setdefault(node, tensors(node)[0])
    sources |= {site.node: None for site in sites}
    lengths = {axis.size for axis in tokens.axes} | {n for site in sites for n in (site.q_len, site.kv_len)}
    trace = Flow(flow, sources, frozenset(s.node for s in sites), conditioning, frozenset(lengths))
    trace.run(graph)
    nodes = list(graph.nodes)
    return Findings(
        graph,
        nodes,
        {node: i for i, node in enumerate(nodes)},
        walk,
        flow,
        {p.node: p for p in products},
        {s.node: s for s in sites},
        tokens,
        timestep,
        conditioning,
        trace,
        [note] if note else [],
    )


def _is_batch(dim: tuple[object, ...]) -> bool:
    return all(getattr(atom, "dim", -1) == 0 for atom in dim)


def _conditioning(
    graph: fx.Graph, walk: Walk, flow: Dependence, tokens: Tokens, embedded: set[str]
) -> frozenset[fx.Node]:
    """Values without token axis, and values that depend on nothing but inputs that belong to the conditioning."""
    mask = 0
    for bit, node in enumerate(flow.order):
        fact = graph_input(node)
        sizes = shape(node)
        if fact is None or sizes is None:
            continue
        if fact.name in embedded or not tokens.rooted_in(walk, node):
            mask |= 1 << bit
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or value(node) is None:
            continue
        inputs = flow.inputs.get(node, 0)
        if not tokens.carried_by(walk, node) or (inputs and not inputs & ~mask):
            found.add(node)
    return frozenset(found)
