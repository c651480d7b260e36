"""Writes the model card and its curves from the records of a training run and the measured figures, and nothing else.

python -m ditc.examples.digits.card --run out/digits --quality quality.json --hardware "…" --note "…"
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from ditc.distill.records import read_records
from ditc.examples.digits.data import load_digits
from ditc.examples.digits.model import WEIGHTS, WEIGHTS_FILE, load_transformer
from ditc.examples.digits.training import Recipe

RESULTS = "results.json"
CARD = "MODEL_CARD.md"
CURVES = "curves.png"
LOGS = ("steps.jsonl", "quality.jsonl")


def draw_curves(folder: Path) -> None:
    """Draw loss, accuracy and Fréchet distance over the steps, from the logs in `folder`, into `curves.png`."""
    from matplotlib.figure import Figure

    steps, quality = (read_records(folder / name) for name in LOGS)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    loss, shown, distance = figure.subplots(1, 3)
    loss.plot([record["step"] for record in steps], [record["loss"] for record in steps], linewidth=1)
    loss.set(title="Flow-matching loss", xlabel="step", yscale="log")
    at = [record["step"] for record in quality]
    shown.plot(at, [100 * record["accuracy"] for record in quality], marker="o")
    shown.set(title="Clips that show the asked digit (%)", xlabel="step", ylim=(0, 103))
    distance.plot(at, [record["frechet"] for record in quality], marker="o", color="tab:orange")
    distance.set(title="Fréchet distance to held-out clips", xlabel="step", yscale="log")
    for axes in (loss, shown, distance):
        axes.grid(alpha=0.3)
    figure.savefig(folder / CURVES, dpi=110)


def describe(folder: Path) -> str:
    """The text of the model card: every figure in it is read from the files in `folder`."""
    results = json.loads((folder / RESULTS).read_text("utf-8"))
    judge = json.loads((folder / "classifier.json").read_text("utf-8"))
    training, quality = results["training"], results["quality"]
    parts = {split: len(load_digits(split).labels) for split in ("teacher", "classifier", "held-out")}
    rows = "\n".join(
        f"| {name} | {100 * row['accuracy']:.1f} % | {row['frechet']:.3f} | {row['background_motion']:.4f} |"
        for name, row in quality["rows"].items()
    )
    held_out = judge["accuracy"]["held-out"]["frames"]
    last_seed = quality["seed"] + quality["clips"] - 1
    return f"""# Moving digits

A class-conditional video diffusion transformer: diffusers' `WanTransformer3DModel` with {results["parameters"]:,}
parameters, on pixels. It draws clips of 8 frames of 24x24 pixels in which a handwritten digit moves and bounces over a
static textured background. It exists so that `ditc demo`, the tests and the benchmarks have a real architecture with
trained weights to work on, and for no other use.

| | |
|---|---|
| files | `config.json`, `{WEIGHTS_FILE}` (fp16, {results["bytes"] / 1e6:.2f} MB; computed in fp32) |
| input | `hidden_states` (B, 1, 8, 24, 24), `timestep` (B,) = 1000 sigma, `encoder_hidden_states` (B, 4, 16) |
| condition | one-hot class tokens, `ditc.examples.digits.model.class_tokens`; class 10 is none, for guidance |
| output | velocity eps - x0 of the rectified flow x = (1 - sigma) x0 + sigma eps |
| sampling | flow Euler, {quality["steps"]} steps, guidance {quality["guidance"]:g}: `uncond + w(cond - uncond)` |
| licence | Apache-2.0, as the project |

`WanTransformer3DModel.from_pretrained(folder)` reads it where `accelerate` is installed;
`ditc.examples.digits.model.load_transformer()` reads it without.

## Data

scikit-learn's digits (E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI, 1998; CC BY 4.0): 1797
images of 8x8, divided by their rank within their class into {parts["teacher"]} for this model, {parts["classifier"]}
for the classifier that judges it, and {parts["held-out"]} held out, which neither has seen. Clips are drawn on the fly:
the digit enlarged to 12 px, constant speed of 1 to 2.5 px a frame, bouncing, over gratings and smooth noise.

## Training

`{training["command"]}`

- {training["steps"]:,} steps of {training["batch"]} clips, seed {training["seed"]}, {training["precision"]} autocast
- Muon on the matrices of the blocks, AdamW on the rest; logit-normal times; the class is dropped in
  {100 * training["class_dropout"]:.0f} % of the clips
- the weights are the moving average ({training["ema"]:g})
- hardware: {training["hardware"]}, shared with other work: {training["seconds"] / 60:.0f} minutes of training steps
  (median {training["seconds_per_step"]:.2f} s a step); torch {training["torch"]}, Python {training["python"]}
- the last loss, the mean of {training["last_losses"]} steps, is {training["loss"]:.4f}
- {training["note"]}

![curves]({CURVES})

The curves are those of `{LOGS[0]}` and `{LOGS[1]}`, measured on the way with 40 clips and 20 steps.

## Quality

{quality["clips"]} clips, as many of each digit, seeds {quality["seed"]} to {last_seed}:
`{quality["command"]}`

| clips | asked digit is read | Fréchet distance to held-out | background motion |
|---|---|---|---|
{rows}

The digit is read by an independent classifier of {judge["parameters"]:,} parameters
(`{judge["command"]}`; {100 * held_out:.2f} % of single held-out frames right), by the mean
probability over the frames of a clip. The Fréchet distance is that of its 32 features over all frames, to as many clips
of held-out digits; the lower rows are what real clips reach against the same. Background motion is the standard
deviation over time outside of the digit, in units of [-1, 1]: 0.0078 is one grey level of 256.

## Limits

It knows ten digits, one size, one range of speeds and one kind of background. What it draws is only as varied as
{parts["teacher"]} images of a few writers allow.
"""


def main(
    run: Annotated[Path, typer.Option(help="Folder of the training run")],
    quality: Annotated[Path, typer.Option(help="JSON file that ditc.examples.digits.evaluate wrote")],
    hardware: Annotated[str, typer.Option(help="What it was trained on")],
    note: Annotated[str, typer.Option(help="What else a reader should know of the run")],
    folder: Annotated[Path, typer.Option(help="Folder of the shipped weights")] = WEIGHTS,
) -> None:
    """Copy the records of a run beside its weights, and write results.json, curves.png and MODEL_CARD.md."""
    for name in LOGS:
        shutil.copyfile(run / name, folder / name)
    records = read_records(folder / LOGS[0])
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    recipe = Recipe(**state["recipe"])
    seconds = sorted(record["seconds_per_step"] for record in records)
    every = records[0]["step"]
    last = [record["loss"] for record in records[-10:]]
    results = {
        "parameters": sum(parameter.numel() for parameter in load_transformer(folder).parameters()),
        "bytes": (folder / WEIGHTS_FILE).stat().st_size,
        "training": {
            "command": f"python -m ditc.examples.digits.train --steps {recipe.steps} --seed {recipe.seed}",
            **state["recipe"],
            "hardware": hardware,
            "note": note,
            "torch": torch.__version__.split("+")[0],
            "python": platform.python_version(),
            "seconds": round(every * sum(seconds)),
            "seconds_per_step": round(seconds[len(seconds) // 2], 3),
            "loss": round(sum(last) / len(last), 5),
            "last_losses": every * len(last),
        },
        "quality": json.loads(quality.read_text("utf-8")),
    }
    (folder / RESULTS).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8")
    draw_curves(folder)
    (folder / CARD).write_text(describe(folder), "utf-8")
    typer.echo(f"wrote {folder / CARD}")


if __name__ == "__main__":
    typer.run(main)
