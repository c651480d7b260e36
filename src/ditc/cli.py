"""The ``ditc`` command."""

from __future__ import annotations

import json as json_module
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .text import progress_bar

if TYPE_CHECKING:
    from .bench.harness import Clock
    from .passes.plan import Plan

app = typer.Typer(
    help="A compiler for diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_console = Console()


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="a transformer class of diffusers, or a folder with config.json")],
    config: Annotated[Path | None, typer.Option(help="JSON file with the class's configuration")] = None,
    plan: Annotated[Path | None, typer.Option(help="TOML file with a plan")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="plan option, as NAME=VALUE (quantize=int8)")] = None,
    input_: Annotated[list[str] | None, typer.Option("--input", help="an input, as NAME=2x16x64[:dtype]")] = None,
    device: Annotated[str, typer.Option(help="meta needs no memory for weights; cpu runs the model once")] = "meta",
    json: Annotated[bool, typer.Option(help="print data instead of tables")] = False,
) -> None:
    """Show what the compiler sees in a model, and what the passes of a plan do with it."""
    from .explanation import explain as explain_model
    from .model_source import build_model, parse_input

    chosen = _plan_of(plan, set_)
    module = build_model(model, config, device)
    given = dict(parse_input(text, module) for text in input_ or [])
    from .example_inputs import example_inputs

    report = explain_model(module, (), example_inputs(module, given), chosen)
    if json:
        _console.print_json(json_module.dumps(report.to_data()))
    else:
        _console.print(report)


@app.command()
def plan(
    set_: Annotated[list[str] | None, typer.Option("--set", help="plan option, as NAME=VALUE (quantize=int8)")] = None,
) -> None:
    """Print a plan as TOML, to be edited and given to --plan or ditc.Plan.load."""
    sys.stdout.write(_plan_of(None, set_).to_toml())


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="a transformer class of diffusers, or a folder with config.json")],
    config: Annotated[Path | None, typer.Option(help="JSON file with the class's configuration")] = None,
    plan: Annotated[Path | None, typer.Option(help="TOML file with a plan")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="plan option, as NAME=VALUE (quantize=int8)")] = None,
    input_: Annotated[list[str] | None, typer.Option("--input", help="an input, as NAME=2x16x64[:dtype]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="timed calls of each candidate")] = 15,
    steps: Annotated[int, typer.Option(min=2, help="of a generation")] = 20,
    bound: Annotated[float, typer.Option(min=0, help="largest relative error with which ditc gets a number")] = 0.2,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU when there is one")] = None,
    decisions: Annotated[Path | None, typer.Option(help="PNG for what a cache guard decided, step by step")] = None,
    json: Annotated[bool, typer.Option(help="print data instead of tables")] = False,
) -> None:
    """Time a step of a model, with random weights: eagerly, through inductor, and through ditc with a plan."""
    import torch

    from .bench.compare import compare, guard_lines
    from .example_inputs import example_inputs
    from .model_source import build_model, parse_input

    chosen = _plan_of(plan, set_)
    if decisions is not None and chosen.cache is None:
        raise typer.BadParameter(
            "without a cache in the plan nothing is decided: --set cache=...", param_hint="--decisions"
        )
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    module = build_model(model, config, where)
    inputs = example_inputs(module, dict(parse_input(text, module) for text in input_ or []))
    clock: Clock = "cuda" if where == "cuda" else "wall"
    with progress_bar() as bar:
        task = bar.add_task("preparing", total=None)
        found = compare(
            module, inputs, chosen, rounds=rounds, steps=steps, bound=bound, clock=clock,
            progress=lambda text: bar.update(task, description=text),
        )  # fmt: skip
    if decisions is not None and found.guard is not None:
        from .plots import plot_decisions

        plot_decisions({str(chosen.cache): found.guard}, decisions)
    if json:
        _console.print_json(json_module.dumps(found.to_data()))
        return
    _console.print(found, found.ran)
    for line in guard_lines(found.guard) if found.guard is not None else ():
        _console.print(line)


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(help="folder of a diffusers pipeline, or of a transformer of the demo")],
    prompt: Annotated[list[str] | None, typer.Option(help="one for all, or one for each seed")] = None,
    label: Annotated[list[int] | None, typer.Option(help="class to draw; one for all, or one for each seed")] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="one for each picture; 0 when not given")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="the model's own when not given")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="scale; the model's own when not given")] = None,
    sampler: Annotated[Path | None, typer.Option(help="manifest of a student; the folder's own if it has one")] = None,
    plan: Annotated[Path | None, typer.Option(help="TOML file with a plan")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="plan option, as NAME=VALUE (quantize=int8)")] = None,
    with_: Annotated[list[str] | None, typer.Option("--with", help="pipeline option, NAME=VALUE (height=512)")] = None,
    out: Annotated[Path, typer.Option(help="folder for the pictures, which are named by their seeds")] = Path("out"),
    json: Annotated[bool, typer.Option(help="print data instead of text")] = False,
) -> None:
    """Draw pictures or clips from a folder, through a transformer that is compiled with a plan."""
    from .generating import Request, generate_files
    from .runtime.samplers import Sampler

    chosen = _plan_of(plan, set_)
    manifest = Sampler.from_text(sampler.read_text("utf-8")) if sampler is not None else None
    options = dict(_parse_option(text) for text in with_ or [])
    request = Request(seed or [0], prompt or [], label or [], steps, guidance, options)
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, description="drawing", completed=done, total=total)

        drawn = generate_files(source, request, chosen, out, manifest, show)
    if json:
        data = {"files": [str(file) for file in drawn.files], "seconds": drawn.seconds, "plan": chosen.to_options()}
        _console.print_json(json_module.dumps(data))
    else:
        _console.print(f"{', '.join(map(str, drawn.files))}: {drawn.seconds:.1f} s, compilation included")


def _plan_of(plan: Path | None, settings: list[str] | None) -> Plan:
    """The plan in a file, with what ``--set`` changes of it."""
    from .passes.plan import Plan

    options = Plan.load(plan).to_options() if plan is not None else {}
    return Plan(**(options | dict(_parse_option(text) for text in settings or [])))


def _parse_option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
    # a number, true, false, or a table: {self = "int8"}; whatever else TOML would read is text here
    return name, read if isinstance(read, (bool, int, float, dict)) else value


def _register() -> None:
    """Adds the commands that live in other rooms."""
    from .distilling import distill
    from .examples.digits.demo import demo

    app.command()(demo)
    app.command()(distill)


def main() -> None:
    """Runs the command; faults of the user's are one line, not a traceback."""
    from .passes.errors import DitcError

    if find_spec("ditc.examples") is not None:
        _register()
    try:
        app()
    except DitcError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
