"""From configuration files and overrides to a subject, a method and a run (hydra)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DistillError
from .method import Method
from .run import Run
from .subject import Subject

CONF = Path(__file__).resolve().parent / "conf"


@dataclass(frozen=True)
class Configuration:
    """What a training is made of; `text` is all of it as YAML, with every override in it."""

    subject: Subject
    method: Method
    run: Run
    out: Path
    init: Path | None
    text: str


def configure(overrides: Sequence[str] = (), folder: Path | None = None) -> Configuration:
    """Read conf/config.yaml, with overrides in hydra's grammar: `method=dmd2 steps=4 run.batch=8 model.guidance=3`.

    Args:
        folder: of more configuration files, with model/, method/ and experiment/ in it, searched first.

    Raises:
        DistillError: what hydra, the method, the run or the model refuse.
        ImportError: hydra is not installed.
    """
    values = compose(overrides, folder)
    from omegaconf import OmegaConf

    known = {"model", "method", "run", "steps", "out", "init"}
    odd = values.keys() - known
    if odd:
        raise DistillError(f"unknown configuration {', '.join(sorted(odd))}: there are {', '.join(sorted(known))}")
    method = _made(values["method"], "method")
    if not isinstance(method, Method):
        raise DistillError(f"method must be a Method; {values['method']['_target_']} gave {type(method).__name__}")
    run = Run(**values["run"])
    subject = _made(values["model"], "model")
    if not isinstance(subject, Subject):
        raise DistillError(f"model must be a Subject; {values['model']['_target_']} gave {type(subject).__name__}")
    init = values.get("init")
    return Configuration(
        subject, method, run, Path(values["out"]), None if init is None else Path(init), OmegaConf.to_yaml(values)
    )


def compose(overrides: Sequence[str], folder: Path | None = None) -> dict[str, Any]:
    """The configuration as plain data."""
    try:
        from hydra import compose as hydra_compose
        from hydra import initialize_config_dir
        from hydra.core.global_hydra import GlobalHydra
        from hydra.errors import HydraException
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
    except ImportError as error:
        raise ImportError("distillation is configured with hydra: pip install 'ditc[distill]'") from error
    wanted = list(overrides)
    if folder is not None:
        wanted.append(f"hydra.searchpath=[file://{folder.resolve()}]")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides=wanted)
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise DistillError(f"configuration: {error}") from error
    assert isinstance(values, dict)
    return {str(name): value for name, value in values.items()}


def _made(values: dict[str, Any], part: str) -> Any:
    """Call the `_target_` of a part of the configuration with everything else in it."""
    from hydra.errors import HydraException
    from hydra.utils import get_object

    options = dict(values)
    target = options.pop("_target_", None)
    if not isinstance(target, str):
        raise DistillError(f"{part} needs _target_, what makes it, as package.module.name")
    try:
        maker = get_object(target)
    except (HydraException, ImportError, ValueError) as error:
        raise DistillError(f"{part}: {target} cannot be imported: {error}") from error
    try:
        return maker(**options)
    except TypeError as error:
        raise DistillError(f"{part}: {target} does not take {options}: {error}") from error
