"""What a training ends with: weights that diffusers and ditc read, the manifest, the figures."""

import json
from pathlib import Path

import pytest
import torch

import ditc
from ditc.distill.artifact import FIGURES, write_student
from ditc.distill.errors import DistillError
from ditc.distill.loop import run_training
from ditc.distill.methods.dmd2 import DMD2
from ditc.distill.parallel import World
from ditc.distill.run import Run
from ditc.distill.subject import Draw, Subject
from ditc.distill.training import Training
from ditc.distill.weights import read_weights
from ditc.kernels.errors import CheckpointError
from ditc.runtime.samplers import SamplerError
from ditc.runtime.students import MANIFEST, load_student

from .toys import SHAPE, Tiny, tiny_subject

ALONE = World(torch.device("cpu"))


def finished(tmp_path: Path, updates: int = 3) -> tuple[Training, Path]:
    run = Run(updates=updates, batch=4, precision="fp32", learning_rate=1e-2, log_every=1)
    training = Training(tiny_subject(), DMD2(steps=2), run, ALONE)
    run_training(training, tmp_path)
    return training, write_student(training, tmp_path, ["ditc", "distill"])


def test_a_student_is_read_with_its_manifest_and_sampled_by_it(tmp_path: Path) -> None:
    training, folder = finished(tmp_path)
    student = load_student(folder, Tiny())
    assert student.sampler == training.method.sampler(training.subject)
    for name, value in training.modules["average"].state_dict().items():
        assert torch.equal(student.module.state_dict()[name], value.half().float())
    made = ditc.generate(student, torch.eye(2), seeds=[0, 1], shape=SHAPE)
    assert made.shape == (2, *SHAPE)
    with pytest.raises(SamplerError, match="2 steps, not 4"):
        ditc.generate(student, torch.eye(2), seeds=[0, 1], shape=SHAPE, steps=4)
    doubled = student.compiled(lambda module: torch.nn.Sequential())
    assert doubled.sampler == student.sampler


def test_the_figures_say_what_was_done(tmp_path: Path) -> None:
    _, folder = finished(tmp_path)
    told = json.loads((folder / FIGURES).read_text())
    assert (told["command"], told["updates"], told["options"]["method"]) == ("ditc distill", 3, "dmd2")
    assert told["quality"]["rows"] == 2
    assert told["training_seconds"] > 0


def test_a_student_can_begin_from_another(tmp_path: Path) -> None:
    _, folder = finished(tmp_path)
    initial = read_weights(folder, Tiny())
    begun = Training(tiny_subject(), DMD2(steps=1), Run(batch=4), ALONE, initial)
    for module in (begun.modules["student"], begun.modules["average"]):
        assert all(torch.equal(value, initial[name]) for name, value in module.state_dict().items())
    with pytest.raises(DistillError, match="another architecture"):
        read_weights(folder, torch.nn.Linear(2, 2))


def test_folders_that_hold_no_student_are_refused(tmp_path: Path) -> None:
    _, folder = finished(tmp_path)
    with pytest.raises(CheckpointError, match="another architecture"):
        load_student(folder, torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="pass model"):
        load_student(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(SamplerError, match=MANIFEST):
        load_student(folder, Tiny())


def test_weights_beyond_fp16_are_not_written(tmp_path: Path) -> None:
    training, _ = finished(tmp_path)
    with torch.no_grad():
        next(training.modules["average"].parameters()).fill_(1e6)
    with pytest.raises(DistillError, match="fp16"):
        write_student(training, tmp_path)


def test_diffusers_reads_a_student_of_its_own_class(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    teacher = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=1, attention_head_dim=12, in_channels=1, out_channels=1, text_dim=4,
        freq_dim=8, ffn_dim=8, num_layers=1, rope_max_seq_len=8,
    )  # fmt: skip
    shape = (1, 1, 4, 4)

    def draw(count: int, generator: torch.Generator) -> Draw:
        condition = torch.randn(count, 2, 4, generator=generator)
        return Draw(condition, torch.zeros_like(condition))

    subject = Subject("wan", teacher, lambda net, x, t, c: net(x, t, c, return_dict=False)[0], shape, draw)
    training = Training(subject, DMD2(steps=2), Run(updates=1, batch=2, precision="fp32"), ALONE)
    run_training(training, tmp_path)
    folder = write_student(training, tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
    ours = load_student(folder)
    condition = torch.ones(1, 2, 4)
    assert ditc.generate(ours, condition, seeds=[3], shape=shape).shape == (1, *shape)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], value)
