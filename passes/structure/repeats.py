"""Finds what repeats in a row in a sequence of symbols."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Repeat:
    """``count`` repetitions of ``period`` symbols from ``start``; ``slack`` more symbols would still match.

    With slack, the repetitions may as well begin up to that much later: where a block ends is not decided here.
    """

    start: int
    period: int
    count: int
    slack: int

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count


def tandem_repeats(
    symbols: Sequence[Hashable], accept: Callable[[int, int], bool], place: Callable[[Repeat], Repeat]
) -> list[Repeat]:
    """The repeats that cover most, longest cover first, then what is left on both sides.

    ``accept(start, stop)`` says whether the symbols of one period can be a block; ``place`` uses up a repeat's slack.
    """
    found: list[Repeat] = []
    pending = [(0, len(symbols))]
    while pending:
        low, high = pending.pop()
        best = _best(symbols, low, high, accept)
        if best is not None:
            best = place(best)
            found.append(best)
            pending += [(low, best.start), (best.stop, high)]
    return sorted(found, key=lambda repeat: repeat.start)


def _best(symbols: Sequence[Hashable], low: int, high: int, accept: Callable[[int, int], bool]) -> Repeat | None:
    best: Repeat | None = None
    for period in range(1, (high - low) // 2 + 1):
        run = 0
        for at in range(low, high - period + 1):
            if at < high - period and symbols[at] == symbols[at + period]:
                run += 1
                continue
            count = run // period + 1
            start = at - run
            # the same cover by a multiple of the period says less, so strictly more is asked for
            if count > 1 and (best is None or count * period > best.count * best.period):
                candidate = Repeat(start, period, count, run % period)
                if accept(start, start + period):
                    best = candidate
            run = 0
    return best


def trimmed(symbols: Sequence[Hashable], pattern: Sequence[Hashable], start: int) -> int:
    """How many symbols from ``start`` on are ``pattern`` with some left out.

    At least half of the pattern must be there, and the first symbol of it too: else none.
    """
    at = matched = 0
    position = start
    while position < len(symbols) and at < len(pattern):
        try:
            at = list(pattern).index(symbols[position], at) + 1
        except ValueError:
            break
        matched += 1
        position += 1
    return matched if matched * 2 >= len(pattern) and matched < len(pattern) + 1 else 0
