"""Checkpoints: whole files that replace each other only when complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import DistillError


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` as torch does; what was at `path` is replaced only by the complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)


def read_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """The state in `path`, on the CPU; plain data and tensors only are read.

    Raises:
        DistillError: the file is none of `kind`, the format that it was written with.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != kind:
        raise DistillError(f"{path} is no checkpoint of this training (format {kind!r})")
    return state


def check_identity(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse to continue another training.

    Args:
        theirs, ours: what determines a training, flat, in the checkpoint and here.

    Raises:
        DistillError: with everything that differs.
    """
    names = dict.fromkeys((*theirs, *ours))
    told = [f"{name}: {theirs.get(name)} there, {ours.get(name)} here" for name in names if _differ(name, theirs, ours)]
    if told:
        raise DistillError(
            f"{path} is of another training ({'; '.join(told)}): give the same options, or another out to start afresh"
        )


def _differ(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return name not in theirs or name not in ours or bool(theirs[name] != ours[name])
