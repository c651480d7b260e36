"""Records of a training: one line of JSON each, in files that a resumed run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one line of JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a log, one dictionary for each line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def drop_records_after(path: Path, step: int, key: str = "step") -> None:
    """Forget what a killed run logged after its last checkpoint, at `step`: those steps are taken again."""
    if not path.exists():
        return
    kept = [line for line in path.read_text("utf-8").splitlines(keepends=True) if _is_kept(line, step, key)]
    path.write_text("".join(kept), "utf-8")


def _is_kept(line: str, step: int, key: str) -> bool:
    try:
        return bool(json.loads(line)[key] <= step)
    except json.JSONDecodeError:
        # the kill came amid the line
        return False
