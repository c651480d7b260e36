"""Twins of ops for compilers that would otherwise have to choose between taking an op apart and calling it.

Inductor decomposes an op always or never, whatever its arguments are. An op that is taken apart for one format and
called for the others is therefore decomposed always: for the others into a call of its twin, which runs the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload


def opaque(op: CustomOpDef) -> OpOverload:
    """Registers ``<op>_kernel``, which does what ``op`` does and has no decomposition."""
    target: OpOverload = op._opoverload
    # the primary op's implementations are found when it runs: some are registered later
    schema = str(target._schema).removeprefix(op._qualname)

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    twin = torch.library.custom_op(f"{op._qualname}_kernel", call, mutates_args=(), schema=schema)
    twin.register_fake(call)
    found: OpOverload = twin._opoverload
    return found
