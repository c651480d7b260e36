"""The analysis as a whole: findings, stacks, roles, and the facts left on the graph's nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from .attention import describe
from .blocks import find_stacks
from .facts import FACTS, Embedder, Linear, NodeFacts, Role, Stack, Structure, TokenRun
from .findings import Findings, find
from .flow import CONVOLUTIONS
from .ops import aten, display_name, graph_input, packet, shape, tensors
from .roles import Roles

Places = dict[fx.Node, tuple[str, int]]


def analyse(graph: fx.GraphModule) -> Structure:
    """The structure of a graph in normal form; facts about single nodes are left in ``node.meta[FACTS]``.

    Works on graphs straight from capture and on canonical ones. Never fails on an unusual graph: what cannot be found
    is absent, and ``notes`` says why.
    """
    found = find(graph.graph)
    stacks, notes = find_stacks(found)
    places = _places(found, stacks)
    roles = _roles(found, stacks, places)
    attentions = describe(found, places)
    linears = tuple(_linear(found, node, roles[node], places) for node in found.products)
    unknown = [linear.name for linear in linears if linear.role is Role.UNKNOWN]
    if unknown:
        notes.append(f"No role: {', '.join(unknown)} depend(s) on no input.")
    main = found.tokens.main
    if main is None:
        notes.append("No token axis: there is no attention, and no linear has rows that come from an input.")
    elif not main.sub_axes and main.source == "data":
        notes.append(f"{main.name} arrives as packed tokens: its grid is not visible in the graph.")
    if found.walk.guessed:
        listed = ", ".join(sorted(found.walk.guessed))
        notes.append(f"Operators without a rule for axes, matched by size: {listed}.")
    sites = {site.node: site for site in attentions}
    for node in found.nodes:
        node.meta[FACTS] = _facts(found, node, roles, places, sites.get(node.name) and sites[node.name].kind)
    for node in _streams(found, stacks):
        node.meta[FACTS] = replace(node.meta[FACTS], runs=_runs(found, node))
    return Structure(
        token_axis=main,
        tokens=tuple(found.tokens.axes),
        stacks=tuple(stacks),
        attentions=tuple(attentions),
        linears=linears,
        timestep=found.timestep,
        conditioning_inputs=_conditioning_inputs(found),
        embedders=tuple(_embedders(found, roles)),
        head=tuple(linear.node for linear in linears if linear.role is Role.HEAD),
        notes=(*found.notes, *found.tokens.notes, *notes),
    )


def _places(found: Findings, stacks: list[Stack]) -> Places:
    by_name = {node.name: node for node in found.nodes}
    return {by_name[n]: (stack.name, block.index) for stack in stacks for block in stack.blocks for n in block.nodes}


def _roles(found: Findings, stacks: list[Stack], places: Places) -> dict[fx.Node, Role]:
    """Runs :class:`Roles` with a sense of place: which nodes come before any block, which behind the last."""
    marks = set(places) or {*found.sites, *(n for n in found.products if found.trace.reaches_residual(n))}
    upstream: set[fx.Node] = set()
    for node in found.nodes:
        if node in marks or any(operand in upstream for operand in node.all_input_nodes):
            upstream.add(node)
    downstream: set[fx.Node] = set()
    for node in reversed(found.nodes):
        if node in marks or any(user in downstream for user in node.users):
            downstream.add(node)
    if not marks:
        return _without_blocks(found)
    return Roles(
        found,
        in_block=places.__contains__,
        before=lambda node: node not in upstream,
        after=lambda node: node not in downstream,
    ).assign()


def _without_blocks(found: Findings) -> dict[fx.Node, Role]:
    """Neither blocks nor attentions: everything on the token path is inside."""
    return Roles(found, in_block=lambda node: False, before=lambda node: False, after=lambda node: False).assign()


def _linear(found: Findings, node: fx.Node, role: Role, places: Mapping[fx.Node, tuple[str, int]]) -> Linear:
    product = found.products[node]
    stack, block = places.get(node, (None, None))
    return Linear(
        product.name, node.name, role, product.M, product.N, product.K, product.bias, stack, block, product.weight.name
    )


def _conditioning_inputs(found: Findings) -> tuple[str, ...]:
    """Inputs other than the timestep that reach the conditioning path's linears or tables."""
    mask = 0
    for node in found.nodes:
        if node in found.conditioning and (
            node in found.products or (packet(node) is aten.embedding and node in found.flow.learned)
        ):
            mask |= found.flow.inputs.get(node, 0)
    timestep = found.timestep.name if found.timestep else None
    tokens = {fact.name for n in found.flow.order if (fact := graph_input(n)) and found.tokens.rooted_in(found.walk, n)}
    return tuple(name for name in found.flow.names(mask) if name != timestep and name not in tokens)


def _embedders(found: Findings, roles: Mapping[fx.Node, Role]) -> list[Embedder]:
    """Where inputs become tokens: convolutions and tables on the token path, and linears that read an input."""
    result: list[Embedder] = []
    for node in found.nodes:
        conv = packet(node) in CONVOLUTIONS
        table = packet(node) is aten.embedding
        linear = roles.get(node) is Role.EMBEDDER
        if not (conv or table or linear) or not found.on_tokens(node):
            continue
        operands = tensors(node)
        source = operands[1] if table else found.products[node].source if linear else operands[0]
        if source in found.flow.learned:
            continue
        weight = found.flow.weights.get(operands[0] if table else operands[1])
        fact = graph_input(weight) if weight is not None else None
        name = found.products[node].name if linear else display_name(fact.name) if fact else node.name
        inputs = found.flow.names(found.flow.inputs.get(node, 0))
        kind = "conv" if conv else "table" if table else "linear"
        patch = (shape(operands[1]) or ())[2:] if conv else ()
        result.append(Embedder(name, node.name, kind, inputs[0] if inputs else "", patch))  # type: ignore[arg-type]
    return result


def _facts(
    found: Findings, node: fx.Node, roles: Mapping[fx.Node, Role], places: Places, attention: object
) -> NodeFacts:
    stack, block = places.get(node, (None, None))
    facts = NodeFacts(roles.get(node), stack, block, None, node in found.conditioning, _axes(found, node))
    return replace(facts, attention=attention) if attention else facts  # type: ignore[arg-type]


def _streams(found: Findings, stacks: list[Stack]) -> list[fx.Node]:
    """The values that enter and leave blocks."""
    names = {n for stack in stacks for block in stack.blocks for n in (*block.inputs, *block.outputs)}
    return [node for node in found.nodes if node.name in names]


def _runs(found: Findings, node: fx.Node) -> tuple[TokenRun, ...]:
    """What the one dimension of tokens of a value is made of; nothing where there are several."""
    dims = [dim for dim in found.walk.dims(node) if found.tokens.in_dim(dim)]
    return found.tokens.runs_of(dims[0]) if len(dims) == 1 else ()


def _axes(found: Findings, node: fx.Node) -> tuple[str | None, ...]:
    if shape(node) is None:
        return ()
    named: list[str | None] = []
    for dim in found.walk.dims(node):
        leaves = found.walk.algebra.leaves(dim)
        if any(found.tokens.is_token(atom) for atom in leaves):
            named.append("tokens")
        elif any(found.walk.algebra.find(atom) in found.tokens.batch for atom in leaves):
            named.append("batch")
        else:
            named.append("features" if leaves and leaves[-1].rank else None)
    return tuple(named)
