"""Behind the region: the state that the next step begins with."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .decide import Decision, computed_steps
from .policy import Seen
from .state import FINITE, Site


def settle(site: Site, decided: Decision, output: fx.Node) -> dict[str, fx.Node]:
    """Adds the guard's and the policy's new state at the current insertion point; ``output`` is the first exit, as
    reused or computed."""
    kinds, names, mine, rule = list(site.seen), site.remembered, list(decided.vectors), site.rule

    def run(hit: Tensor, score: Tensor, output: Tensor, *operands: Tensor) -> dict[str, Tensor]:
        looked = dict(zip(kinds, operands, strict=False))
        rest = operands[len(kinds) :]
        state = dict(zip(names, rest, strict=False))
        vectors = dict(zip(mine, rest[len(names) :], strict=True))
        seen = Seen(site.batch, state["step"].to(torch.int64), output=output, **looked)
        new = rule.settle(seen, state, vectors, hit)
        reused = hit.float()
        finite = {FINITE: seen.finite(output).float()} if FINITE in state else {}
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

    operands = [decided.hit, decided.score, output, *site.seen.values()]
    operands += [*(site.state[name] for name in names), *decided.vectors.values()]
    found: dict[str, fx.Node] = site.trace("settle", run, operands)
    return found
