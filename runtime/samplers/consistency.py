"""What a sampler manifest may say together: contradictions are refused with what would be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .perflow import check_windows
from .shift import static_shift
from .trigflow import HALF_PI, TIME_TOLERANCE

if TYPE_CHECKING:
    from .manifest import Sampler


@dataclass(frozen=True)
class Rules:
    """What a kind of sampler goes with: the solvers, and the predictions under each process."""

    solvers: tuple[str, ...]
    predictions: dict[str, tuple[str, ...]]
    own: tuple[str, ...] = ()


VP = ("eps", "x0", "v")
RULES = {
    "euler": Rules(("ode",), {"flow": ("velocity", "x0")}),
    "renoise": Rules(("sde",), {"flow": ("velocity", "x0"), "vp": VP}),
    "lcm": Rules(("sde",), {"vp": VP}),
    "tcd": Rules(("ode", "sde"), {"vp": VP}, ("eta",)),
    "trigflow": Rules(("ode", "sde"), {"trigflow": ("trigflow", "velocity", "x0")}, ("sigma_data",)),
    "flow_map": Rules(("ode",), {"flow": ("average_velocity",)}),
    "perflow": Rules(("ode",), {"flow": ("velocity",), "vp": ("eps", "diff_eps", "velocity")}, ("windows",)),
}
LISTS = {"flow": "sigmas", "vp": "timesteps", "trigflow": "angles"}
LEAST_START = {"sigmas": 0.98, "angles": 1.5}
"""Generation begins with pure noise: what a first level may lack of 1, or of pi/2."""


def check_contradictions(sampler: Sampler) -> None:
    """Raise ValueError where the fields of a manifest contradict each other."""
    kind, rules = sampler.kind, RULES[sampler.kind]
    if sampler.process not in rules.predictions:
        raise ValueError(f"kind={kind!r} needs process {_or(rules.predictions)}, not {sampler.process!r}")
    allowed = rules.predictions[sampler.process]
    if sampler.prediction not in allowed:
        raise ValueError(
            f"kind={kind!r} on process={sampler.process!r} needs prediction {_or(allowed)}, not {sampler.prediction!r}"
        )
    _check_solver(sampler, rules)
    for field in ("eta", "sigma_data", "windows"):
        given = getattr(sampler, field)
        if field in rules.own and given is None:
            raise ValueError(f"kind={kind!r} needs {field}")
        if field not in rules.own and given is not None:
            raise ValueError(f"{field}={given} has no meaning with kind={kind!r}: leave it away")
    if (sampler.betas is None) == (sampler.process == "vp"):
        raise ValueError(
            "process='vp' needs betas, the model's noise schedule"
            if sampler.betas is None
            else f"betas have no meaning with process={sampler.process!r}: leave them away"
        )
    if sampler.process == "vp" and sampler.timestep_scale > 1:
        raise ValueError(
            f"timestep_scale={sampler.timestep_scale:g} contradicts process='vp', whose timesteps go to the model as "
            "they are: say 1, or what the model divides them by"
        )
    if sampler.shape is not None and (not sampler.shape or any(n == 0 or n < -1 for n in sampler.shape)):
        raise ValueError(f"shape={sampler.shape} must hold positive sizes, or -1 where any size will do")


def _check_solver(sampler: Sampler, rules: Rules) -> None:
    kind, solver = sampler.kind, sampler.solver
    if solver not in rules.solvers:
        if solver == "sde":
            raise ValueError(
                f"solver='sde' draws fresh noise at every step and kind={kind!r} draws none: say solver='ode', or "
                "kind='renoise', which is how DMD2's students are sampled"
            )
        raise ValueError(
            f"solver='ode' draws no fresh noise and kind={kind!r} lives by it: say solver='sde', or kind='euler'"
        )
    if kind == "tcd" and sampler.eta is not None and (sampler.eta == 0) != (solver == "ode"):
        raise ValueError(
            f"eta={sampler.eta} contradicts solver={solver!r}: eta 0 draws no noise and is the ode; sde needs eta > 0"
        )


def check_schedule(sampler: Sampler) -> None:
    """Raise ValueError where the list of levels is not one that this sampler could walk along."""
    wanted = LISTS[sampler.process]
    for name in LISTS.values():
        if name != wanted and getattr(sampler, name) is not None:
            raise ValueError(f"process={sampler.process!r} goes by {wanted}, not {name}")
    levels = getattr(sampler, wanted)
    if levels is None:
        raise ValueError(f"process={sampler.process!r} needs {wanted}, from noise to 0")
    if len(levels) != sampler.steps + 1:
        raise ValueError(
            f"steps={sampler.steps} needs {sampler.steps + 1} {wanted}, the last one 0; got {len(levels)}: "
            f"{list(levels)}"
        )
    if levels[-1] != 0:
        raise ValueError(f"{wanted} must end at 0, where the last step leads; got {levels[-1]} at the end")
    if not all(following < level for level, following in pairwise(levels)):
        raise ValueError(f"{wanted} must fall strictly, from noise to 0; got {list(levels)}")
    _check_range(sampler, wanted, levels)
    _check_shift(sampler, levels)
    if sampler.windows is not None:
        train = sampler.betas.steps if sampler.betas is not None else 1
        check_windows(tuple(level / train for level in levels), sampler.windows)


def _check_range(sampler: Sampler, name: str, levels: Sequence[float]) -> None:
    if name == "timesteps":
        assert sampler.betas is not None
        # PeRFlow counts from 1 to the number of training steps, the others from 0
        highest = sampler.betas.steps - (sampler.kind != "perflow")
        if levels[0] > highest:
            raise ValueError(f"timesteps must lie in [0, {highest}]; got {levels[0]}")
        return
    top, meaning = (1.0, "1") if name == "sigmas" else (HALF_PI + TIME_TOLERANCE, "pi/2")
    if levels[0] > top:
        hint = "; these look like timesteps: divide them by 1000" if levels[0] > 2 else ""
        raise ValueError(f"{name} must lie in [0, {meaning}]; got {levels[0]}{hint}")
    if levels[0] < LEAST_START[name]:
        raise ValueError(f"{name} must begin at {meaning}, since a generation starts from pure noise; got {levels[0]}")


def _check_shift(sampler: Sampler, levels: Sequence[float]) -> None:
    if sampler.process != "flow":
        for field in ("shift", "warped"):
            if getattr(sampler, field) is not None:
                raise ValueError(f"{field} has no meaning with process={sampler.process!r}: only sigmas are shifted")
        return
    if sampler.warped is None:
        raise ValueError("warped is missing: whether the shift is already in these sigmas (true), or still to come")
    if sampler.warped:
        return
    if sampler.shift is None:
        raise ValueError("warped=false needs shift, which is to warp these sigmas; without one, say warped=true")
    if levels[0] != 1:
        raise ValueError(f"unwarped sigmas begin at 1; got {levels[0]}: say warped=true if the shift is in them")
    amount = sampler.shift.amount
    if sampler.shift.type != "static" or amount is None or amount == 1 or sampler.steps < 3:
        return
    given = torch.tensor(levels, dtype=torch.float64)
    uniform = torch.linspace(1, 0, len(levels), dtype=torch.float64)
    if torch.allclose(static_shift(uniform, amount), given, rtol=0, atol=2e-3):
        raise ValueError(
            f"these sigmas already are the even grid shifted by {amount:g}, and warped=false would shift them again: "
            "say warped=true"
        )


def _or(names: Sequence[str] | dict[str, tuple[str, ...]]) -> str:
    return " or ".join(repr(name) for name in names)
