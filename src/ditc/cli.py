"""The ``ditc`` command."""

from __future__ import annotations

import json as json_module
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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
    from .passes.plan import Plan

    options = Plan.load(plan).to_options() if plan is not None else {}
    options |= dict(_parse_option(text) for text in set_ or [])
    chosen = Plan(**options)
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
    from .passes.plan import Plan

    sys.stdout.write(Plan(**dict(_parse_option(text) for text in set_ or [])).to_toml())


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
