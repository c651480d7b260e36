"""Packed weights that follow the module they came from.

Dynamo shares one compiled graph between instances of a class, and weights are inputs of the graph. So what is derived
from weights (quantised, concatenated) is kept per set of weights, and made anew when they change. A change is noticed

- at every call: another tensor, another storage, another version counter (in-place edits, ``load_state_dict``,
  ``optimizer.step``), or another value in a sample of each weight (edits through ``.data``, as LoRA fusion does them,
  bypass the version counter but touch nearly every element);
- at the first call of a generation: a checksum over all of every weight, for what else happens through ``.data``;
  where generations follow so closely that checksums would take more than 2 % of the time, some are left out.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ditc.kernels.errors import WeightError

SAMPLES = 64
"""Elements of each weight that are compared at every call."""

CHECKSUM_SHARE = 0.02
"""Most of the time between two checksums that the checksum itself may take."""

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """The weight's elements as integers in memory order, so that NaN equals itself; a view where that is possible."""
    return weight.detach().reshape(-1).view(_INTEGERS[weight.element_size()])


def _sample(bits: torch.Tensor) -> torch.Tensor:
    # an odd stride visits different columns in different rows
    return bits[:: max(1, bits.numel() // SAMPLES) | 1]


def _version(weight: torch.Tensor) -> int:
    # tensors made in inference mode count no versions; the sample and the checksum watch those
    return -1 if weight.is_inference() else weight._version


def _checksum(bits: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([_wide(b).sum(dtype=torch.int64) for b in bits])


def _wide(bits: torch.Tensor) -> torch.Tensor:
    # as many bytes per element as there are: sums of narrow integers convert each of them first
    size = bits.element_size()
    aligned = bits.is_contiguous() and bits.data_ptr() % 8 == 0 and bits.storage_offset() * size % 8 == 0
    return bits.view(torch.int64) if aligned and bits.numel() * size % 8 == 0 else bits


@dataclass(eq=False)
class PackedWeights:
    """What was packed from one set of weights, and how those weights looked then."""

    sources: tuple[weakref.ref[torch.Tensor], ...]
    marks: list[tuple[int, int]]
    bits: list[torch.Tensor]
    samples: list[torch.Tensor]
    sampled: list[torch.Tensor]
    checksum: torch.Tensor
    packed: tuple[torch.Tensor, ...]
    checksum_due: float = 0.0

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], packed: Sequence[torch.Tensor]) -> PackedWeights:
        """Remembers ``weights`` beside what was packed from them."""
        # a view of a contiguous weight sees later edits; a non-contiguous one is read anew at each look
        bits = [_bits(w) for w in weights]
        samples = [_sample(b) for b in bits]
        return cls(
            tuple(weakref.ref(w) for w in weights),
            [(w.data_ptr(), _version(w)) for w in weights],
            bits,
            samples,
            _gather(samples),
            _checksum(bits),
            tuple(packed),
        )

    def alive(self) -> bool:
        """Whether every weight it was made from still exists."""
        return all(source() is not None for source in self.sources)

    def follows(self, weights: Sequence[torch.Tensor], thorough: bool) -> bool:
        """Whether ``weights`` are still what was packed."""
        for weight, source, mark in zip(weights, self.sources, self.marks, strict=True):
            if source() is not weight or mark != (weight.data_ptr(), _version(weight)):
                return False
        if any(w.device.type == "cuda" for w in weights[:1]) and torch.cuda.is_current_stream_capturing():
            return True  # values cannot be read while a CUDA graph is recorded
        contiguous = all(w.is_contiguous() for w in weights)
        bits = self.bits if contiguous else [_bits(w) for w in weights]
        samples = self.samples if contiguous else [_sample(b) for b in bits]
        if not all(torch.equal(a, b) for a, b in zip(_gather(samples), self.sampled, strict=True)):
            return False
        return not thorough or self._checksum_holds(bits)

    def _checksum_holds(self, bits: Sequence[torch.Tensor]) -> bool:
        start = time.perf_counter()
        if start < self.checksum_due:
            return True
        holds = torch.equal(_checksum(bits), self.checksum)
        end = time.perf_counter()
        self.checksum_due = end + (end - start) / CHECKSUM_SHARE
        return holds


def _gather(samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The samples of all weights as one tensor per dtype, copied."""
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for sample in samples:
        kinds.setdefault(sample.dtype, []).append(sample)
    return [torch.cat(group) for group in kinds.values()]


class WeightCache:
    """Packed weights per set of weights; thread-safe."""

    def __init__(
        self,
        prepare: Callable[..., Sequence[torch.Tensor]],
        watch: bool,
        quantized: Sequence[tuple[int, str]] = (),
    ) -> None:
        self._prepare, self._watch, self._quantized = prepare, watch, quantized
        self._entries: dict[tuple[int, ...], PackedWeights] = {}
        self._lock = threading.Lock()
        self.packs = 0

    def get(self, weights: Sequence[torch.Tensor], thorough: bool) -> tuple[torch.Tensor, ...]:
        """What is packed from ``weights``, packed now if they are new or changed.

        Raises:
            WeightError: a weight that is to be quantised holds NaN or infinity.
        """
        key = tuple(map(id, weights))
        entry = self._entries.get(key)
        if entry is not None and self._fits(entry, weights, thorough):
            return entry.packed
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and self._fits(entry, weights, thorough):
                return entry.packed
            self._entries = {k: e for k, e in self._entries.items() if k != key and e.alive()}
            with torch.no_grad():
                packed = tuple(self._prepare(*weights))
            self._refuse_unhealthy(packed)
            self.packs += 1
            self._entries[key] = PackedWeights.of(weights, packed)
            return packed

    def _refuse_unhealthy(self, packed: Sequence[torch.Tensor]) -> None:
        for position, name in self._quantized:
            if not torch.isfinite(packed[position]).all():
                raise WeightError(
                    f"{name} holds NaN or infinity and cannot be quantised: mend the checkpoint, or run it as it is "
                    "with quantize='none'"
                )

    def _fits(self, entry: PackedWeights, weights: Sequence[torch.Tensor], thorough: bool) -> bool:
        if not self._watch:
            return all(source() is weight for source, weight in zip(entry.sources, weights, strict=True))
        return entry.follows(weights, thorough)

    def bytes(self) -> int:
        """Bytes of everything packed and still in use."""
        return sum(t.numel() * t.element_size() for e in self._entries.values() if e.alive() for t in e.packed)
