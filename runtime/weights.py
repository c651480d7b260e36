"""Packed weights that follow the module they came from.

Dynamo shares one compiled graph between instances of a class, and weights are inputs of the graph. So what is derived
from weights (quantised, concatenated) is kept per set of weights, and made anew when they change. A change is noticed

- at every call: another tensor, another storage, another version counter (in-place edits, ``load_state_dict``,
  ``optimizer.step``), or another value in a sample of each weight (edits through ``.data``, as LoRA fusion does them,
  bypass the version counter but touch nearly every element);
- at the first call of a generation: a checksum over all of every weight, for what else happens through ``.data``;
  where generations follow so closely that checksums would take more than 2 % of the time, some are left out.

A weight that was released after packing (:mod:`.release`) cannot be looked at; nobody can have edited it either, and
one that is given values again is seen by its new storage.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import sums
from .artifact import Piece
from .meter import bytes_of
from .packing import Key, Packed, PackedPiece, Packer
from .release import released

CHECKSUM_SHARE = 0.02
"""Most of the time between two checksums that the checksum itself may take."""

_RELEASED = -2
"""Stands for the version of a released weight, which has none that matters."""


def _mark(weight: torch.Tensor) -> tuple[int, int]:
    record = released(weight)
    return (weight.data_ptr(), sums.version_of(weight)) if record is None else (record.storage._cdata, _RELEASED)


@dataclass(eq=False)
class PackedWeights:
    """What was packed from one set of weights, and how those weights looked then.

    ``live`` are the positions of the weights that were not released; ``bits``, ``samples`` and ``checksum`` are
    theirs alone, and whether all of them were ``contiguous``: else bits are copies, which see no later edit.
    """

    sources: tuple[weakref.ref[torch.Tensor], ...]
    marks: list[tuple[int, int]]
    live: list[int]
    bits: list[torch.Tensor]
    samples: list[torch.Tensor]
    sampled: list[torch.Tensor]
    checksum: torch.Tensor
    contiguous: bool
    result: Packed
    checksum_due: float = 0.0

    @classmethod
    def of(cls, weights: Sequence[torch.Tensor], result: Packed) -> PackedWeights:
        """Remembers ``weights`` beside what was packed from them."""
        live = [i for i, weight in enumerate(weights) if released(weight) is None]
        # a view of a contiguous weight sees later edits; a non-contiguous one is read anew at each look
        bits = [sums.bits_of(weights[i]) for i in live]
        checksums = [result.looks[i].checksum for i in live]
        return cls(
            tuple(weakref.ref(w) for w in weights),
            [_mark(w) for w in weights],
            live,
            bits,
            [sums.sample(b) for b in bits],
            _gather([result.looks[i].sample for i in live]),
            torch.stack(checksums) if checksums else sums.checksum(()),
            all(weights[i].is_contiguous() for i in live),
            result,
        )

    def alive(self) -> bool:
        """Whether every weight it was made from still exists."""
        return all(source() is not None for source in self.sources)

    def follows(self, weights: Sequence[torch.Tensor], thorough: bool) -> bool:
        """Whether ``weights`` are still what was packed."""
        for weight, source, mark in zip(weights, self.sources, self.marks, strict=True):
            if source() is not weight or mark != _mark(weight):
                return False
        live = self.live
        if live and weights[live[0]].device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True  # values cannot be read while a CUDA graph is recorded
        # strides are the same as then: Dynamo guards them
        bits = self.bits if self.contiguous else [sums.bits_of(weights[i]) for i in live]
        samples = self.samples if self.contiguous else [sums.sample(b) for b in bits]
        if not all(torch.equal(a, b) for a, b in zip(_gather(samples), self.sampled, strict=True)):
            return False
        return not thorough or self._checksum_holds(bits)

    def _checksum_holds(self, bits: Sequence[torch.Tensor]) -> bool:
        start = time.perf_counter()
        if start < self.checksum_due:
            return True
        if not torch.equal(sums.checksum(bits), self.checksum):
            return False  # and due again: the next to ask must not take silence for an answer
        end = time.perf_counter()
        self.checksum_due = end + (end - start) / CHECKSUM_SHARE
        return True


def _gather(samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The samples of all weights as one tensor per dtype, copied."""
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for sample in samples:
        kinds.setdefault(sample.dtype, []).append(sample)
    return [torch.cat(group) for group in kinds.values()]


@dataclass(frozen=True)
class Memory:
    """Bytes of the weights that a prologue reads and of what it made of them, over all sets of weights in use.

    ``originals`` counts weights whether or not they were ``released``; ``peak`` is the most that one set needed while
    it was packed. Tensors that several programs share count in each of them.
    """

    packed: int = 0
    originals: int = 0
    released: int = 0
    peak: int = 0

    @property
    def resident(self) -> int:
        """What is held now: packed tensors, and weights that were not released."""
        return self.packed + self.originals - self.released


class WeightCache:
    """Packed weights per set of weights; thread-safe.

    Args:
        pieces: the prologue.
        watch: whether edits are looked for; else a set of weights is packed once.
        releasable: positions among the weights of those that are released once packed.
        names: of the weights, for messages.
    """

    def __init__(
        self, pieces: Sequence[Piece], watch: bool, releasable: Sequence[int] = (), names: Sequence[str] = ()
    ) -> None:
        self._packer, self._watch = Packer(pieces, releasable, names), watch
        self._entries: dict[tuple[int, ...], PackedWeights] = {}
        self._lock = threading.Lock()
        self.packs = 0
        self._peak = 0

    def get(self, weights: Sequence[torch.Tensor], thorough: bool) -> tuple[torch.Tensor, ...]:
        """What is packed from ``weights``, packed now if they are new or changed.

        Raises:
            WeightError: a weight that is to be quantised holds NaN or infinity, or its values were released.
        """
        key = tuple(map(id, weights))
        entry = self._entries.get(key)
        if entry is not None and self._fits(entry, weights, thorough):
            return entry.result.tensors
        del entry  # its views would keep weights from being released
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and self._fits(entry, weights, thorough):
                return entry.result.tensors
            old: dict[Key, PackedPiece] = dict(entry.result.parts) if entry is not None else {}
            del entry
            self._entries = {k: e for k, e in self._entries.items() if k != key and e.alive()}
            result = self._packer.pack(weights, old)
            self.packs += bool(result.made)
            self._peak = max(self._peak, result.peak_bytes)
            self._entries[key] = PackedWeights.of(weights, result)
            return result.tensors

    def _fits(self, entry: PackedWeights, weights: Sequence[torch.Tensor], thorough: bool) -> bool:
        if not self._watch:
            return all(source() is weight for source, weight in zip(entry.sources, weights, strict=True))
        return entry.follows(weights, thorough)

    def memory(self) -> Memory:
        """Bytes of everything that is still in use."""
        packed = originals = gone = 0
        for entry in list(self._entries.values()):
            weights = [source() for source in entry.sources]
            alive = [w for w in weights if w is not None]
            if len(alive) < len(weights):
                continue
            packed += sum(bytes_of(tensor) for tensor in {id(t): t for t in entry.result.tensors}.values())
            originals += sum(map(bytes_of, alive))
            gone += sum(bytes_of(w) for w in alive if released(w) is not None)
        return Memory(packed, originals, gone, self._peak)

    def unreleased(self) -> dict[str, str]:
        """Names of the weights that were to be released and could not be, with the reason."""
        return {name: why for entry in list(self._entries.values()) for name, why in entry.result.kept.items()}
