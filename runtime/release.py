"""Releasing the memory of weights whose packed form is all that is still read.

The storage is emptied (as FSDP empties the parameters it does not need): the parameter keeps its identity, shape and
strides, so Dynamo's guards hold and nothing recompiles. What else touches a released weight fails: torch refuses to
write or pickle it, and ditc's programs refuse to read it. On builds of torch with CUDA every read is refused with a
message of ours; on builds without, calling the module is refused by torch, but a few of its CPU kernels (``clone``,
``sum``; printing a weight, ``deepcopy``) do not check and end the process.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ditc.kernels.errors import WeightError

_ONE_TENSOR = 2
"""Uses of a storage that one tensor has: the tensor's, and that of the Python object through which we count."""


@dataclass(frozen=True, eq=False)
class Look:
    """How a weight looked: address, version counter, sum of its bits as integers (int64), a sample of them."""

    address: int
    version: int
    checksum: torch.Tensor
    sample: torch.Tensor

    def same(self, other: Look) -> bool:
        """Whether nothing was noticed between the two."""
        if self is other:
            return True
        unmoved = (self.address, self.version) == (other.address, other.version)
        return unmoved and torch.equal(self.checksum, other.checksum) and torch.equal(self.sample, other.sample)


@dataclass(frozen=True, eq=False)
class Released:
    """A weight that was released: its emptied storage (kept, so that its address names it), and how it looked."""

    weight: weakref.ref[torch.Tensor]
    storage: torch.UntypedStorage
    look: Look
    bytes: int


_released: dict[int, Released] = {}


def released(weight: torch.Tensor) -> Released | None:
    """The record of a released weight, also for views of it; ``None`` for one that holds values, new ones included."""
    if not _released:
        return None
    return _released.get(weight.untyped_storage()._cdata)


def reason_to_keep(weight: torch.Tensor) -> str | None:
    """Why a weight cannot be released; ``None`` when it can."""
    storage = weight.untyped_storage()
    if not storage.resizable():
        return "its storage belongs to a file or to another library"
    if torch._C._storage_Use_Count(storage._cdata) > _ONE_TENSOR:
        return "another tensor shares its storage"
    return None


def release(weight: torch.Tensor, name: str, look: Look) -> int:
    """Empties the storage of a weight for which :func:`reason_to_keep` found none.

    Args:
        weight: keeps its shape and its identity.
        name: for the message that reads of it raise, where torch can carry one.
        look: how the weight looked when it was packed.

    Returns:
        Bytes released.
    """
    storage = weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    if hasattr(torch._C, "_set_storage_access_error_msg"):
        torch._C._set_storage_access_error_msg(weight, _message(name))
    else:
        torch._C._set_throw_on_mutable_data_ptr(weight)
    address = storage._cdata
    reference = weakref.ref(weight, lambda _: _released.pop(address, None))
    _released[address] = Released(reference, storage, look, size)
    return size


def refuse_released(tensors: Sequence[object], names: Sequence[str]) -> None:
    """Checks that all tensors hold values; costs nothing while nothing is released.

    Raises:
        WeightError: names the released ones and says what to do.
    """
    if not _released:
        return
    missing = [
        names[i] if i < len(names) else f"input {i}"
        for i, tensor in enumerate(tensors)
        if isinstance(tensor, torch.Tensor) and released(tensor) is not None
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise WeightError(_message(", ".join(missing[:3]) + more))


def _message(name: str) -> str:
    return (
        f"{name}: released by free_originals=True after packing, and something else needs the values: load them again "
        "with load_state_dict, all at once, or compile with free_originals=False; if this is a new resolution, "
        "name the formats, because quantize='auto' decides for each size anew"
    )
