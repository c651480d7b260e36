"""Ships a student: copies a finished run of `ditc distill` and writes its model card and curves from the records.

python -m ditc.examples.digits.student_card out/distill dmd2 --hardware "…" --note "…"
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from ditc.distill.artifact import FIGURES, FOLDER
from ditc.distill.loop import QUALITY, UPDATES
from ditc.distill.records import read_records
from ditc.examples.digits.model import WEIGHTS_FILE
from ditc.examples.digits.stages import STUDENTS
from ditc.runtime.samplers import Sampler
from ditc.runtime.students import MANIFEST

CARD = "MODEL_CARD.md"
CURVES = "curves.png"
_FACTS = "record.json"
_BIGGEST = 8_000_000


def draw_curves(folder: Path) -> None:
    """Draw losses, Fréchet distance and diversity over the updates, from the records in `folder`."""
    from matplotlib.figure import Figure

    updates, quality = (read_records(folder / name) for name in (UPDATES, QUALITY))
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, distance, diverse = figure.subplots(1, 3)
    for player in dict.fromkeys(name for record in updates for name in record["players"]):
        found = [record for record in updates if player in record["players"]]
        values = [record["players"][player]["loss"] for record in found]
        loss.plot([record["update"] for record in found], values, linewidth=1, label=player)
    loss.set(title="Loss", xlabel="update", yscale="log")
    loss.legend()
    at = [record["update"] for record in quality]
    distance.plot(at, [record["frechet"] for record in quality], marker="o", color="tab:orange")
    distance.set(title="Fréchet distance to held-out clips", xlabel="update", yscale="log")
    diverse.plot(at, [record["diversity"] for record in quality], marker="o", color="tab:green")
    diverse.set(title="Diversity within a digit", xlabel="update", ylim=(0, None))
    for axes in (loss, distance, diverse):
        axes.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=90)


def describe(folder: Path) -> str:
    """The text of the model card: every figure in it is read from the files in `folder`."""
    facts: dict[str, Any] = json.loads((folder / _FACTS).read_text("utf-8"))
    told = json.loads((folder / FIGURES).read_text("utf-8"))
    sampler = Sampler.from_text((folder / MANIFEST).read_text("utf-8"))
    levels = ", ".join(f"{sigma:.4g}" for sigma in sampler.levels)
    measured = read_records(folder / QUALITY)
    rows = "\n".join(
        f"| {row['update']:,} | {100 * row['accuracy']:.1f} % | {row['frechet']:.3f} | {row['diversity']:.2f} | "
        f"{row['background_motion']:.4f} |"
        for row in measured
    )
    notes = "".join(f"- {note}\n" for note in facts["notes"])
    options = ", ".join(f"{name}={value}" for name, value in told["options"].items() if name.startswith("method."))
    megabytes = (folder / WEIGHTS_FILE).stat().st_size / 1e6
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    return f"""# Moving digits in {sampler.steps} step{"s" if sampler.steps > 1 else ""}: {told["options"]["method"]}

A student of the demo's transformer (`examples/digits/weights`, see its card for data and use): the same architecture
and number of parameters, fewer steps, guidance distilled in.

| | |
|---|---|
| files | `config.json`, `{WEIGHTS_FILE}` (fp16, {megabytes:.2f} MB; computed in fp32), `{MANIFEST}` |
| input, output | as the teacher's; the condition is a class, and no guidance is applied |
| sampling | `{sampler.kind}` ({sampler.solver}), {sampler.steps} steps at sigma {levels}: as `{MANIFEST}` says |
| licence | Apache-2.0, as the project |

`ditc.load_student(folder)` gives a denoiser that `ditc.generate` samples as its manifest says;
`WanTransformer3DModel.from_pretrained(folder)` reads the weights.

## Training

`{told["command"]}`

- {told["updates"]:,} updates, {told["student_updates"]:,} of them of the student, {told["training_seconds"] / 60:.0f}
  minutes on {facts["hardware"]}; {versions}
- {options}
- the weights are the moving average of the student's
{notes}
![curves]({CURVES})

## Quality on the way

100 clips, seeds 0 to 99, bf16 autocast. `python -m benchmarks students` measures the finished student beside its
teacher, in fp32, over several seeds.

| update | asked digit is read | Fréchet distance to held-out | diversity | background motion |
|---|---|---|---|---|
{rows}

Accuracy and Fréchet distance are those of the teacher's card, at 100 clips; diversity is the mean distance of two clips
of one digit in the classifier's features.
"""


def main(
    run: Annotated[Path, typer.Argument(help="out folder of a finished `ditc distill`")],
    name: Annotated[str, typer.Argument(help="of the student's folder")],
    hardware: Annotated[str, typer.Option(help="what it was trained on")],
    note: Annotated[list[str] | None, typer.Option(help="a line of the card; may be repeated")] = None,
    into: Annotated[Path, typer.Option(help="folder of the students")] = STUDENTS,
) -> None:
    """Copy the student of a run into the demo, with its records, curves and model card."""
    source, folder = run / FOLDER, into / name
    if not (source / MANIFEST).is_file():
        raise typer.BadParameter(f"{source} holds no student: let the training end first")
    if (source / WEIGHTS_FILE).stat().st_size > _BIGGEST:
        raise typer.BadParameter(f"{WEIGHTS_FILE} is larger than {_BIGGEST:,} bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*source.iterdir(), run / UPDATES, run / QUALITY):
        shutil.copyfile(path, folder / path.name)
    facts = {"hardware": hardware, "notes": list(note or [])}
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    draw_curves(folder)
    (folder / CARD).write_text(describe(folder), "utf-8")
    typer.echo(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(main)
