"""`ditc distill`: configurations are strict, and the command trains, stops and writes."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ditc.distill.configure import configure
from ditc.distill.errors import DistillError
from ditc.distill.methods.dmd2 import DMD2
from ditc.distilling import distill
from ditc.runtime.students import MANIFEST

from .toys import tiny_subject

MODEL = "model/tiny.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configurations with a model "tiny", as a user would write them."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / MODEL).write_text(f"_target_: {tiny_subject.__module__}.tiny_subject\n")
    return tmp_path / "conf"


def test_steps_reach_the_method_and_overrides_the_run(folder: Path) -> None:
    found = configure(["model=tiny", "method=dmd2", "steps=2", "run.batch=8", "method.places=[blocks.0]"], folder)
    assert isinstance(found.method, DMD2)
    assert (found.method.steps, found.method.places, found.run.batch) == (2, ("blocks.0",), 8)
    assert "batch: 8" in found.text
    assert configure(["model=tiny", "method=ladd"], folder).method.needs_data


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("method=dmd3", "dmd3"),
        ("run.bach=8", "run.bach"),
        ("+run.bach=8", "did you mean 'batch'"),
        ("+method.guidanc=8", "did you mean 'guidance'"),
        ("run.batch=lots", "batch"),
        ("run.learning_rate=2", "learning_rate"),
        ("+optimizer=adam", "unknown configuration optimizer"),
        ("method._target_=ditc.nothing", "cannot be imported"),
        ("method._target_=builtins.dict", "must be a Method"),
        ("model._target_=builtins.dict", "must be a Subject"),
        ("+model.size=3", "does not take"),
        ("steps=[", "configuration"),
    ],
)
def test_wrong_configurations_are_refused(override: str, told: str, folder: Path) -> None:
    with pytest.raises(DistillError, match=told):
        configure(["model=tiny", override], folder)


def test_the_command_trains_and_writes_a_student(folder: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(distill)
    words = ["model=tiny", "steps=2", f"out={tmp_path / 'out'}", "run.updates=4", "run.batch=4", "run.precision=fp32"]
    shown = CliRunner().invoke(app, [*words, "--show", "--config-dir", str(folder)])
    assert "updates: 4" in shown.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*words, "--config-dir", str(folder)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "student" / MANIFEST).is_file()
    assert "updates: 4" in (tmp_path / "out" / "config.yaml").read_text()
