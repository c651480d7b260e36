"""Reads the weights that a student begins with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ditc.runtime.checkpoints.files import open_checkpoint

from .errors import DistillError


def read_weights(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The fp32 weights in a folder or safetensors file of the architecture of `model`.

    Raises:
        CheckpointError: no checkpoint, or a damaged one.
        DistillError: tensors that `model` does not have, or that are missing.
    """
    checkpoint = open_checkpoint(path)
    names = model.state_dict().keys()
    odd = sorted(names ^ checkpoint.tensors.keys())
    if odd:
        raise DistillError(f"{path} is of another architecture: {', '.join(odd[:4])} are in one of both only")
    return {name: checkpoint.read(checkpoint.tensors[name]).float() for name in names}
