"""Structure of a diffusion transformer, found in its graph by data flow, with names as a second witness.

Read in this order: ``facts`` (what is said), ``axes``, ``walk`` and ``rules`` (what each dimension enumerates),
``sites`` and ``products`` (attentions and linears), ``tokens``, ``timestep``, ``flow`` (what is made from what),
``named``, ``repeats``, ``blocks`` and ``streams`` (stacks), ``roles`` and ``attention`` (facts about single
operations), and ``table`` (the report).
"""

from .analysis import analyse
from .facts import (
    FACTS,
    AttentionKind,
    AttentionSite,
    Block,
    Embedder,
    Linear,
    LongSkip,
    NodeFacts,
    Role,
    Stack,
    Stream,
    Structure,
    SubAxis,
    TimestepInput,
    TokenAxis,
    TokenRun,
)

__all__ = [
    "FACTS",
    "AttentionKind",
    "AttentionSite",
    "Block",
    "Embedder",
    "Linear",
    "LongSkip",
    "NodeFacts",
    "Role",
    "Stack",
    "Stream",
    "Structure",
    "SubAxis",
    "TimestepInput",
    "TokenAxis",
    "TokenRun",
    "analyse",
]
