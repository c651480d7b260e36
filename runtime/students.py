"""Students as folders: weights beside the manifest that says how they must be sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.kernels.errors import CheckpointError

from .checkpoints.files import open_checkpoint
from .samplers import Sampler, SamplerError

MANIFEST = "sampler.json"
"""The manifest's file in a student's folder, as :meth:`Sampler.to_json` writes it."""

Run = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Student:
    """A denoiser that carries its manifest: `ditc.generate(student, condition, seeds=..., shape=...)` obeys it.

    Attributes:
        module: the network, to be compiled or looked at.
        sampler: how it must be sampled.

    Args:
        run: (module, x, timestep, condition) -> output; by default the module is called with these three, and the
            first of several outputs is taken.
    """

    def __init__(self, module: nn.Module, sampler: Sampler, run: Run | None = None) -> None:
        self.module, self.sampler = module, sampler
        self._run = _first_output if run is None else run

    def __call__(self, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self._run(self.module, x, timestep, condition)

    def compiled(self, compile: Callable[[nn.Module], nn.Module]) -> Student:
        """This student with its module compiled: `student.compiled(lambda module: ditc.compile(module, plan))`."""
        return Student(compile(self.module), self.sampler, self._run)


def read_manifest(folder: Path) -> Sampler:
    """The manifest in a student's folder.

    Raises:
        SamplerError: there is none, or a wrong one.
    """
    if not (folder / MANIFEST).is_file():
        raise SamplerError(f"{folder} holds no {MANIFEST}: it is no student's folder, so nothing says how to sample it")
    return Sampler.from_text((folder / MANIFEST).read_text("utf-8"))


def load_student(folder: str | Path, model: nn.Module | None = None, run: Run | None = None) -> Student:
    """Read a student that `ditc distill` wrote, in fp32, on the CPU, in eval mode.

    Args:
        folder: with the weights and `sampler.json`.
        model: of the student's architecture, to be filled; None for the class of diffusers that `config.json` names.
        run: see :class:`Student`.

    Raises:
        SamplerError: there is no manifest, or a wrong one.
        CheckpointError: no weights, damaged ones, or ones of another architecture.
    """
    folder = Path(folder)
    sampler = read_manifest(folder)
    checkpoint = open_checkpoint(folder)
    module = _from_config(folder, checkpoint.config) if model is None else model
    odd = sorted(module.state_dict().keys() ^ checkpoint.tensors.keys())
    if odd:
        raise CheckpointError(f"{folder} is of another architecture: {', '.join(odd[:4])} are in one of both only")
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            read = checkpoint.read(checkpoint.tensors[name])
            if read.shape != tensor.shape:
                raise CheckpointError(
                    f"{name} in {folder} has the shape {tuple(read.shape)}, not {tuple(tensor.shape)}"
                )
            tensor.copy_(read)
    return Student(module.eval(), sampler, run)


def _from_config(folder: Path, config: Any) -> nn.Module:
    name = config.get("_class_name")
    if name is None:
        raise CheckpointError(f"{folder / 'config.json'} names no class: pass model, of the student's architecture")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{name} comes from diffusers: pip install 'ditc[diffusers]', or pass model") from error
    found = getattr(diffusers, name, None)
    if found is None:
        raise CheckpointError(f"diffusers {diffusers.__version__} has no {name}: pass model")
    module: nn.Module = found.from_config(json.loads(json.dumps(dict(config))))
    return module.float()


def _first_output(module: nn.Module, x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
    output = module(x, timestep, condition)
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first
