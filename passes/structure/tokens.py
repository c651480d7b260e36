"""Token axes: which atoms attention runs over, and where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from .axes import DATA, FEATURE, Atom, AxisAlgebra, Dim, rank_of, size_of
from .facts import SubAxis, TokenAxis, TokenRun
from .flow import CONVOLUTIONS, CUTS, VIEWS, Dependence
from .ops import content, graph_input, packet, shape, tensors, value
from .sites import Site
from .walk import Walk


@dataclass
class Tokens:
    """Which atoms are tokens, and their names."""

    algebra: AxisAlgebra
    atoms: set[Atom] = field(default_factory=set)
    batch: set[Atom] = field(default_factory=set)
    axes: list[TokenAxis] = field(default_factory=list)
    main: TokenAxis | None = None
    names: dict[Atom, str] = field(default_factory=dict)
    grid: dict[Atom, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _known: dict[Atom, bool] = field(default_factory=dict)

    def is_token(self, atom: Atom) -> bool:
        """Whether an atom counts tokens, or some of them."""
        if atom not in self._known:
            root = self.algebra.find(atom)
            found = root in self.atoms or atom in self.atoms
            if not found and atom.segments:
                found = any(self.is_token(leaf) for leaf in self.algebra.leaves((atom,)))
            if not found and atom.relation in ("slice", "split", "mixed"):
                found = any(self.is_token(parent) for parent in atom.parents)
            self._known[atom] = found
        return self._known[atom]

    def in_dim(self, dim: Dim) -> bool:
        return any(self.is_token(atom) for atom in dim)

    def carried_by(self, walk: Walk, node: fx.Node) -> bool:
        """Whether a value has a token axis."""
        found = walk.axes.get(node, ())
        many = found if isinstance(found, list) else [found]
        return any(self.in_dim(dim) for dims in many for dim in dims)

    def rooted_in(self, walk: Walk, node: fx.Node) -> bool:
        """Whether a token axis is made from one of a value's dimensions, pixels to patches included."""
        roots = {root for dim in walk.dims(node) for atom in dim for root in self.algebra.roots(atom)}
        return any(root in self.names for root in roots)

    def names_of(self, dims: Iterable[Dim]) -> tuple[str, ...]:
        """The token axes that dimensions run over, in order, without repetition."""
        found: list[str] = []
        for dim in dims:
            for leaf in self.algebra.leaves(dim):
                if self.is_token(leaf):
                    for name in sorted({self.names.get(root, "") for root in self.algebra.roots(leaf)} - {""}):
                        if name not in found:
                            found.append(name)
        return tuple(found)

    def runs_of(self, dim: Dim) -> tuple[TokenRun, ...]:
        """The tokens of a dimension in their order, a run for each part of a concatenation."""
        pieces = dim[0].segments if len(dim) == 1 and dim[0].segments else ((dim, size_of(dim)),)
        return tuple(self._run(part, size) for part, size in pieces)

    def _run(self, dim: Dim, size: int) -> TokenRun:
        names = self.names_of((dim,))
        sizes = {axis.name: axis.size for known in self.axes if known.name in names for axis in known.sub_axes}
        grid = [SubAxis(axes[0], atom.size) for atom in dim if len(axes := self.sub_axes_of((atom,))) == 1]
        # each axis whole and once, or the order of the tokens is not known
        proven = len(grid) == len(dim) and {axis.name: axis.size for axis in grid} == sizes and len(grid) == len(sizes)
        return TokenRun(names[0] if len(names) == 1 else "", size, tuple(grid) if proven else ())

    def sub_axes_of(self, dim: Dim) -> tuple[str, ...]:
        """The grid axes that a dimension runs over, in order."""
        found: list[str] = []
        for leaf in self.algebra.leaves(dim):
            for root in self.algebra.roots(leaf):
                name = self.grid.get(root)
                if name and name not in found:
                    found.append(name)
        return tuple(found)


def find_tokens(graph: fx.Graph, walk: Walk, flow: Dependence, sites: list[Site], rows: list[Dim]) -> Tokens:
    """The token axes of a graph; ``rows`` are the row dimensions of its largest linears, used without attention."""
    tokens = Tokens(walk.algebra)
    over = [site for site in sites if site.over_tokens]
    if len(over) < len(sites):
        tokens.notes.append(f"{len(sites) - len(over)} attention(s) run over features, not over tokens.")
    for site in over:
        for dim in (site.query_dim, site.key_dim):
            tokens.atoms |= {walk.algebra.find(a) for a in walk.algebra.leaves(dim) if a.rank != FEATURE}
    if not over:
        tokens.atoms |= {walk.algebra.find(a) for dim in rows for a in walk.algebra.leaves(dim) if a.rank == DATA}
        if tokens.atoms:
            tokens.notes.append("No attention: the token axis is what the largest linears have for rows.")
    lead = {walk.algebra.find(a) for site in over for dim in site.lead for a in walk.algebra.leaves(dim)}
    sources = {root.source for atom in tokens.atoms for root in walk.algebra.roots(atom)} - {""}
    # windows and factorised attention hold the rest of the grid in the batch; the batch itself comes first
    roots = {atom: walk.algebra.roots(atom) for atom in lead if atom.rank == DATA}
    tokens.atoms |= {atom for atom, of in roots.items() if of and all(r.dim > 0 and r.source in sources for r in of)}
    tokens.batch = lead - tokens.atoms
    _close(tokens)
    tokens._known.clear()
    _name(graph, walk, flow, tokens)
    tokens.main = _main(graph, walk, tokens)
    met = [name for site in over for name in tokens.names_of((site.query_dim, site.key_dim))]
    order = {name: i for i, name in enumerate(dict.fromkeys(met))}
    # not in the order of the inputs, which depends on how the graph was captured
    tokens.axes.sort(key=lambda axis: (axis is not tokens.main, axis.source == "weight", order.get(axis.name, 0)))
    return tokens


def _close(tokens: Tokens) -> None:
    """Tokens chosen out of an axis make it a token axis; so do two factors that both count tokens."""
    pending = list(tokens.atoms)
    while pending:
        atom = pending.pop()
        parents: tuple[Atom, ...] = ()
        if atom.relation == "slice":
            parents = tuple(parent for parent in atom.parents if parent.rank == DATA)
        elif atom.relation == "split":
            siblings = tokens.algebra.split(atom.parents[0], atom.parents[0].size // _inner(tokens, atom))
            if all(tokens.algebra.find(s) in tokens.atoms | tokens.batch for s in siblings):
                parents = atom.parents
        for parent in parents:
            root = tokens.algebra.find(parent)
            if root not in tokens.atoms and root not in tokens.batch:
                tokens.atoms.add(root)
                pending.append(root)


def _inner(tokens: Tokens, atom: Atom) -> int:
    return atom.parents[0].size // atom.size if atom.index == 0 else atom.size


Ranks = dict[str, tuple[int, bool]]
"""By input, in order: its number of dimensions, and whether it is a weight."""


def _name(graph: fx.Graph, walk: Walk, flow: Dependence, tokens: Tokens) -> None:
    """Groups token atoms by the input that brings them in, and names the axes of its grid."""
    content = _content_inputs(graph, flow)
    ranks = {fact.name: (len(shape(n) or ()), fact.is_weight) for n in graph.nodes if (fact := graph_input(n))}
    order = {name: i for i, name in enumerate(ranks)}
    groups: dict[str, dict[int, Atom]] = {}
    places: dict[Atom, tuple[str, int]] = {}
    nameless = 0
    for atom in sorted(tokens.atoms, key=lambda a: (a.source, a.dim, -a.size)):
        for root in tokens.algebra.roots(atom):
            if root.rank == FEATURE:
                continue
            named = _content_member(tokens.algebra, root, content, ranks)
            if not named.source:
                nameless = max(nameless, atom.size)
                continue
            tokens.names[root] = named.source
            held = groups.setdefault(named.source, {}).get(named.dim)
            if held is None or atom.size > held.size:
                groups[named.source][named.dim] = atom
            places[root] = (named.source, named.dim)
    if nameless and not groups:
        tokens.notes.append(f"Attention runs over {nameless} positions whose origin is not visible in the graph.")
    for name in sorted(groups, key=lambda n: order.get(n, 0)):
        axis, called = _axis(name, groups[name], *ranks.get(name, (3, False)))
        tokens.axes.append(axis)
        tokens.grid |= {root: called[dim] for root, (source, dim) in places.items() if source == name and dim in called}


def _axis(name: str, dims: dict[int, Atom], rank: int, weight: bool) -> tuple[TokenAxis, dict[int, str]]:
    """One token axis from the atoms that an input brings in, by dimension; and what its grid's axes are called."""
    size = 1
    for atom in dims.values():
        size *= atom.size
    if weight or (len(dims) == 1 and rank < 4):
        return TokenAxis(name, size, (), "weight" if weight else "data"), {}
    at = sorted(dims)
    labels = ["frames", "height", "width"][-len(at) :]
    labels = [f"axis {i}" for i in range(len(at) - len(labels))] + labels
    called = dict(zip(at, labels, strict=True))
    return TokenAxis(name, size, tuple(SubAxis(called[i], dims[i].size) for i in at)), called


def _content_inputs(graph: fx.Graph, flow: Dependence) -> set[str]:
    """Inputs that reach a linear or a convolution through views alone: what tokens are made of."""
    reached: dict[fx.Node, set[str]] = {}
    found: set[str] = set()
    for node in graph.nodes:
        fact = graph_input(node)
        if fact is not None and fact.kind == "data":
            reached[node] = {fact.name}
            continue
        operands = content(node) if node.op == "call_function" else []
        here: set[str] = set().union(*(reached.get(n, set()) for n in operands)) if operands else set()
        if node in flow.learned and here and not any(n in flow.learned for n in operands):
            found |= here
        elif here and (packet(node) in VIEWS | CUTS or len(operands) == 1 or packet(node) not in CONVOLUTIONS):
            reached[node] = here if len(here) < 4 else set()
    return found


def _content_member(algebra: AxisAlgebra, root: Atom, content: set[str], ranks: Ranks) -> Atom:
    """Of the inputs known to share an axis, the first that tokens are made of: it has features (a mask has none)."""
    order = {name: i for i, name in enumerate(ranks)}
    members = [atom for atom in algebra.members(root) if not atom.relation]
    members.sort(key=lambda atom: order.get(atom.source, len(order)))
    return max(members, key=lambda atom: _content(atom, content, ranks), default=root)


def _content(atom: Atom, content: set[str], ranks: Ranks) -> tuple[bool, bool, bool]:
    rank, _ = ranks.get(atom.source, (0, False))
    return atom.source in content and rank > 2, atom.source in content, bool(atom.source) and atom.dim > 0


def _main(graph: fx.Graph, walk: Walk, tokens: Tokens) -> TokenAxis | None:
    """The axis of what the model returns."""
    if not tokens.axes:
        return None
    by_name = {axis.name: axis for axis in tokens.axes}
    output = next(node for node in graph.nodes if node.op == "output")
    for result in tensors(output) or list(output.all_input_nodes):
        if value(result) is None:
            continue
        named = [name for name in tokens.names_of(walk.dims(result)) if by_name[name].source == "data"]
        if named:
            return max((by_name[name] for name in named), key=lambda axis: (len(axis.sub_axes), axis.size))
        # an output of whole pixels: its axes are the grid's, with the patches merged back in
        for dim in walk.dims(result):
            for root in (r for a in walk.algebra.leaves(dim) for r in walk.algebra.roots(a)):
                if rank_of((root,)) == DATA and tokens.names.get(root) in by_name:
                    return by_name[tokens.names[root]]
    tokens.notes.append("The model's outputs carry no token axis: the largest token axis is taken for the main one.")
    return max(tokens.axes, key=lambda axis: (axis.source == "data", axis.size))
