"""Behind the region: the state that the next step begins with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from .borders import BORDER
from .decide import Decision, computed_steps
from .policy import Seen
from .state import FINITE, Site


def settle(site: Site, decided: Decision, exits: Sequence[fx.Node]) -> dict[str, fx.Node]:
    """Adds the guard's and the policy's new state at the current insertion point; ``exits`` hold what was reused or
    computed."""
    kinds, names, mine, rule = list(site.seen), site.remembered, list(decided.vectors), site.rule
    # gauges have a row for each label and none for samples
    outputs = [exits[i] for i, exit in enumerate(site.region.exits) if exit.meta[BORDER].batch == site.batch]

    def run(hit: Tensor, score: Tensor, *operands: Tensor) -> dict[str, Tensor]:
        results, operands = operands[: len(outputs)], operands[len(outputs) :]
        looked = dict(zip(kinds, operands, strict=False))
        rest = operands[len(kinds) :]
        state = dict(zip(names, rest, strict=False))
        vectors = dict(zip(mine, rest[len(names) :], strict=True))
        seen = Seen(site.batch, state["step"].to(torch.int64), output=results[0], **looked)
        new = rule.settle(seen, state, vectors, hit)
        reused = hit.float()
        finite = {FINITE: torch.stack([seen.finite(result) for result in results]).all(0).float()}
        return (
            new
            | finite
            | {
                "step": state["step"] + 1,
                "run": (state["run"] + 1) * reused,
                "computed": computed_steps(state) + (1 - reused),
                "hit": reused,
                "score": score.clone(),
            }
        )

    operands = [decided.hit, decided.score, *outputs, *site.seen.values()]
    operands += [*(site.state[name] for name in names), *decided.vectors.values()]
    found: dict[str, fx.Node] = site.trace("settle", run, operands)
    return found
