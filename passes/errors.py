"""Errors of the compiler, one class per kind of fault."""

from __future__ import annotations

from ditc.kernels.errors import DitcError, WeightError

__all__ = ["CaptureError", "DitcError", "PassError", "PlanError", "VerifyError", "WeightError"]


class PlanError(DitcError, ValueError):
    """The plan asks for something unknown, impossible or out of range."""


class CaptureError(DitcError):
    """A model or graph could not be brought into normal form."""


class PassError(DitcError):
    """A pass broke its contract, or could do nothing of what the plan asked for."""


class VerifyError(PassError):
    """The graph after a pass does not hold what must hold between passes."""
