"""The students that ship: small, whole, sampled as their manifests say, and described by their own records."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

import ditc
from ditc.distill.artifact import FIGURES
from ditc.distilling import distill
from ditc.examples.digits.classifier import load_classifier
from ditc.examples.digits.data import CLASSES, CLIP_SHAPE
from ditc.examples.digits.distilling import call, digits_subject, diversity
from ditc.examples.digits.evaluate import measure_clips
from ditc.examples.digits.model import WEIGHTS_FILE, class_tokens
from ditc.examples.digits.stages import STUDENTS, students
from ditc.examples.digits.student_card import CARD, CURVES, describe, main
from ditc.runtime.samplers import SamplerError
from ditc.runtime.students import load_student

SHIPPED = students()
names = pytest.mark.parametrize("folder", SHIPPED, ids=[folder.name for folder in SHIPPED])


def test_there_are_students() -> None:
    assert SHIPPED
    assert min(load_student(folder).sampler.steps for folder in SHIPPED) <= 2


@names
def test_a_shipped_student_draws_the_asked_digits(folder: Path) -> None:
    assert (folder / WEIGHTS_FILE).stat().st_size <= 8_000_000
    student = load_student(folder, run=call)
    assert student.sampler.role == "student"
    labels = torch.arange(CLASSES)
    clips = ditc.generate(student, class_tokens(labels), seeds=range(CLASSES), shape=CLIP_SHAPE).clamp(-1, 1)
    quality = measure_clips(load_classifier(), clips, labels)
    assert quality.accuracy >= 0.8
    assert quality.background_motion < 0.05
    with pytest.raises(SamplerError, match="steps"):
        ditc.generate(student, class_tokens(labels), seeds=range(CLASSES), shape=CLIP_SHAPE, steps=9)


@names
def test_the_card_says_what_the_records_say(folder: Path) -> None:
    assert (folder / CARD).read_text("utf-8") == describe(folder)
    assert (folder / CURVES).stat().st_size > 1000
    told = json.loads((folder / FIGURES).read_text("utf-8"))
    assert told["command"].startswith("ditc distill ")
    assert "out=" not in told["command"]
    assert told["quality"]["accuracy"] >= 0.9


def test_a_run_that_has_not_ended_cannot_be_shipped(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    refused = CliRunner().invoke(app, [str(tmp_path), "it", "--hardware", "any", "--into", str(tmp_path)])
    assert refused.exit_code == 2
    assert "no student" in refused.output


def test_shipping_copies_a_run_and_describes_it(tmp_path: Path) -> None:
    source = SHIPPED[0]
    (tmp_path / "run" / "student").mkdir(parents=True)
    for path in source.iterdir():
        place = tmp_path / "run" if path.suffix == ".jsonl" else tmp_path / "run" / "student"
        (place / path.name).write_bytes(path.read_bytes())
    app = typer.Typer()
    app.command()(main)
    words = [str(tmp_path / "run"), "it", "--hardware", "any machine", "--note", "a note", "--into", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert load_student(tmp_path / "it").sampler == load_student(source).sampler
    card = (tmp_path / "it" / CARD).read_text("utf-8")
    assert "any machine" in card
    assert "- a note\n" in card


def test_the_subject_refuses_too_few_clips() -> None:
    with pytest.raises(ValueError, match="at least 10"):
        digits_subject(clips=9)
    assert STUDENTS.name == "students"


def test_diversity_is_the_mean_distance_within_a_class() -> None:
    # two frames each: class 0 at 0 and 3, class 1 at 5 and 6
    features = torch.tensor([[0.0], [0.0], [2.0], [4.0], [5.0], [5.0], [6.0], [6.0]])
    assert diversity(features, torch.tensor([0, 0, 1, 1])) == pytest.approx((3 + 1) / 2)


def test_the_command_prints_json(tmp_path: Path) -> None:
    words = ["method=dmd2", "model=digits", "model.clips=10", "steps=2", "method.adversarial=0", "run.batch=2"]
    words += ["run.updates=4", "run.measure_every=0", f"out={tmp_path}"]
    app = typer.Typer()
    app.command()(distill)
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["updates"] == 4
    assert load_student(told["student"]).sampler.steps == 2
