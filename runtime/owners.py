"""Modules whose weights were released: loading into them works as ever, saving them is refused.

Programs are given weights and no modules, so modules are found among the objects that Python knows of. That takes a
fraction of a second, once per set of released weights.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .release import refuse_released, released

_prepared: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def prepare_owners(weights: Sequence[torch.Tensor]) -> None:
    """Registers hooks on the modules that own ``weights``, once per module."""
    if not weights:
        return
    wanted = set(map(id, weights))
    for item in gc.get_objects():
        # by type: asking an instance would run the code of proxies
        if not issubclass(type(item), torch.nn.Module) or item in _prepared:
            continue
        if any(id(tensor) in wanted for _, tensor in _own(item)):
            item.register_state_dict_pre_hook(_refuse_to_save)
            item.register_load_state_dict_pre_hook(_make_room)
            _prepared.add(item)


def _own(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in vars(module).get(kind, {}).items():
            if tensor is not None:
                yield name, tensor


def _refuse_to_save(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    own = dict(_own(module))
    refuse_released(list(own.values()), [prefix + name for name in own])


def _make_room(
    module: torch.nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any
) -> None:
    if metadata.get("assign_to_params_buffers", False):
        return
    for name, tensor in _own(module):
        value = state.get(prefix + name)
        if released(tensor) is not None and isinstance(value, torch.Tensor) and value.shape == tensor.shape:
            # should the copy fail after all, NaN is what packing refuses
            tensor.data = torch.full(tensor.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
