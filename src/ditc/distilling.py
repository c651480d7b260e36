"""``ditc distill``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def distill(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="options, as method=dmd2 model=digits steps=4 run.batch=8 out=FOLDER")
    ] = None,
    config_dir: Annotated[
        Path | None, typer.Option(help="folder with more configurations: model/, method/, experiment/")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="print the configuration as YAML, and do nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print data instead of text")] = False,
) -> None:
    """Train a student that needs few steps, and write it with its sampler.

    A run that was stopped goes on when the same command is given again. Under torchrun (`torchrun --nproc-per-node 2
    -m ditc.cli distill ...`) the ranks share parameters and batches.
    """
    from .distill.artifact import FIGURES, write_student
    from .distill.configure import configure
    from .distill.loop import run_training
    from .distill.parallel import joined, leave
    from .distill.training import Training
    from .distill.weights import read_weights

    configuration = configure(overrides or [], config_dir)
    if show:
        typer.echo(configuration.text, nl=False)
        return
    # the data alone go to standard output
    console = Console(stderr=as_json)
    subject, method, run, out = configuration.subject, configuration.method, configuration.run, configuration.out
    initial = None if configuration.init is None else read_weights(configuration.init, subject.teacher)
    with joined(run.pick_device()) as world:
        training = Training(subject, method, run, world, initial)
        if world.leads:
            out.mkdir(parents=True, exist_ok=True)
            (out / "config.yaml").write_text(configuration.text, "utf-8")
            count = sum(parameter.numel() for parameter in subject.teacher.parameters())
            console.print(f"{subject.name}: {count:,} parameters, {method.name}, on {world.ranks} × {world.device}")
        if not run_training(training, out, console):
            if world.leads:
                console.print(f"stopped at update {training.update}; the same command goes on from there")
            raise typer.Exit(130)
        # where it was written is nobody else's business
        told = [word for word in overrides or [] if not word.startswith("out=")]
        folder = write_student(training, out, ["ditc", "distill", *told])
        if world.leads:
            console.print(f"wrote {folder}")
        if world.leads and as_json:
            quality = json.loads((folder / FIGURES).read_text("utf-8"))
            typer.echo(json.dumps({"student": str(folder), "updates": training.update, **quality}))
    leave()
