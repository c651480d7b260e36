"""Training: it learns, it resumes exactly, it refuses what does not fit."""

import json
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from typer.testing import CliRunner

from ditc.distill.records import append_record, drop_records_after
from ditc.examples.digits import train as train_module
from ditc.examples.digits.data import Digits, load_digits
from ditc.examples.digits.model import build_transformer, load_transformer
from ditc.examples.digits.train import export
from ditc.examples.digits.training import Precision, Recipe, Trainer

TINY = {"num_attention_heads": 1, "attention_head_dim": 32, "ffn_dim": 64, "num_layers": 1}


def tiny(steps: int = 8, precision: Precision = "fp32", seed: int = 0) -> Trainer:
    recipe = Recipe(steps=steps, batch=4, warmup=2, precision=precision, seed=seed)
    return Trainer(load_digits("teacher"), recipe, **TINY)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_few_steps_reduce_the_loss_on_clips_not_trained_on(precision: Precision) -> None:
    trainer = tiny(steps=40, precision=precision)
    with torch.no_grad():
        before = float(trainer.loss(10_000))
    for _ in range(40):
        trainer.train_step()
    with torch.no_grad():
        after = float(trainer.loss(10_000))
    assert after < 0.8 * before


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_was_killed_resumes_exactly(tmp_path: Path, precision: Precision) -> None:
    straight = tiny(precision=precision)
    whole = [straight.train_step() for _ in range(8)]

    killed = tiny(precision=precision)
    first = [killed.train_step() for _ in range(5)]
    killed.save(tmp_path / "checkpoint.pt")
    killed.train_step()  # lost with the kill
    del killed
    torch.manual_seed(1234)  # the resumed process has another global generator
    resumed = tiny(precision=precision)
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.step == 5
    second = [resumed.train_step() for _ in range(3)]

    assert first + second == whole
    assert same_weights(straight.model, resumed.model)
    assert same_weights(straight.ema, resumed.ema)


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    recipe = Recipe(steps=100, warmup=10, decay=0.2)
    pace = [recipe.pace_at(step) for step in range(100)]
    assert pace[0] == pytest.approx(0.1)
    assert pace[9:81] == [1.0] * 72
    assert pace[90] == pytest.approx(0.5)
    assert 0 < pace[99] <= 0.05
    # until the fall begins, a longer run takes the same steps
    assert [Recipe(steps=200, warmup=10, decay=0.2).pace_at(step) for step in range(81)] == pace[:81]


def test_the_average_follows_the_weights_and_starts_equal() -> None:
    trainer = tiny()
    assert same_weights(trainer.model, trainer.ema)
    trainer.train_step()
    assert not same_weights(trainer.model, trainer.ema)
    assert not any(parameter.requires_grad for parameter in trainer.ema.parameters())


def test_a_checkpoint_is_replaced_only_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    trainer = tiny()
    trainer.save(path)
    before = path.read_bytes()

    def fail(state: object, file: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError("disk full")

    trainer.train_step()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    trainer = tiny()
    for _ in range(3):
        trainer.train_step()
    trainer.save(path)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        tiny(seed=1).load(path)
    with pytest.raises(ValueError, match="num_layers"):
        Trainer(load_digits("teacher"), trainer.recipe, **TINY | {"num_layers": 2}).load(path)
    with pytest.raises(ValueError, match="beyond the 2"):
        tiny(steps=2).load(path)
    tiny(steps=20).load(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        tiny().load(path)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    trainer = tiny()
    with torch.no_grad():
        next(iter(trainer.model.parameters())).fill_(float("inf"))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.train_step()
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_digits_that_turn_bad_later_are_refused() -> None:
    images = torch.rand(20, 8, 8)
    trainer = Trainer(Digits(images, torch.arange(20) % 10, torch.arange(20)), Recipe(steps=2, batch=4), **TINY)
    images.fill_(torch.nan)
    with pytest.raises(ValueError, match="finite"):
        trainer.train_step()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"muon_learning_rate": 1.0},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
        {"ema": 1.0},
        {"class_dropout": -0.1},
        {"precision": "fp16"},
        {"seed": -1},
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Recipe(**wrong)  # type: ignore[arg-type]


def test_an_unknown_field_of_the_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        build_transformer(layers=3)


def test_the_command_trains_stops_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "Trainer", lambda digits, recipe, device: Trainer(digits, recipe, device, **TINY))
    app = train_module.typer.Typer()
    app.command()(train_module.train)
    common = ["--out", str(tmp_path), "--batch", "2", "--precision", "fp32", "--quality-every", "100"]

    class Interrupted(Trainer):
        def train_step(self):  # type: ignore[no-untyped-def]
            if self.step == 23:
                signal.raise_signal(signal.SIGINT)
            return super().train_step()

    monkeypatch.setattr(
        train_module, "Trainer", lambda digits, recipe, device: Interrupted(digits, recipe, device, **TINY)
    )
    stopped = CliRunner().invoke(app, [*common, "--steps", "40"])
    assert stopped.exit_code == 130, stopped.output
    assert "stopped at step 24" in stopped.output
    assert not (tmp_path / "weights").exists()
    assert not (tmp_path / "quality.jsonl").exists()

    monkeypatch.setattr(train_module, "Trainer", lambda digits, recipe, device: Trainer(digits, recipe, device, **TINY))
    finished = CliRunner().invoke(app, [*common, "--steps", "40"])
    assert finished.exit_code == 0, finished.output
    straight = Trainer(load_digits("teacher"), Recipe(steps=40, batch=2, precision="fp32"), **TINY)
    for _ in range(40):
        straight.train_step()
    shipped = load_transformer(tmp_path / "weights").state_dict()
    for name, value in straight.ema.state_dict().items():
        torch.testing.assert_close(shipped[name], value.half().float(), rtol=0, atol=0)
    steps = [line.split(",")[0] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert steps == ['{"step": 20', '{"step": 40']
    measured = json.loads((tmp_path / "quality.jsonl").read_text("utf-8"))
    assert measured["step"] == 40
    assert measured["clips"] == 40
    assert 0 <= measured["accuracy"] <= 0.6
    assert (tmp_path / "samples" / "000040.png").exists()


def test_records_of_lost_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    for step in (20, 40, 60):
        append_record(path, {"step": step, "loss": 1.0})
    drop_records_after(path, 40)
    assert path.read_text() == '{"step": 20, "loss": 1.0}\n{"step": 40, "loss": 1.0}\n'
    drop_records_after(tmp_path / "none.jsonl", 3)


def test_export_replaces_an_earlier_export(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = tiny(seed=seed).model
        export(model, tmp_path / "weights")
    shipped = load_transformer(tmp_path / "weights")
    name = "blocks.0.ffn.net.2.weight"
    assert torch.equal(shipped.state_dict()[name], model.state_dict()[name].half().float())
    assert sorted(file.name for file in (tmp_path / "weights").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_weights_that_are_not_there_are_reported(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_transformer(tmp_path)
