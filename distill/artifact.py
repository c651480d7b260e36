"""What a training ends with: a folder with weights, the sampler's manifest, and figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ditc.runtime.students import MANIFEST

from .errors import DistillError
from .loop import QUALITY, UPDATES
from .nets import AVERAGE
from .parallel import whole_state
from .records import read_records
from .training import Training

FOLDER = "student"
FIGURES = "quality.json"
WEIGHTS = "model.safetensors"


def write_student(training: Training, out: Path, command: Sequence[str] = ()) -> Path:
    """Write the student's moving average, in fp16, to `out`/student. All ranks have to call it; the first one writes.

    A model of diffusers is saved as one, so that its `from_pretrained` reads the folder; others as one safetensors
    file, for :func:`ditc.load_student` with a model of the same class.

    Args:
        command: the words of the command that made it, for the record.

    Raises:
        DistillError: a weight is too large for fp16.
    """
    state = {name: tensor.half() for name, tensor in whole_state(training.modules[AVERAGE]).items()}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DistillError(f"{name} does not fit fp16, or diverged: there is no student to write")
    folder = out / FOLDER
    if not training.world.leads:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = training.blank
    model.load_state_dict(state, assign=True)
    save = getattr(model, "save_pretrained", None)
    if callable(save):
        save(folder)
    else:
        from safetensors.torch import save_file

        save_file(state, folder / WEIGHTS)
    (folder / MANIFEST).write_text(training.method.sampler(training.subject).to_json(), "utf-8")
    (folder / FIGURES).write_text(json.dumps(figures(training, out, command), indent=2) + "\n", "utf-8")
    return folder


def figures(training: Training, out: Path, command: Sequence[str]) -> dict[str, Any]:
    """What is known of a finished training: its options, its last measurement, how long it took and on what."""
    updates = read_records(out / UPDATES) if (out / UPDATES).exists() else []
    measured = read_records(out / QUALITY) if (out / QUALITY).exists() else []
    last = {name: value for name, value in measured[-1].items() if name != "seconds"} if measured else None
    every = training.run.log_every
    return {
        "command": " ".join(command),
        "teacher": training.subject.source,
        "options": training.identity,
        "updates": training.update,
        "student_updates": training.student_updates,
        "training_seconds": round(sum(record["seconds_per_update"] * every for record in updates), 3),
        "quality": last,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
