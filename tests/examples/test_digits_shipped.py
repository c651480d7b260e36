"""What ships: the weights, the judge, and a model card that says what the records beside it say."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from ditc.distill.records import read_records
from ditc.examples.digits.card import CARD, LOGS, RESULTS, describe
from ditc.examples.digits.classifier import Classifier, judge_clips, load_classifier, measure_classifier
from ditc.examples.digits.evaluate import denoiser_of, draw_clips, measure_clips, measure_floor, real_clips
from ditc.examples.digits.evaluate import main as evaluate_main
from ditc.examples.digits.model import (
    CONFIG,
    NULL_CLASS,
    WEIGHTS,
    WEIGHTS_FILE,
    check_video,
    class_tokens,
    load_transformer,
)


def test_the_weights_fit_eight_megabytes_and_are_healthy_half_precision() -> None:
    from safetensors.torch import load_file

    assert (WEIGHTS / WEIGHTS_FILE).stat().st_size <= 8_000_000
    weights = load_file(WEIGHTS / WEIGHTS_FILE)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


def test_the_transformer_is_diffusers_own_in_the_demos_configuration() -> None:
    from diffusers import WanTransformer3DModel

    model = load_transformer()
    assert type(model) is WanTransformer3DModel
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    shipped = {name: model.config[name] for name in CONFIG}  # type: ignore[index]
    assert shipped | {"patch_size": tuple(shipped["patch_size"])} == CONFIG


def test_from_pretrained_reads_the_same_weights() -> None:
    pytest.importorskip("accelerate", reason="diffusers loads this class through accelerate only")
    from diffusers import WanTransformer3DModel

    ours, theirs = load_transformer().state_dict(), WanTransformer3DModel.from_pretrained(WEIGHTS).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_generated_clips_show_the_asked_digits_on_a_still_background() -> None:
    labels = torch.arange(10)
    video = draw_clips(denoiser_of(load_transformer()), labels, range(500, 510), steps=12)
    quality = measure_clips(load_classifier(), video, labels)
    assert quality.accuracy >= 0.9
    assert quality.background_motion < 0.02
    subject = (video > 0.3).float().sum((1, 3, 4))
    assert bool((subject > 4).all()), "the digit must be there in every frame"


def test_the_judge_reads_held_out_frames() -> None:
    accuracy = measure_classifier(load_classifier(), "held-out", clips=200, seed=77)
    assert accuracy["frames"] >= 0.97
    assert accuracy["clips"] >= 0.98


def test_the_judge_tells_noise_and_wrong_digits() -> None:
    video, labels = real_clips(40)
    floor = measure_clips(load_classifier(), video, labels, real_clips(40, seed=1)[0])
    wrong = measure_clips(load_classifier(), video, labels.roll(1), real_clips(40, seed=1)[0])
    grain = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    noisy = measure_clips(load_classifier(), (video + 0.2 * grain).clamp(-1, 1), labels, real_clips(40, seed=1)[0])
    assert wrong.accuracy < 0.1 < floor.accuracy
    assert noisy.frechet > 3 * floor.frechet
    assert noisy.background_motion > 0.1 > floor.background_motion


def test_the_floor_is_lower_for_held_out_digits_than_the_distance_between_classes() -> None:
    floor = measure_floor(load_classifier(), 40)
    video, labels = real_clips(40, seed=3)
    of_one_class = video[labels == 3].repeat(10, 1, 1, 1, 1)
    judge = load_classifier()
    far = measure_clips(judge, of_one_class, torch.full((40,), 3), real_clips(40)[0])
    assert set(floor) == {"held-out data", "teacher's data"}
    assert all(row.frechet < 0.2 * far.frechet for row in floor.values())


def test_the_model_card_says_what_the_records_say() -> None:
    results = json.loads((WEIGHTS / RESULTS).read_text("utf-8"))
    card = (WEIGHTS / CARD).read_text("utf-8")
    assert card == describe(WEIGHTS)
    generated = results["quality"]["rows"]["generated"]
    assert f"{100 * generated['accuracy']:.1f} %" in card
    assert results["bytes"] == (WEIGHTS / WEIGHTS_FILE).stat().st_size
    assert results["parameters"] == sum(parameter.numel() for parameter in load_transformer().parameters())
    steps = read_records(WEIGHTS / LOGS[0])
    assert steps[-1]["step"] == results["training"]["steps"]
    assert [record["step"] for record in steps] == list(range(20, results["training"]["steps"] + 1, 20))
    assert results["quality"]["clips"] >= 200
    assert generated["accuracy"] >= 0.9


def test_class_tokens_tell_the_classes_apart() -> None:
    tokens = class_tokens(torch.arange(NULL_CLASS + 1))
    assert tokens.shape == (11, 4, 16)
    assert len({row.numpy().tobytes() for row in tokens}) == 11
    assert len({row.numpy().tobytes() for row in tokens[0]}) == 4


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([11]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([]).long()],
)
def test_labels_that_are_no_class_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="labels"):
        class_tokens(labels)


@pytest.mark.parametrize(
    ("video", "reason"),
    [
        (torch.zeros(1, 1, 8, 24, 23), "shape"),
        (torch.zeros(0, 1, 8, 24, 24), "shape"),
        (torch.zeros(1, 1, 8, 24, 24, dtype=torch.uint8), "integers"),
        (torch.full((1, 1, 8, 24, 24), torch.nan), "NaN"),
        (torch.full((1, 1, 8, 24, 24), 2.0), r"\[-1, 1\]"),
    ],
)
def test_bad_clips_are_refused(video: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_video(video)
    with pytest.raises(ValueError, match=reason):
        judge_clips(Classifier().eval(), video)


def test_the_command_that_measured_writes_what_the_card_reads(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(evaluate_main)
    out = tmp_path / "quality.json"
    result = CliRunner().invoke(app, ["--clips", "10", "--steps", "1", "--batch", "4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text("utf-8"))
    shipped = json.loads((WEIGHTS / RESULTS).read_text("utf-8"))["quality"]
    assert figures.keys() == shipped.keys()
    assert figures["rows"].keys() == shipped["rows"].keys()
    assert figures["rows"]["generated"]["clips"] == 10
