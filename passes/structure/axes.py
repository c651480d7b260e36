"""Axes with provenance: what each dimension of a value enumerates.

A dimension is a row-major product of *atoms*; an empty product has size one. Atoms remember where they come from, so
that ``(B, C, H, W) -> (B, h·w, p·p·C)`` still shows height and width in its middle dimension, and slicing a
concatenation at its seams gives the parts back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Rank = Literal[0, 1, 2, 3]
NONE, CONSTANT, FEATURE, DATA = 0, 1, 2, 3
"""How much a dimension says: nothing, made from sizes or weights, made by a linear, carried in by the caller."""


@dataclass(eq=False, frozen=True)
class Atom:
    """One indivisible (so far) axis. Compared by identity; an :class:`AxisAlgebra` makes each one once.

    ``relation`` says how it came from ``parents``: a factor of a split dimension, a slice (or any other choice of
    indices) of one, or a mixture that cannot be taken apart. ``segments`` lists the parts of a concatenation.
    """

    size: int
    rank: int
    source: str = ""
    dim: int = -1
    relation: Literal["", "split", "slice", "mixed", "concat", "repeat"] = ""
    parents: tuple[Atom, ...] = ()
    index: int = 0
    segments: tuple[tuple[Dim, int], ...] = ()
    start: int = 0


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def size_of(dim: Dim) -> int:
    return math.prod(atom.size for atom in dim)


def rank_of(dim: Dim) -> int:
    return max((atom.rank for atom in dim), default=NONE)


@dataclass
class AxisAlgebra:
    """Makes atoms, remembers which of them are the same axis, and carries dimensions through reshapes and cuts."""

    _splits: dict[tuple[Atom, int], tuple[Atom, Atom]] = field(default_factory=dict)
    _slices: dict[tuple[Atom, int, int], Atom] = field(default_factory=dict)
    _alias: dict[Atom, Atom] = field(default_factory=dict)
    _members: dict[Atom, list[Atom]] = field(default_factory=dict)
    _roots: dict[Atom, frozenset[Atom]] = field(default_factory=dict)

    def fresh(self, size: int, rank: int, source: str = "", dim: int = -1) -> Dim:
        """A new axis; of size one, nothing."""
        return () if size == 1 and rank != DATA else (Atom(size, rank, source, dim),)

    def repeats(self, times: int) -> Dim:
        """An axis along which a value is the same: what an expanded or repeated dimension counts."""
        return () if times == 1 else (Atom(times, CONSTANT, relation="repeat"),)

    def made_from(self, contracted: Dim, size: int) -> Dim:
        """New features that a linear makes; they remember which input axes were contracted, as token mixing does."""
        if size == 1:
            return ()
        roots: dict[Atom, None] = {}
        for atom in self.leaves(contracted):
            roots |= dict.fromkeys(atom.parents if atom.relation == "mixed" else (atom,) if atom.rank == DATA else ())
        return (Atom(size, FEATURE, relation="mixed" if roots else "", parents=tuple(roots)),)

    # --- identity ------------------------------------------------------------------------------------------------

    def find(self, atom: Atom) -> Atom:
        """The representative of everything known to be the same axis as ``atom``."""
        while atom in self._alias:
            atom = self._alias[atom]
        return atom

    def members(self, atom: Atom) -> list[Atom]:
        """Everything known to be the same axis as ``atom``, itself included."""
        root = self.find(atom)
        return self._members.get(root, [root])

    def _union(self, a: Atom, b: Atom) -> None:
        a, b = self.find(a), self.find(b)
        if a is b:
            return
        self._alias[b] = a
        self._members[a] = self._members.get(a, [a]) + self._members.get(b, [b])

    def same(self, a: Dim, b: Dim) -> bool:
        return len(a) == len(b) and all(self.find(x) is self.find(y) for x, y in zip(a, b, strict=True))

    def unify(self, a: Dim, b: Dim) -> Dim:
        """Two dimensions that an operator walks in step: the one that says more, and both become one axis."""
        if a is b or rank_of(a) != rank_of(b) or size_of(a) != size_of(b):
            return a if rank_of(a) >= rank_of(b) else b
        if len(a) == len(b) and rank_of(a) == DATA and all(x.size == y.size for x, y in zip(a, b, strict=True)):
            for x, y in zip(a, b, strict=True):
                if x.rank == y.rank == DATA:
                    self._unify_atoms(x, y)
            return tuple(x if x.rank >= y.rank else y for x, y in zip(a, b, strict=True))
        return b if len(b) > len(a) else a

    def _unify_atoms(self, x: Atom, y: Atom) -> None:
        x, y = self.find(x), self.find(y)
        if not x.relation and not y.relation:
            self._union(x, y)
        elif not x.relation or not y.relation:
            # an axis that comes in whole (positions, a mask) is the one that was made in the graph
            made, whole = (y, x) if not x.relation else (x, y)
            if made.relation != "mixed" and whole not in self.roots(made):
                self._union(made, whole)
        elif x.relation == y.relation == "split" and x.index == y.index and x.parents[0].size == y.parents[0].size:
            self._unify_atoms(x.parents[0], y.parents[0])
        elif len(x.segments) == len(y.segments) and x.segments and x is not y:
            for (part_x, size_x), (part_y, size_y) in zip(x.segments, y.segments, strict=True):
                if size_x != size_y:
                    return
                self.unify(part_x, part_y)

    # --- cutting and joining -------------------------------------------------------------------------------------

    def split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        """Factors an axis of ``outer * inner`` elements, row-major."""
        inner = atom.size // outer
        key = (atom, outer)
        if key not in self._splits:
            made = [
                Atom(size, atom.rank, relation="split", parents=(atom,), index=index)
                for index, size in enumerate((outer, inner))
            ]
            self._splits[key] = (made[0], made[1])
        return self._splits[key]

    def merged(self, atoms: Iterable[Atom]) -> Dim:
        """Joins neighbouring factors of one axis back into it."""
        result: list[Atom] = []
        for atom in atoms:
            result.append(atom)
            while len(result) > 1 and self._factors(result[-2], result[-1]):
                parent = result[-1].parents[0]
                del result[-2:]
                result.append(parent)
        return tuple(result)

    @staticmethod
    def _factors(left: Atom, right: Atom) -> bool:
        return (
            left.relation == right.relation == "split"
            and left.parents == right.parents
            and (left.index, right.index) == (0, 1)
            and left.size * right.size == left.parents[0].size
        )

    def reshape(self, dims: Dims, sizes: Sequence[int]) -> Dims:
        """Carries row-major dimensions over to other ``sizes`` of the same product."""
        pending = [atom for dim in dims for atom in dim][::-1]
        result: list[Dim] = []
        for size in sizes:
            taken: list[Atom] | None = self._take(pending, size)
            if taken is None:
                return (*result, *self._mixed(pending, sizes[len(result) :]))
            result.append(self.merged(taken))
        return tuple(result)

    def _take(self, pending: list[Atom], size: int) -> list[Atom] | None:
        """Pops atoms of product ``size`` off the end of ``pending``, or leaves it as it is and returns None."""
        saved = list(pending)
        taken: list[Atom] = []
        need = size
        if size == 1:
            return [pending.pop()] if pending and pending[-1].size == 1 else []
        while need > 1 and pending:
            atom = pending.pop()
            if need % atom.size == 0:
                taken.append(atom)
                need //= atom.size
            elif atom.size % need == 0 and not atom.segments:
                outer, inner = self.split(atom, need)
                pending.append(inner)
                taken.append(outer)
                need = 1
            else:
                break
        if need == 1:
            return taken
        pending[:] = saved
        return None

    def _mixed(self, pending: list[Atom], sizes: Sequence[int]) -> Dims:
        """Dimensions that do not fall on the borders of atoms: each gets a mixture of all that is left."""
        parents = tuple(pending[::-1])
        rank = min(rank_of(parents), FEATURE) if len(sizes) > 1 else rank_of(parents)
        return tuple(() if size == 1 else (Atom(size, rank, relation="mixed", parents=parents),) for size in sizes)

    def cut(self, dim: Dim, start: int, stop: int, step: int = 1) -> Dim:
        """The elements ``start:stop:step`` of a dimension."""
        size = size_of(dim)
        start, stop = max(0, min(start, size)), max(0, min(stop, size))
        length = max(0, -(-(stop - start) // step))
        if length == size:
            return dim
        if length == 1:
            return ()
        if len(dim) == 1 and dim[0].segments and step == 1:
            return self._cut_segments(dim[0], start, stop)
        inner = size_of(dim[1:])
        if len(dim) > 1 and step == 1 and start % inner == 0 and stop % inner == 0:
            return (*self.cut(dim[:1], start // inner, stop // inner), *dim[1:])
        return self.chosen(dim, length, start)

    def _cut_segments(self, atom: Atom, start: int, stop: int) -> Dim:
        parts: list[tuple[Dim, int]] = []
        offset = 0
        for dim, size in atom.segments:
            low, high = max(start - offset, 0), min(stop - offset, size)
            if low < high:
                parts.append((self.cut(dim, low, high), high - low))
            offset += size
        return self.concat(parts)

    def chosen(self, dim: Dim, size: int, start: int = -1) -> Dim:
        """Some of the elements of a dimension (or more than it has, for padding), as a new axis made from it."""
        if size == 1:
            return ()
        if len(dim) == 1 and start >= 0:
            key = (dim[0], start, size)
            if key not in self._slices:
                self._slices[key] = Atom(size, rank_of(dim), relation="slice", parents=dim, start=start)
            return (self._slices[key],)
        return (Atom(size, rank_of(dim), relation="slice", parents=dim, start=start),)

    def concat(self, parts: Sequence[tuple[Dim, int]]) -> Dim:
        """Dimensions laid one after the other."""
        flat: list[tuple[Dim, int]] = []
        for dim, size in parts:
            if len(dim) == 1 and dim[0].segments:
                flat.extend(dim[0].segments)
            elif size:
                flat.append((dim, size))
        if len(flat) == 1:
            return flat[0][0]
        whole = self._rejoined(flat)
        if whole is not None:
            return whole
        rank = max((rank_of(dim) for dim, _ in flat), default=NONE)
        total = sum(size for _, size in flat)
        return (Atom(total, rank or CONSTANT, relation="concat", segments=tuple(flat)),)

    @staticmethod
    def _rejoined(parts: Sequence[tuple[Dim, int]]) -> Dim | None:
        """The axis itself, where ``parts`` are consecutive slices of the whole of it."""
        offset = 0
        parents: tuple[Atom, ...] | None = None
        for dim, size in parts:
            if len(dim) != 1 or dim[0].relation != "slice" or dim[0].start != offset:
                return None
            if parents is not None and dim[0].parents != parents:
                return None
            parents, offset = dim[0].parents, offset + size
        return parents if parents and size_of(parents) == offset else None

    # --- provenance ----------------------------------------------------------------------------------------------

    def leaves(self, dim: Dim) -> list[Atom]:
        """The atoms of a dimension with concatenations opened."""
        found: list[Atom] = []
        for atom in map(self.find, dim):
            if atom.segments:
                for part, _ in atom.segments:
                    found.extend(self.leaves(part))
            else:
                found.append(atom)
        return found

    def roots(self, atom: Atom) -> frozenset[Atom]:
        """The axes of inputs that an atom was cut or made from, as representatives."""
        atom = self.find(atom)
        if atom not in self._roots:
            if atom.segments:
                below = [self.roots(leaf) for leaf in self.leaves((atom,))]
            elif atom.parents:
                below = [self.roots(parent) for parent in atom.parents]
            else:
                return frozenset((self.find(atom),))  # not kept: the representative may still change
            self._roots[atom] = frozenset().union(*below) if below else frozenset()
        return frozenset(
            r for root in self._roots[atom] for r in (self.roots(root) if self.find(root) is not root else (root,))
        )
