"""The files that a plan names."""

from __future__ import annotations

from typing import NamedTuple

from ..plan import Plan
from .calibration import Calibration
from .tables import CostTable, load_table


class PlanFiles(NamedTuple):
    """What linears and attention are decided by, read; ``None`` where the plan names no file."""

    calibration: Calibration | None = None
    table: CostTable | None = None


def plan_files(plan: Plan) -> PlanFiles:
    """Reads the files that a plan names.

    Raises:
        CalibrationError, CostError: a file is missing or damaged.
    """
    return PlanFiles(
        Calibration.load(plan.calibration) if plan.calibration is not None else None,
        load_table(plan.cost_table) if plan.cost_table is not None else None,
    )
