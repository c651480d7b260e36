"""What the analysis says about a graph: plain frozen data, no behaviour beyond look-ups."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

FACTS = "ditc"
"""Key in a node's ``meta`` of its :class:`NodeFacts`."""


class Role(StrEnum):
    """What one linear does in a diffusion transformer."""

    QUERY = "attention.query"
    KEY = "attention.key"
    VALUE = "attention.value"
    QKV = "attention.qkv"
    """One linear makes several of query, key and value."""
    QKV_MLP = "attention.qkv_mlp"
    """One linear makes query, key, value and the MLP's input (parallel blocks)."""
    GATE = "attention.gate"
    """Multiplies an attention's output, after a squashing function."""
    OUT = "attention.out"
    OUT_MLP = "attention.out_mlp"
    """One linear reads an attention's output beside the MLP's (parallel blocks)."""
    MLP_UP = "mlp.up"
    MLP_GATE = "mlp.gate"
    MLP_GATE_UP = "mlp.gate_up"
    MLP_DOWN = "mlp.down"
    TOKEN = "token"
    """On the token path between embedder and head, and nothing closer."""
    MODULATION = "modulation"
    """Makes shift, scale or gate of tokens from the conditioning."""
    TIMESTEP = "timestep"
    CONDITIONING = "conditioning"
    """Embeds an input without token axis other than the timestep: pooled text, guidance, class, sizes."""
    EMBEDDER = "embedder"
    """On a token path before the first block."""
    HEAD = "head"
    """On the token path after the last block."""
    UNKNOWN = "unknown"


Witness = Literal["names and structure", "names", "structure"]
AttentionKind = Literal["self", "cross", "joint"]
MaskKind = Literal["bool", "additive", "causal"]
NormKind = Literal["rms", "layer", "l2"]


@dataclass(frozen=True)
class SubAxis:
    """One axis of the grid that a token axis enumerates; ``size`` counts tokens along it, not pixels."""

    name: str
    size: int


@dataclass(frozen=True)
class TokenAxis:
    """An axis along which attention runs.

    ``name`` is the input (or, for learned tokens, the weight) that brings the axis in, ``size`` its number of tokens.
    ``sub_axes`` is empty where tokens arrive already packed.
    """

    name: str
    size: int
    sub_axes: tuple[SubAxis, ...] = ()
    source: Literal["data", "weight"] = "data"

    def __str__(self) -> str:
        grid = " × ".join(f"{axis.name} {axis.size}" for axis in self.sub_axes)
        return f"{self.name} {self.size}" + (f" = {grid}" if grid else "")


@dataclass(frozen=True)
class Stream:
    """A residual tensor that every block of a stack reads and rewrites.

    ``tokens`` names the token axes that it concatenates (one, for a stream of one modality); ``width`` is its number
    of features.
    """

    name: str
    tokens: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class Block:
    """One repetition of a stack: its nodes and, per stream, the node that enters and the node that leaves.

    ``outputs`` holds ``None`` for a stream that the block does not rewrite (the last block of many models), ``inputs``
    for one that was not found in front of it.
    """

    index: int
    nodes: tuple[str, ...]
    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]


@dataclass(frozen=True)
class LongSkip:
    """A value that passes from one block to a later one without going through those in between."""

    node: str
    source: int
    target: int


@dataclass(frozen=True)
class Stack:
    """Repeated blocks in a row.

    ``name`` is the module path that the blocks share, or a derived one. ``shared`` are nodes made outside that
    several blocks read and none rewrites: conditioning, RoPE tables, masks, context.
    """

    name: str
    depth: int
    streams: tuple[Stream, ...]
    blocks: tuple[Block, ...]
    shared: tuple[str, ...]
    witness: Witness
    long_skips: tuple[LongSkip, ...] = ()


@dataclass(frozen=True)
class TimestepInput:
    """The input that tells how noisy the sample is; ``node`` is its placeholder."""

    name: str
    node: str
    evidence: str


@dataclass(frozen=True)
class AttentionSite:
    """One attention: ``softmax(query key^T) value``.

    ``axis`` says which tokens look at each other: ``full``, or the sub-axes of a factorised attention such as
    ``frames`` or ``height × width``. ``layout`` is the order of the operands' dimensions (B batch, H heads, L length,
    D features); ``node`` makes the output, ``query``, ``key`` and ``value`` are the operand nodes. ``written`` says
    whether it is one op, matrix products around a softmax, or linear attention, which has none.
    """

    name: str
    node: str
    kind: AttentionKind
    axis: str
    query_tokens: tuple[str, ...]
    key_tokens: tuple[str, ...]
    layout: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    mask: MaskKind | None
    q_norm: NormKind | None
    k_norm: NormKind | None
    rope: bool
    stack: str | None
    block: int | None
    written: Literal["sdpa", "explicit", "linear"]
    query: str
    key: str
    value: str


@dataclass(frozen=True)
class Linear:
    """One product with a weight: ``M`` rows times ``K`` features in, ``N`` out."""

    name: str
    node: str
    role: Role
    M: int
    N: int
    K: int
    bias: bool
    stack: str | None
    block: int | None
    weight: str

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return self.M * self.N * self.K


@dataclass(frozen=True)
class Embedder:
    """Where an input becomes tokens: a convolution over patches, a linear, or a table."""

    name: str
    node: str
    kind: Literal["conv", "linear", "table"]
    source: str
    patch: tuple[int, ...] = ()


@dataclass(frozen=True)
class Structure:
    """Everything the analysis found; ``notes`` says what it could not find, or where its witnesses disagree."""

    token_axis: TokenAxis | None
    tokens: tuple[TokenAxis, ...]
    stacks: tuple[Stack, ...]
    attentions: tuple[AttentionSite, ...]
    linears: tuple[Linear, ...]
    timestep: TimestepInput | None
    conditioning_inputs: tuple[str, ...]
    embedders: tuple[Embedder, ...]
    head: tuple[str, ...]
    notes: tuple[str, ...]

    def stack(self, name: str) -> Stack:
        """The stack of that name.

        Raises:
            KeyError: there is none.
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        raise KeyError(name)

    def linears_of(self, *roles: Role) -> tuple[Linear, ...]:
        """The linears that play one of ``roles``, in program order."""
        return tuple(linear for linear in self.linears if linear.role in roles)


@dataclass(frozen=True)
class TokenRun:
    """Tokens of one axis that follow each other along a dimension.

    ``name`` is the token axis that they belong to, or empty where they are of several or of none. ``grid`` says what
    they enumerate, outermost first, where the graph shows it: the axes' sizes have ``size`` as their product.
    """

    name: str
    size: int
    grid: tuple[SubAxis, ...] = ()


@dataclass(frozen=True)
class NodeFacts:
    """What later passes may ask about one node without looking at names.

    ``axes`` has one entry per dimension of the node's value: ``batch``, ``tokens``, ``features``, a sub-axis' name
    in factorised models, or ``None``. ``conditioning`` marks values of the conditioning path, ``role`` linears,
    ``attention`` the nodes that make an attention's output. ``runs`` says of a stream in front of or behind a block
    what its dimension of tokens is made of.
    """

    role: Role | None = None
    stack: str | None = None
    block: int | None = None
    attention: AttentionKind | None = None
    conditioning: bool = False
    axes: tuple[str | None, ...] = ()
    runs: tuple[TokenRun, ...] = ()
