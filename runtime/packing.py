"""Running the prologue: piece by piece, so that no more memory is held than must be, and never twice for one result.

Two programs of one module (two resolutions, say) pack the same things from the same weights, so packed tensors are
found by what computes them and by the weights themselves. They live as long as a program uses them; those whose
weights were released live as long as these weights, because nothing could make them again.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ditc.kernels.errors import WeightError

from . import sums
from .artifact import Piece
from .meter import Meter, bytes_of
from .owners import prepare_owners
from .release import Look, reason_to_keep, refuse_released, release, released

Key = tuple[str, tuple[int, ...]]

_lock = threading.RLock()
"""One set of weights is packed at a time: the next program may then find it packed, or released."""


@dataclass(eq=False)
class PackedPiece:
    """What one piece made of its weights, and how these looked then."""

    sources: tuple[weakref.ref[torch.Tensor], ...]
    looks: tuple[Look, ...]
    packed: tuple[torch.Tensor, ...]

    def follows(self, weights: Sequence[torch.Tensor], looks: Sequence[Look]) -> bool:
        """Whether it was made of ``weights`` as they look now."""
        same = all(source() is weight for source, weight in zip(self.sources, weights, strict=True))
        return same and all(a.same(b) for a, b in zip(self.looks, looks, strict=True))


_shared: weakref.WeakValueDictionary[Key, PackedPiece] = weakref.WeakValueDictionary()
_held: dict[Key, tuple[PackedPiece, list[weakref.ref[torch.Tensor]]]] = {}


def _hold(key: Key, part: PackedPiece, weights: Sequence[torch.Tensor]) -> None:
    def drop(_: object) -> None:
        _held.pop(key, None)

    _held[key] = part, [weakref.ref(weight, drop) for weight in weights]


@dataclass(frozen=True, eq=False)
class Packed:
    """The prologue's results for one set of weights.

    Attributes:
        tensors: all results, in order.
        parts: the pieces that they came from, by what names them.
        looks: how each weight looked.
        made: pieces that had to run; the others were found.
        kept: name of each weight that could not be released, and the reason.
        peak_bytes: the most that weights, packed tensors and what pieces compute on the way took together. What an
            operator needs within itself is not seen.
    """

    tensors: tuple[torch.Tensor, ...]
    parts: dict[Key, PackedPiece]
    looks: tuple[Look, ...]
    made: int
    kept: dict[str, str]
    peak_bytes: int


class Packer:
    """The prologue of one program.

    Args:
        pieces: what it is made of.
        releasable: positions among the weights of those that are released after their last reader.
        names: of the weights, for messages.
    """

    def __init__(self, pieces: Sequence[Piece], releasable: Sequence[int] = (), names: Sequence[str] = ()) -> None:
        self._pieces, self._releasable, self._names = tuple(pieces), frozenset(releasable), tuple(names)

    def pack(self, weights: Sequence[torch.Tensor], old: dict[Key, PackedPiece]) -> Packed:
        """Runs each piece whose result is not there yet, and releases weights on the way.

        A weight is released when all that is made of it is made and found healthy. Where a piece fails, what was made
        before it stays and is found by the next attempt.

        Args:
            weights: the inputs of the prologue.
            old: parts that this program had; emptied on the way, so that each is freed before its successor is made.

        Raises:
            WeightError: a weight that is to be quantised holds NaN or infinity, or was released before.
        """
        with _lock, torch.no_grad():
            run = _Run(self, weights)
            try:
                return run.finish(old)
            finally:
                prepare_owners(run.released)


class _Run:
    """One run of a prologue."""

    def __init__(self, packer: Packer, weights: Sequence[torch.Tensor]) -> None:
        self._packer, self._weights = packer, weights
        self._looks: dict[int, Look] = {}
        self._readers = Counter(i for piece in packer._pieces for i in piece.inputs)
        self._made_of: dict[int, list[tuple[Key, PackedPiece, list[torch.Tensor]]]] = {}
        self._kept: dict[str, str] = {}
        self.released: list[torch.Tensor] = []
        self._meter = Meter(sum(bytes_of(w) for w in weights if released(w) is None))

    def finish(self, old: dict[Key, PackedPiece]) -> Packed:
        tensors: dict[int, torch.Tensor] = {}
        parts: dict[Key, PackedPiece] = {}
        made = 0
        for piece in self._packer._pieces:
            taken = [self._weights[i] for i in piece.inputs]
            key = piece.key, tuple(map(id, taken))
            looks = self._look(piece.inputs)
            # another program may have followed an edit already
            if (mine := old.pop(key, None)) is not None and not mine.follows(taken, looks):
                mine = None
            part = mine or _shared.get(key)
            if part is None or not part.follows(taken, looks):
                mine = part = None  # what it held is freed before its successor is made
                part = self._run(piece, taken, looks)
                _shared[key] = part
                made += 1
            if key not in parts:  # one layer that is called twice is packed once
                self._meter.held += sum(map(bytes_of, part.packed))
            parts[key] = part
            self._meter.note()
            tensors |= dict(zip(piece.outputs, part.packed, strict=True))
            self._release_read(piece.inputs, (key, part, taken))
        looks = self._look(range(len(self._weights)))
        ordered = tuple(tensors[i] for i in range(len(tensors)))
        return Packed(ordered, parts, looks, made, self._kept, self._meter.peak)

    def _look(self, positions: Sequence[int]) -> tuple[Look, ...]:
        unseen = [i for i in positions if i not in self._looks]
        live = []
        for i in unseen:
            record = released(self._weights[i])
            if record is None:
                live.append(i)
            else:
                self._looks[i] = record.look
        bits = [sums.bits_of(self._weights[i]) for i in live]
        checksums = sums.checksum(bits).unbind() if bits else ()
        for i, b, checksum in zip(live, bits, checksums, strict=True):
            weight = self._weights[i]
            self._looks[i] = Look(weight.data_ptr(), sums.version_of(weight), checksum, sums.sample(b).clone())
        return tuple(self._looks[i] for i in positions)

    def _run(self, piece: Piece, taken: list[torch.Tensor], looks: tuple[Look, ...]) -> PackedPiece:
        names = self._packer._names
        refuse_released(taken, [names[i] if i < len(names) else f"weight {i}" for i in piece.inputs])
        with self._meter:
            packed = tuple(piece.run(*taken))
        for position, name in piece.quantized:
            _refuse_unhealthy(packed[position], name)
        return PackedPiece(tuple(map(weakref.ref, taken)), looks, packed)

    def _release_read(self, positions: Sequence[int], made: tuple[Key, PackedPiece, list[torch.Tensor]]) -> None:
        """Counts that ``made`` has read its weights, and releases those that nothing else will read."""
        for i in positions:
            self._made_of.setdefault(i, []).append(made)
            self._readers[i] -= 1
            weight = self._weights[i]
            if self._readers[i] or i not in self._packer._releasable:
                continue
            if released(weight) is None:
                name = self._packer._names[i] if i < len(self._packer._names) else f"weight {i}"
                reason = reason_to_keep(weight)
                if reason is not None:
                    self._kept[name] = reason
                    continue
                self._meter.held -= release(weight, name, self._looks[i])
                self.released.append(weight)
            for part in self._made_of[i]:
                _hold(*part)


def _refuse_unhealthy(scale: torch.Tensor, name: str) -> None:
    # a byte is an exponent (E8M0), of which 255 is NaN
    healthy = (scale != 255).all() if scale.dtype == torch.uint8 else torch.isfinite(scale.float()).all()
    if not healthy:
        raise WeightError(
            f"{name} holds NaN or infinity and cannot be quantised: mend the checkpoint, or run it as it is "
            "with quantize='none'"
        )
