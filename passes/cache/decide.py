"""In front of the region: whether each sample reuses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .policy import Seen, State, allowed
from .ranks import agreed, group_name
from .state import FINITE, Site


@dataclass(frozen=True)
class Decision:
    """Nodes that hold what was decided.

    Attributes:
        hit: bool ``[S]``, whether each sample reuses.
        everyone: bool scalar, whether all do.
        score: float32 ``[S]``, the number by which the policy decided.
        vectors: the policy's own vectors of state as they are then.
    """

    hit: fx.Node
    everyone: fx.Node
    score: fx.Node
    vectors: dict[str, fx.Node]


def decide(site: Site) -> Decision:
    """Adds the decision at the current insertion point; one that rests on NaN is to compute."""
    kinds, names, rule, order = list(site.seen), site.remembered, site.rule, site.options.order
    group = group_name(site.options.group) if site.options.group is not None else None

    def run(controls: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        looked = dict(zip(kinds, operands, strict=False))
        state = dict(zip(names, operands[len(kinds) :], strict=True))
        named = {name: controls[i] for i, name in enumerate(site.options.controls())}
        step = state["step"].to(torch.int64)
        would, score, vectors = rule.decide(Seen(site.batch, step, **looked), state, named, controls[len(named) :])
        may = allowed(step, state["run"], named) & (computed_steps(state) > order)
        hit = would & may & score.isfinite()
        if group is not None:
            hit = agreed(hit, group)
        return hit, hit.all(), score, vectors

    operands = [site.controls, *site.seen.values(), *(site.state[name] for name in names)]
    return Decision(*site.trace("decide", run, operands))


def computed_steps(state: State) -> Tensor:
    """Computed steps so far, float32 ``[S]``. Policies do not see NaN that arises inside of the region, and some look
    at nothing: after a step that gave any, none counts."""
    return torch.where(state[FINITE] > 0, state["computed"], 0.0)
