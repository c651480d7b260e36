"""The demo's stages: the same ten digits, one technique more with each, as the field deploys them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditc.runtime.samplers import Sampler
from ditc.runtime.students import MANIFEST, read_manifest

STUDENTS = Path(__file__).parent / "students"
CACHE: Mapping[str, Any] = {"policy": "fixed", "scope": "model", "interval": 1, "growth": 1.3, "order": 2}
"""What the caching stages skip by: see the suite `caches` of the benchmarks for the curve that it is a point of."""


@dataclass(frozen=True)
class Candidate:
    """One way to draw a clip.

    `prepare` turns the loaded module into what is called; `check`, after the first generation, raises where that is not
    what the name promises. A `student` is the folder of one, with its manifest: it is drawn with as that says, in
    its own steps and without guidance, and walks paths of its own; every other candidate walks the teacher's.
    """

    name: str
    prepare: Callable[[nn.Module], Callable[..., Any]]
    check: Callable[[Callable[..., Any]], None] | None = None
    student: Path | None = None

    @property
    def sampler(self) -> Sampler | None:
        """The student's manifest; `None` for the teacher.

        Raises:
            SamplerError: there is no such student.
        """
        if self.student is None:
            return None
        return read_manifest(self.student)


def candidates() -> tuple[Candidate, ...]:
    """Eager PyTorch, and then one technique after the other on top of the ones before."""
    int8 = {"quantize": "int8"}
    attention = {**int8, "attention": "auto"}
    stages = [
        Candidate("eager fp32", lambda model: model),
        Candidate("+ inductor", torch.compile),
        Candidate("+ ditc int8", compiled(int8), require_quantised),
        Candidate("+ int8 attention", compiled(attention), require_quantised),
        Candidate("+ cache", compiled({**attention, "cache": dict(CACHE)}), require_skips),
    ]
    for folder in students():
        name = f"{read_manifest(folder).steps} steps, {folder.name.split('-')[0]}"
        stages.append(Candidate(name, compiled(attention), require_quantised, folder))
    return tuple(stages)


def students() -> tuple[Path, ...]:
    """The folders of the students that come with the demo, from most steps to fewest."""
    found = sorted(path.parent for path in STUDENTS.glob(f"*/{MANIFEST}"))
    return tuple(sorted(found, key=lambda folder: -read_manifest(folder).steps))


def compiled(plan: Mapping[str, Any]) -> Callable[[nn.Module], Callable[..., Any]]:
    """Prepares a candidate by compiling it with ditc."""

    def prepare(model: nn.Module) -> Callable[..., Any]:
        import ditc

        return ditc.compile(model, plan)

    return prepare


def require_quantised(runner: Callable[..., Any]) -> None:
    """Raise RuntimeError where ditc left the transformer as it was: the demo must not time eager under ditc's name."""
    import ditc

    if not isinstance(runner, nn.Module):
        raise TypeError(f"a compiled module was expected; got {type(runner).__name__}")
    stats = ditc.stats(runner)
    if not stats.programs or any(program.untouched or not program.packs for program in stats.programs):
        raise RuntimeError(f"ditc did not quantise the transformer:\n{stats}")


def require_skips(runner: Callable[..., Any]) -> None:
    """As :func:`require_quantised`, and raise RuntimeError where there is no cache guard."""
    import ditc

    require_quantised(runner)
    assert isinstance(runner, nn.Module)
    if any(program.guard is None for program in ditc.stats(runner).programs):
        raise RuntimeError("ditc put no cache guard into the transformer")
