"""Rows: which dimension of a value holds tokens, and of which of them a sparse step has fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ...structure.ops import shape


class TokensMixed(Exception):  # noqa: N818 - no fault: an outcome of the analysis
    """An operator of which it is not proven that it treats each token on its own."""

    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"{node.name} ({node.target}): {why}")
        self.node, self.why = node, why


@dataclass(frozen=True)
class Part:
    """A run of tokens along a dimension: ``size`` of them in a dense step; in a sparse one all or, where it is
    ``gathered``, those of the active chunks."""

    size: int
    gathered: bool


@dataclass(frozen=True)
class Rows:
    """The dimension of a value that holds tokens.

    Attributes:
        dim: it.
        batch: the dimension that counts samples, each with chunks of its own; ``None`` where all share theirs. Of an
            operand that is broadcast it may be negative: the operand lacks it.
        parts: the tokens in their order, one part of them gathered.
    """

    dim: int
    batch: int | None
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Tokens in a dense step."""
        return sum(part.size for part in self.parts)

    def count(self, gathered: int) -> int:
        """Tokens in a sparse step that gathers ``gathered`` of each gathered part."""
        return sum(gathered if part.gathered else part.size for part in self.parts)

    def at(self, dim: int, batch: int | None) -> Rows:
        """The same tokens in other dimensions."""
        return Rows(dim, batch, self.parts)

    def moved(self, place: Callable[[int], int]) -> Rows:
        """The same tokens where dimensions were renumbered."""
        return self.at(place(self.dim), None if self.batch is None else place(self.batch))

    def holds(self, dim: int) -> bool:
        """Whether a dimension is that of the tokens or of the samples."""
        return dim in (self.dim, self.batch)

    def cut(self, node: fx.Node, start: int, stop: int) -> tuple[Part, ...]:
        """The parts between two positions of a dense step.

        Raises:
            TokensMixed: a position lies inside a gathered part.
        """
        found, offset = [], 0
        for part in self.parts:
            low, high = max(start - offset, 0), min(stop - offset, part.size)
            offset += part.size
            if low >= high:
                continue
            if part.gathered and (low, high) != (0, part.size):
                raise TokensMixed(node, "it cuts the tokens of the latent apart")
            found.append(Part(high - low, part.gathered))
        return tuple(found)

    def with_parts(self, parts: tuple[Part, ...]) -> Rows | None:
        """Other tokens in the same dimension; ``None`` where none of them is gathered: the value is as in a dense
        step."""
        return Rows(self.dim, self.batch, parts) if any(part.gathered for part in parts) else None


Found = Rows | tuple[Rows | None, ...] | None
"""Of a node's value: rows; of a list of values: for each; ``None`` where its sizes are those of a dense step."""


@dataclass(frozen=True)
class Site:
    """An attention whose keys and values are those of all tokens: the active ones' fresh, the others' kept."""

    node: fx.Node
    key: fx.Node
    value: fx.Node
    rows: Rows


@dataclass(frozen=True)
class Step:
    """What becomes of one node in a sparse step.

    Attributes:
        out: rows of what it returns.
        take: operands that are there for all tokens, and where their rows are to be gathered.
        args: by position, arguments that hold a size: a function of the number of gathered tokens.
        site: of an attention that reads keys of all tokens.
    """

    out: Found
    take: Mapping[fx.Node, Rows] = field(default_factory=dict)
    args: Mapping[int, Callable[[int], Any]] = field(default_factory=dict)
    site: Site | None = None


class Known(dict[fx.Node, Found]):
    """The rows of every value that has any."""

    def rows(self, node: Any) -> Rows | None:
        """The rows of one value."""
        found = self.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Rows) else None


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a node's one value.

    Raises:
        TokensMixed: it has several.
    """
    found = shape(node)
    if found is None:
        raise TokensMixed(node, "it returns several values")
    return found


def along(reader: fx.Node, rank: int, rows: Rows, operand: fx.Node) -> Rows | None:
    """Where an operand that has all tokens is gathered when it meets ``rows`` of a value of ``rank`` dimensions;
    ``None`` where it is the same for all of them.

    Raises:
        TokensMixed: it has another number of tokens.
    """
    sizes = sizes_of(operand)
    shift = rank - len(sizes)
    found = rows.moved(lambda dim: dim - shift)
    if found.dim < 0 or sizes[found.dim] == 1:
        return None
    if sizes[found.dim] != rows.size:
        raise TokensMixed(reader, f"{operand.name} does not fit the tokens")
    return found


def meeting(reader: fx.Node, rank: int, operands: list[fx.Node], known: Known) -> tuple[Rows, dict[fx.Node, Rows]]:
    """The rows of a value of ``rank`` dimensions that operands are broadcast to, and which of them are gathered.

    Raises:
        TokensMixed: they hold tokens in different dimensions, or different tokens.
    """
    met: set[Rows] = set()
    for operand in operands:
        rows = known.rows(operand)
        if rows is not None:
            shift = rank - len(sizes_of(operand))
            met.add(rows.moved(lambda dim, shift=shift: dim + shift))  # type: ignore[misc]
    if len(met) != 1:
        raise TokensMixed(reader, "its operands hold tokens in different dimensions")
    (rows,) = met
    plain = [operand for operand in operands if known.rows(operand) is None]
    taken = {operand: along(reader, rank, rows, operand) for operand in plain}
    return rows, {operand: where for operand, where in taken.items() if where is not None}
