"""Bytes that tensors take while something runs, on any device."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_of(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the tensors that operators make inside of it, beside the ``held`` bytes that are there anyway.

    ``peak`` is the most that both took together. What an operator needs within itself is not seen.
    """

    def __init__(self, held: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.peak = held, held
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self.note(sum(size for reference, size in self._made.values() if not reference.expired()))
        return result

    def __exit__(self, *error: Any) -> Any:
        self._made.clear()
        return super().__exit__(*error)  # type: ignore[no-untyped-call]

    def note(self, more: int = 0) -> None:
        """Takes notice of what is held now, and of ``more``."""
        self.peak = max(self.peak, self.held + more)
