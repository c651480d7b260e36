"""Cuts a guarded graph into parts, between which the runtime takes the branch: the lowering ``split``.

Five parts: the model's own in front of the decision; the decision; the region, computed for all samples, for some or
for none; the model's own behind it; and what the guard remembers. Weights, packed weights and state are read by each
part where it needs them, and of what one part computes another is handed what it reads and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ditc.runtime.artifact import Segment
from ditc.runtime.branched import Arm, Branched, Part, nothing
from ditc.runtime.stopwatch import Work

from ..capture import INPUT, GraphInput, fake_mode_of
from ..rewrite import ancestors, input_of
from ..trace import trace_here
from .branches import OWNED, Branches
from .decide import Decision
from .state import PART

Lower = Callable[[fx.GraphModule], Segment]

GUARD = "ditc_guard"
"""Key in a rewritten graph's ``meta`` of its :class:`Guard`."""


@dataclass(frozen=True)
class Guard:
    """Where a guard stands in a rewritten graph, for lowerings that take it apart.

    Attributes:
        lowering: ``cond``, ``split`` or ``schedule``.
        decided, branches: what the guard is made of.
        samples: how many decisions there are; 1 where only a call knows, and then all samples are computed or none.
        partial: the branch that computes with room for fewer samples than there are, by that room.
    """

    lowering: str
    decided: Decision
    branches: Branches
    samples: int
    partial: tuple[tuple[int, fx.GraphModule], ...] = ()

    def arms(self) -> list[tuple[int, fx.GraphModule]]:
        """All branches by how many samples they have room for."""
        return [(0, self.branches.reuse), *self.partial, (self.samples, self.branches.compute)]


@dataclass(frozen=True)
class Opened:
    """A branch as a graph of its own.

    Attributes:
        module: takes ``reads``, returns what it computes; ``None`` where that is nothing.
        reads: nodes of the guarded graph.
        gives: of each of the branch's results, the node that it is, where it is an operand; else its position in what
            ``module`` returns.
    """

    module: fx.GraphModule | None
    reads: tuple[fx.Node, ...]
    gives: tuple[fx.Node | int, ...]


def split(graph: fx.GraphModule, guard: Guard, lower: Lower) -> Branched:
    """The parts of ``graph``, each compiled by ``lower``."""
    missing = count_missing(graph, guard)
    cut = _Cut(graph, guard, lower)
    opened = [(room, open_branch(graph, branch, guard.branches.operands)) for room, branch in guard.arms()]
    wanted = {missing, *(node for _, branch in opened for node in (*branch.reads, *_nodes(branch.gives)))}
    before = [*cut.part("head", wanted), *cut.part("decide", wanted, "guard")]
    arms = [Arm(room, cut.arm(branch)) for room, branch in opened]
    cut.number([*guard.branches.exits, *guard.branches.kept])
    after = [*cut.part("tail", wanted), *cut.part("settle", wanted, "guard")]
    returns = tuple(cut.numbers[node] for node in cut.returned)
    return drop_unread(
        Branched(tuple(before), cut.numbers[missing], tuple(arms), tuple(after), returns), len(cut.inputs)
    )


def count_missing(graph: fx.GraphModule, guard: Guard) -> fx.Node:
    """A node, int64 scalar: how many samples must be computed."""
    with graph.graph.inserting_before(guard.branches.cond):
        found: fx.Node = trace_here(
            graph.graph,
            fake_mode_of(graph),
            lambda hit: hit.logical_not().sum(),
            [guard.decided.hit],
            {PART: "decide"},
        )
    return found


class _Cut:
    """A graph being cut. ``numbers`` holds the number of each value that has one so far."""

    def __init__(self, graph: fx.GraphModule, guard: Guard, lower: Lower) -> None:
        self.graph, self.lower = graph, lower
        self.inputs = graph.graph.find_nodes(op="placeholder")
        self.numbers = {node: i for i, node in enumerate(self.inputs)}
        self.groups = _groups(graph.graph, guard.branches.cond)
        self.output = graph.graph.output_node()
        self.returned: Sequence[Any] = self.output.args[0]  # type: ignore[assignment]

    def part(self, group: str, wanted: set[fx.Node], work: Work = "model") -> list[Part]:
        """The part of one group, which gives what others read and what is ``wanted``; none where that is nothing."""
        nodes = [node for node, its in self.groups.items() if its == group]
        results = [node for node in nodes if node in wanted or self._leaves(node, group)]
        if not results:
            return []
        module, reads = extract(self.graph, nodes, results)
        made = Part(self.lower(module), tuple(self.numbers[n] for n in reads), tuple(range(len(results))), work=work)
        self.number(results)
        return [made]

    def arm(self, branch: Opened) -> Part:
        """A branch as a part."""
        run = self.lower(branch.module) if branch.module is not None else nothing
        gives = tuple(g if isinstance(g, int) else -1 - self.numbers[g] for g in branch.gives)
        return Part(run, tuple(self.numbers[node] for node in branch.reads), gives)

    def number(self, nodes: Sequence[fx.Node]) -> None:
        """Gives the next numbers to ``nodes``."""
        self.numbers |= {node: len(self.numbers) + i for i, node in enumerate(nodes)}

    def _leaves(self, node: fx.Node, group: str) -> bool:
        return any(self.groups.get(user, group) not in (group, "branch") or user is self.output for user in node.users)


def _groups(graph: fx.Graph, cond: fx.Node) -> dict[fx.Node, str]:
    """Of each call the part that it belongs to: those of the guard say so themselves."""
    needed = ancestors([cond])
    groups: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if PART in node.meta:
            groups[node] = node.meta[PART]
        elif node.target is operator.getitem:
            groups[node] = groups[node.args[0]]  # what returns several values goes with them
        elif node.op == "call_function":
            groups[node] = "head" if node in needed else "tail"
    return groups


def extract(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], results: Sequence[fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """``nodes``, in program order, as a graph of their own that returns ``results``; and what it takes."""
    inside = set(nodes)
    read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr")
    reads = _with_sizes(graph, list(read))
    new = fx.Graph()
    copied = {node: _placeholder(new, node) for node in reads}
    for node in nodes:
        for constant in node.all_input_nodes:
            if constant.op == "get_attr" and constant not in copied:
                copied[constant] = new.node_copy(constant)
        copied[node] = new.node_copy(node, copied.__getitem__)
    new.output(tuple(copied[node] for node in results))
    return fx.GraphModule(graph, new), reads


def open_branch(graph: fx.GraphModule, branch: fx.GraphModule, operands: Sequence[fx.Node]) -> Opened:
    """A branch of a ``cond`` in ``graph`` as a graph of its own; a result that is an operand is passed on."""
    inner = branch.graph.find_nodes(op="placeholder")
    used = [operand for node, operand in zip(inner, operands, strict=True) if _computes(node)]
    reads = _with_sizes(graph, used)
    new = fx.Graph()
    places = {node: _placeholder(new, node) for node in reads}
    results = inline(branch, new, [places.get(operand, operand) for operand in operands])
    returned = [result for result in results if result.graph is new]
    new.output(tuple(returned))
    gives = tuple(returned.index(result) if result.graph is new else result for result in results)
    return Opened(fx.GraphModule(branch, new) if returned else None, tuple(reads if returned else ()), gives)


def _computes(operand: fx.Node) -> bool:
    """Whether anything in a branch reads an operand, besides copies that only a ``cond`` needs."""
    owned = {result.meta[OWNED] for result in operand.graph.output_node().args[0]}  # type: ignore[union-attr]
    pending, found = list(operand.users), set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in owned:
            return True
        if node not in found:
            found.add(node)
            pending += node.users
    return False


def inline(branch: fx.GraphModule, new: fx.Graph, operands: Sequence[fx.Node]) -> list[fx.Node]:
    """Puts what a branch computes into ``new``; its results, without the copies that a ``cond`` must make.

    Results are contiguous, as their readers expect, and each is another tensor: what is used and also kept is there
    twice, so that nobody changes the one through the other. Those that are operands stay what they are.
    """
    inner = branch.graph.find_nodes(op="placeholder")
    copied = dict(zip(inner, operands, strict=True))
    values = [result.meta[OWNED] for result in branch.graph.output_node().args[0]]  # type: ignore[union-attr]
    needed = ancestors(values, copied)
    for node in branch.graph.nodes:
        if node in needed:
            copied[node] = new.node_copy(node, copied.__getitem__)
    results: list[fx.Node] = []
    for value in values:
        result = copied[value]
        if value not in inner and (result in results or not result.meta["val"].is_contiguous()):
            result = trace_here(new, fake_mode_of(branch), _copy, [result], {})
        results.append(result)
    return results


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _placeholder(new: fx.Graph, node: fx.Node) -> fx.Node:
    """An input of a part: one of the program's, or what another part computes."""
    if node.op == "placeholder":
        found = new.node_copy(node)
        if hasattr(node, "_dynamo_source"):
            found._dynamo_source = node._dynamo_source
        return found
    found = new.placeholder(node.name)
    kind = "data" if isinstance(node.meta["val"], torch.Tensor) else "size"
    found.meta = {"val": node.meta["val"], INPUT: GraphInput(node.name, kind)}  # type: ignore[arg-type]
    return found


def _with_sizes(graph: fx.GraphModule, reads: list[fx.Node]) -> list[fx.Node]:
    """``reads`` and, in front of them, the inputs that say how large they are."""
    sizes = [n for n in graph.graph.find_nodes(op="placeholder") if input_of(n).kind == "size" and n not in reads]
    return [*sizes, *reads]


def _nodes(gives: Iterable[fx.Node | int]) -> list[fx.Node]:
    return [node for node in gives if isinstance(node, fx.Node)]


def drop_unread(program: Branched, given: int) -> Branched:
    """The same program that lets go of each value behind its last reader; the ``given`` inputs are the caller's."""
    stages = [[part] for part in program.before] + [[arm.part for arm in program.arms]] + [[p] for p in program.after]
    last: dict[int, int] = {program.decision: len(program.before)}
    count = given
    for at, stage in enumerate(stages):
        made = range(count, count + len(stage[0].gives))
        read = [n for part in stage for n in (*part.reads, *(-1 - g for g in part.gives if g < 0))]
        last |= {n: max(at, last.get(n, at)) for n in (*read, *made)}
        count += len(made)
    kept = set(program.returns)

    def drops(at: int) -> tuple[int, ...]:
        return tuple(n for n, final in last.items() if final == at and n >= given and n not in kept)

    behind = len(program.before)
    return replace(
        program,
        before=tuple(replace(part, drops=drops(at)) for at, part in enumerate(program.before)),
        arms=tuple(replace(arm, part=replace(arm.part, drops=drops(behind))) for arm in program.arms),
        after=tuple(replace(part, drops=drops(behind + 1 + at)) for at, part in enumerate(program.after)),
    )
