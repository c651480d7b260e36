"""The manifest of a student that predicts the data and is noised afresh between its steps."""

from __future__ import annotations

from ditc.runtime.samplers import Sampler

from .subject import Subject


def renoising_sampler(subject: Subject, method: str, levels: tuple[float, ...], source: str) -> Sampler:
    """Re-noising along `levels`, where each step begins, without guidance.

    Args:
        subject: what was distilled.
        method: by which.
        levels: falling, without the 0 at the end.
        source: the method's paper.
    """
    return Sampler(
        name=f"{subject.name} {method}",
        role="student",
        kind="renoise",
        process="flow",
        solver="sde",
        prediction="velocity",
        steps=len(levels),
        sigmas=(*levels, 0.0),
        warped=True,
        timestep_scale=subject.timestep_scale,
        shape=subject.shape,
        source=f"distilled by ditc: {source}",
    )
