"""What a policy takes from a calibration where the plan's table does not say it."""

from __future__ import annotations

from ..quantize.calibration import Calibration, CalibrationError
from .options import CacheOptions


def with_calibration(options: CacheOptions, calibration: Calibration | None) -> CacheOptions:
    """The options with the polynomial or the ratios of a calibration, where they need some and name none.

    Raises:
        CalibrationError: the calibration has none of them.
    """
    if calibration is None or not options.reads_calibration:
        return options
    name = "polynomial" if options.policy == "teacache" else "ratios"
    values = getattr(calibration.cache, name) if calibration.cache is not None else ()
    if not values:
        why = {
            "polynomial": "it saw fewer than five different changes of what the first block reads; calibrate with more "
            "steps, or give polynomial = [1.0, 0.0] to take changes as they are",
            "ratios": "it saw no second step, or blocks that change the shape of their stream; calibrate with whole "
            "generations, or give ratios",
        }
        raise CalibrationError(
            f"the calibration of a {calibration.model} has no {name} for the cache policy {options.policy!r}: "
            + why[name]
        )
    return options.model_copy(update={name: values})
