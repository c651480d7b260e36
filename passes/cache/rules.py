"""Every policy by its name in a plan, with the half of it that runs inside of the region, where it has one."""

from __future__ import annotations

from collections.abc import Mapping

from .inside import AdaCache, AllBlocks, BWCache, Inside, MiddleBlock
from .options import CacheOptions
from .policy import EasyCache, FirstBlock, Fixed, MagCache, Rule, TeaCache

RULES: Mapping[str, Rule] = {
    "first-block": FirstBlock(), "teacache": TeaCache(), "magcache": MagCache(), "easycache": EasyCache(),
    "bwcache": BWCache(), "adacache": AdaCache(), "fixed": Fixed(),
}  # fmt: skip

INSIDE: Mapping[str, Inside] = {"bwcache": AllBlocks(), "adacache": MiddleBlock()}


def rule_of(options: CacheOptions) -> Rule:
    """The policy of a plan."""
    return RULES[options.policy]


def inside_of(options: CacheOptions) -> Inside | None:
    """What the policy of a plan measures inside of the region."""
    return INSIDE.get(options.policy)
