"""One process, or several that torchrun started and that share parameters, gradients and optimiser state (FSDP2)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import DistillError


@dataclass(frozen=True)
class World:
    """The processes of a training: this one is `rank` of `ranks`; `mesh` is None where it is alone."""

    device: torch.device
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def shard(self, module: nn.Module) -> None:
        """Divide the parameters of `module` among the ranks, block by block (FSDP2); alone, nothing happens."""
        if self.mesh is None:
            return
        from torch.distributed.fsdp import fully_shard

        # by default the outermost keeps its gathered parameters until a backward, and networks here are often called
        # without one: their weights, or whether they take gradients, would be those of an earlier update
        for part in (*blocks_of(module), module):
            fully_shard(part, mesh=self.mesh, reshard_after_forward=True)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all ranks."""
        if self.mesh is None:
            return value
        total = value.detach().clone().to(self.device, torch.float32)
        distributed.all_reduce(total)
        return total / self.ranks

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank, so that all stop together."""
        return flag if self.mesh is None else bool(self.mean(torch.tensor(float(flag))) > 0)


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """The world that torchrun started this process in, left at the end; a world of one without torchrun."""
    if not distributed.is_torchelastic_launched():
        yield World(device)
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        if device.type == "cuda":
            device = torch.device("cuda", distributed.get_node_local_rank())
            torch.cuda.set_device(device)
        mesh = init_device_mesh(device.type, (ranks,))
        yield World(device, rank, ranks, mesh)
    finally:
        distributed.destroy_process_group()


def leave() -> None:
    """End a process that torchrun started, as a success; called last. Alone, nothing happens.

    Caches of DTensor keep gloo's process group behind `destroy_process_group`, and its threads outlive the interpreter:
    now and then they abort a process whose training had succeeded, if it is taken down in the ordinary way.
    """
    if distributed.is_torchelastic_launched():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The modules of the longest list of modules in `module`, a transformer's blocks as a rule; empty without one."""
    lists = [list(part) for part in module.modules() if isinstance(part, nn.ModuleList)]
    return max(lists, key=len, default=[])


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be divided among the ranks, on the CPU. All ranks have to call it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module with every tensor whole, on the CPU. All ranks have to call it."""
    return {name: whole(tensor).clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def load_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a module that may be divided among the ranks.

    Raises:
        DistillError: names or shapes are not the module's.
    """
    own = module.state_dict()
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise DistillError(f"these weights are of another network: {', '.join(odd[:4])} are in one of both only")
    for name, tensor in own.items():
        given = state[name]
        if tensor.shape != given.shape:
            raise DistillError(f"{name} has the shape {tuple(given.shape)}; {tuple(tensor.shape)} is needed")
        tensor.copy_(_divided(given, tensor))


def _divided(given: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(given.to(like.device), like.device_mesh, like.placements)
    return given.to(like.device)


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser with every tensor whole. All ranks have to call it."""
    state = optimiser.state_dict()
    kept = {
        number: {name: whole(value).clone() if isinstance(value, Tensor) else value for name, value in parts.items()}
        for number, parts in state["state"].items()
    }
    return {"state": kept, "param_groups": state["param_groups"]}


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`optimiser_state` gave; moments are divided as their parameters are."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    kept = {
        number: {
            name: _divided(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in parts.items()
        }
        for number, parts in state["state"].items()
    }
    optimiser.load_state_dict({"state": kept, "param_groups": state["param_groups"]})
