"""Several ranks that hold parts of one generation decide as one: where one of them computes, all do.

Ranks that took different branches would wait for each other in the region's collectives for ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PassError

WORLD = "world"
"""What a plan calls the group of all ranks."""


def group_name(group: str) -> str:
    """The name under which torch knows a process group.

    Args:
        group: :data:`WORLD`, or the name of a group (``torch.distributed.ProcessGroup.group_name``).

    Raises:
        PassError: there are no ranks, or no such group.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise PassError(
            f"cache.group={group!r} needs ranks: call torch.distributed.init_process_group before the model is "
            "called, or leave it out"
        )
    if group == WORLD:
        whole = torch.distributed.group.WORLD
        assert whole is not None, "torch.distributed is initialised"
        return str(whole.group_name)
    try:
        torch._C._distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    except (RuntimeError, ValueError) as error:
        raise PassError(f"cache.group={group!r} is no process group: 'world' is the one of all ranks") from error
    return group


def agreed(hit: Tensor, group: str) -> Tensor:
    """Bool ``[S]``: samples that all ranks of the group (as torch knows it) would reuse."""
    functional = torch.ops._c10d_functional
    computes: Tensor = functional.wait_tensor(functional.all_reduce((~hit).to(torch.float32), "max", group))
    return computes < 0.5


def said(group: str | None) -> tuple[str, ...]:
    """What the report says of ranks; nothing where there is one."""
    if group is not None:
        return (f"ranks of {group!r} decide as one",)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = torch.distributed.get_world_size()
        if ranks > 1:
            return (f"each rank decides for itself: where {ranks} of them share a generation, cache.group is needed",)
    return ()
