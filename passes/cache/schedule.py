"""Decisions that no data has a part in: the lowering ``schedule``, for which the host decides alone.

What decides is cut out of the guarded graph by its data flow, which is also the proof: it may read the guard's own
vectors and the numbers of the call, and nothing else; or, for policies that look at its embedding, the timestep and
weights too. It runs on the host, on the same operators; what is left becomes two straight-line programs, one that
computes and one that reuses, neither of which waits for anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from ditc.runtime.artifact import StateSpec
from ditc.runtime.branched import Arm, Branched, Part, nothing
from ditc.runtime.hosted import Embedded, Remembered

from ..capture import INPUT, GraphInput
from ..rewrite import ancestors, aten, device_of, input_of
from .borders import BORDER
from .cut import Guard, Lower, count_missing, drop_unread, extract, inline
from .state import FINITE, PART


def host_entries(state: StateSpec, vectors: Iterable[str]) -> frozenset[str]:
    """Names of the state that the host would keep: these of a guard's, but for what is seen in the result."""
    mine = {f"cache.{name}" for name in vectors if name != FINITE}
    return frozenset(entry.name for entry in state.entries if entry.name in mine)


def obstacle(
    graph: fx.GraphModule, guard: Guard, state: Sequence[str], host: frozenset[str], timestep: str | None = None
) -> str | None:
    """Why the host cannot decide alone; ``None`` where it can.

    Args:
        graph: holds the guard.
        guard: what decides.
        state: names of all state, in order.
        host: of these, what the host would keep.
        timestep: name of the input that the host may read, weights along with it; ``None`` where it reads neither.
    """
    allowed = {*host, f"cache.{FINITE}", "cache.controls", *([timestep] if timestep is not None else [])}
    results = [guard.decided.hit, *_new_state(graph, state, host).values()]
    read = ancestors(results)
    facts = [input_of(node) for node in read if node.op == "placeholder"]
    others = [fact for fact in facts if fact.name not in allowed and not (timestep is not None and fact.is_weight)]
    if not others:
        strange = sorted({str(n.target) for n in ancestors(_given(graph, results)) if not _runs_anywhere(n)})
        return f"the host cannot run {' and '.join(strange)}" if strange else None
    data = sorted(repr(fact.name) for fact in others if fact.kind == "data")
    what = " and ".join(data) or f"the {others[0].kind} {others[0].name!r}"
    return f"what it decides by depends on {what}, not on the numbers of steps alone"


def schedule(graph: fx.GraphModule, guard: Guard, state: Sequence[str], host: frozenset[str], lower: Lower) -> Branched:
    """The host's decision and the two programs, compiled by ``lower``."""
    missing = count_missing(graph, guard)
    new = _new_state(graph, state, host)
    inputs = _inputs(graph)
    numbers = {node: i for i, node in enumerate(inputs)}
    given = _given(graph, [missing, *new.values()])
    before = []
    if given:
        module, reads, weights = _embedding(graph, given)
        embed = Embedded(module, len(reads) - weights, weights)
        before.append(Part(embed, tuple(numbers[n] for n in reads), tuple(range(len(given))), work="guard"))
        numbers |= {node: len(inputs) + i for i, node in enumerate(given)}
    programs = [(room, _straight(graph, guard, branch, set(new.values()))) for room, branch in guard.arms()]
    feeds = [
        node for node in (guard.decided.hit, *_host_inputs(inputs, host)) if any(node in p[1] for _, p in programs)
    ]
    made = [missing, *(node for node in new.values() if node not in given)]
    module, reads = _on_host(graph, made, feeds, given)
    count = len(numbers)
    results = len(made) + len(feeds)
    # forty operators on a few numbers: on a host that waits for nobody, calling them one by one is all they cost
    run_decide = lower(module) if device_of(graph).type == "cpu" else module
    decide = Part(Remembered(run_decide), tuple(numbers[n] for n in reads), tuple(range(results)), work="guard")
    numbers |= {node: count + i for i, node in enumerate(made)}
    fed = numbers | {node: count + len(made) + i for i, node in enumerate(feeds)}
    returned: Sequence[Any] = graph.graph.output_node().args[0]  # type: ignore[assignment]
    first = count + results
    device = [node for node in returned if node not in set(new.values())]
    arms = []
    for room, (program, taken, gives) in programs:
        run = lower(program) if any(isinstance(g, int) for g in gives) else nothing
        passed = tuple(g if isinstance(g, int) else -1 - fed[g] for g in gives)
        arms.append(Arm(room, Part(run, tuple(fed[node] for node in taken), passed)))
    at = {node: first + i for i, node in enumerate(device)}
    returns = tuple(at[node] if node in at else numbers[node] for node in returned)
    return drop_unread(Branched((*before, decide), numbers[missing], tuple(arms), (), returns), len(inputs))


def _host_inputs(inputs: Sequence[fx.Node], host: frozenset[str]) -> list[fx.Node]:
    return [node for node in inputs if input_of(node).name in host]


def _new_state(graph: fx.GraphModule, state: Sequence[str], host: frozenset[str]) -> dict[str, fx.Node]:
    """What the graph returns of the state in ``host``."""
    returned: Sequence[Any] = graph.graph.output_node().args[0]  # type: ignore[assignment]
    return {
        name: node for name, node in zip(state, returned[len(returned) - len(state) :], strict=True) if name in host
    }


def _given(graph: fx.GraphModule, results: Sequence[fx.Node]) -> list[fx.Node]:
    """Of what makes ``results``, in program order: what data and weights alone make, where it is a result or others
    read it."""
    carried, outside, mine = set[fx.Node](), set[fx.Node](), ancestors(results)
    for node in graph.graph.nodes:
        if node not in mine:
            continue
        kind = input_of(node).kind if node.op == "placeholder" else None
        if kind in ("state", "control") or any(n in carried for n in node.all_input_nodes):
            carried.add(node)
        elif kind is not None or any(n in outside for n in node.all_input_nodes):
            outside.add(node)
    return [n for n in graph.graph.nodes if n in outside and (n in results or not carried.isdisjoint(n.users))]


def _runs_anywhere(node: fx.Node) -> bool:
    """Whether the host has the operator of a node too, with nothing that lies on a device."""
    if node.op == "get_attr":
        return False
    # borders are gone before anything runs
    return node.op != "call_function" or BORDER in node.meta or getattr(node.target, "namespace", "aten") == "aten"


def _cut_out(
    graph: fx.GraphModule, results: Sequence[fx.Node], given: Sequence[fx.Node] = ()
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """What makes ``results`` of what is ``given`` and of inputs, as a graph of its own; and what it takes."""
    mine = ancestors(results, given)
    return extract(graph, [n for n in graph.graph.nodes if n in mine and n.op == "call_function"], results)


def _embedding(graph: fx.GraphModule, given: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], int]:
    """What makes ``given``, for the host; what it takes, weights last, and how many of these there are."""
    module, reads = _cut_out(graph, given)
    places = _inputs(module)
    weights = [i for i, read in enumerate(reads) if input_of(read).is_weight]
    turned = [*(i for i in range(len(reads)) if i not in weights), *weights]
    for i in reversed(turned):
        next(iter(module.graph.nodes)).prepend(places[i])
    _stay(module)
    module.recompile()
    return module, [reads[i] for i in turned], len(weights)


def _stay(module: fx.GraphModule) -> None:
    """What operators make new they make on the host."""
    for node in module.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}


def _straight(
    graph: fx.GraphModule, guard: Guard, branch: fx.GraphModule, host: set[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node | int]]:
    """The graph with one branch in the place of the ``cond``, and without what the host computes.

    Returns:
        The program, what it takes, and what it gives of the graph's results but for those in ``host``: an input that
        is passed on, or the position of a result.
    """
    new = fx.Graph()
    hit = new.placeholder("hit")
    hit.meta = {"val": guard.decided.hit.meta["val"], INPUT: GraphInput("hit", "data")}
    copied = {guard.decided.hit: hit}
    skipped = {guard.branches.cond, *guard.branches.exits, *guard.branches.kept}
    for node in graph.graph.nodes:
        if node is guard.branches.cond:
            inlined = inline(branch, new, [copied[operand] for operand in guard.branches.operands])
            copied |= zip((*guard.branches.exits, *guard.branches.kept), inlined, strict=True)
        elif node.op == "output" or node in copied or node in skipped or node.meta.get(PART) == "branch":
            continue
        else:
            copied[node] = new.node_copy(node, copied.__getitem__)
            if hasattr(node, "_dynamo_source"):
                copied[node]._dynamo_source = node._dynamo_source
    results: Sequence[Any] = graph.graph.output_node().args[0]  # type: ignore[assignment]
    wanted = [node for node in results if node not in host]
    inputs = {copied[node]: node for node in (*_inputs(graph), guard.decided.hit)}
    returned = [copied[node] for node in wanted if copied[node] not in inputs]
    gives = [inputs[copied[n]] if copied[n] in inputs else returned.index(copied[n]) for n in wanted]
    new.output(tuple(returned))
    new.eliminate_dead_code()
    taken = []
    for node in new.find_nodes(op="placeholder"):
        if node.users or input_of(node).kind == "size":
            taken.append(inputs[node])
        else:
            new.erase_node(node)
    return fx.GraphModule(graph, new), taken, gives


def _on_host(
    graph: fx.GraphModule, results: Sequence[fx.Node], feeds: Sequence[fx.Node], given: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """What the host computes from what is ``given`` and its state, and what of these the programs are fed, on their
    device."""
    module, reads = _cut_out(graph, [*results, *feeds], given)
    device = device_of(graph)
    _stay(module)
    if device.type != "cpu":
        _look_at_nothing(module, reads)
        _send(module, len(feeds), device)
    module.recompile()
    return module, reads


def _look_at_nothing(module: fx.GraphModule, reads: list[fx.Node]) -> None:
    """Whether results were finite is on the device, and to see it would be to wait: they are taken to be."""
    places = {input_of(read).name: node for node, read in zip(_inputs(module), reads, strict=True)}
    finite = places.get(f"cache.{FINITE}")
    if finite is None:
        return
    with module.graph.inserting_before(next(iter(finite.users))):
        ones = module.graph.call_function(aten.ones_like.default, (places["cache.step"],))
    finite.replace_all_uses_with(ones)
    module.graph.erase_node(finite)
    reads[:] = [read for read in reads if input_of(read).name != f"cache.{FINITE}"]


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return module.graph.find_nodes(op="placeholder")


def _send(module: fx.GraphModule, count: int, device: torch.device) -> None:
    """Puts the last ``count`` results on the device; the host does not wait for that."""
    output = module.graph.output_node()
    returned = list(output.args[0])  # type: ignore[arg-type]
    with module.graph.inserting_before(output):
        for i in range(len(returned) - count, len(returned)):
            returned[i] = module.graph.call_function(aten._to_copy.default, (returned[i],), {"device": device})
    output.args = (tuple(returned),)
