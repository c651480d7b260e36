"""Running a rewritten graph node by node: for debugging, and as the reference of a compiled one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx


def lower_eager(graph: fx.GraphModule) -> Callable[..., Sequence[Any]]:
    """The graph's own Python, without gradients."""

    def run(*inputs: Any) -> Sequence[Any]:
        with torch.no_grad():
            outputs: Sequence[Any] = graph(*inputs)
        return outputs

    return run
