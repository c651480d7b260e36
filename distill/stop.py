"""Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any


@dataclass
class Stop:
    """Set by the first Ctrl-C or SIGTERM, so that the step in progress ends and is saved; the second one kills."""

    asked: bool = False
    _previous: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[Stop]:
        """Takes the signals over, and gives them back at the end."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._ask)
        try:
            yield self
        finally:
            self._restore()

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())
