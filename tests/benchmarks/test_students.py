"""The suite of students: rows are measured once, and the table says what they hold."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from benchmarks import students as suite
from ditc.examples.digits.evaluate import real_clips
from ditc.examples.digits.model import WEIGHTS


class Copyist(suite.Entrant):
    """Draws clips of the data."""

    prepared = 0

    def prepare(self) -> Callable[[Tensor, Sequence[int]], Tensor]:
        type(self).prepared += 1
        return lambda labels, seeds: real_clips(len(labels), seed=seeds[0] + 5)[0]


def test_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        suite, "entrants", lambda: [Copyist("teacher, 50 steps", WEIGHTS, 100), Copyist("two", WEIGHTS, 2)]
    )
    kept = tmp_path / "rows.jsonl"
    first = suite.run(clips=50, seeds=2, clock="cpu", only=["50 steps"], kept=kept, save=False)
    assert list(first["rows"]) == ["teacher, 50 steps", "held-out data"]
    both = suite.run(clips=50, seeds=2, clock="cpu", kept=kept, save=False)
    assert Copyist.prepared == 4
    assert both["rows"]["teacher, 50 steps"] == first["rows"]["teacher, 50 steps"]
    assert both["rows"]["two"][0]["frechet"] < 10
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| two")]
    assert lines[0].split(" | ")[1] == "2"
