"""The demo: its figures, its pictures, and how it fails."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("diffusers")

from PIL import Image
from torch import nn

from ditc.examples.digits import demo as demo_module
from ditc.examples.digits.data import CLIP_SHAPE
from ditc.examples.digits.demo import run_demo, save_pictures
from ditc.examples.digits.pictures import animate, contact_sheet, enlarge, save_animation
from ditc.examples.digits.report import as_table
from ditc.examples.digits.stages import Candidate, candidates


class Rounded(nn.Module):
    """A transformer whose velocities are rounded, as a compiler that loses precision would."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return ((self.model(*inputs, return_dict=return_dict)[0] * 8).round() / 8,)


EAGER = Candidate("eager", lambda model: model)
ROUNDED = Candidate("rounded", Rounded)


def app() -> typer.Typer:
    commands = typer.Typer()
    commands.command()(demo_module.demo)
    return commands


def test_candidates_are_compared_at_equal_seeds() -> None:
    result = run_demo(steps=2, clips_per_digit=1, entrants=(EAGER, Candidate("again", EAGER.prepare), ROUNDED))
    eager, again, rounded = result.rows
    assert (eager.psnr, eager.ssim, eager.speed_up) == (None, None, 1.0)
    assert torch.equal(result.videos["eager"], result.videos["again"])
    assert again.psnr == float("inf")
    assert again.ssim == pytest.approx(1)
    assert again.quality == eager.quality
    assert rounded.psnr is not None
    assert 5 < rounded.psnr < 60
    assert rounded.ssim is not None
    assert rounded.ssim < 1
    assert all(row.seconds_per_clip > 0 and row.quality.clips == 10 for row in result.rows)
    assert result.held_out.accuracy > 0.9
    assert "10 clips" in str(as_table(result, steps=2, guidance=2.0).caption)


def test_other_seeds_give_other_clips_and_batches_follow_on() -> None:
    both = run_demo(steps=1, clips_per_digit=2, seed=3, entrants=(EAGER,)).videos["eager"]
    second = run_demo(steps=1, clips_per_digit=1, seed=13, entrants=(EAGER,)).videos["eager"]
    assert both.shape == (20, *CLIP_SHAPE)
    assert torch.equal(both[10:], second)
    assert not torch.equal(both[:10], second)


def test_a_candidate_that_fails_ends_the_demo() -> None:
    def fail(model: nn.Module) -> Callable[..., Any]:
        raise RuntimeError("no compiler here")

    with pytest.raises(RuntimeError, match="no compiler here"):
        run_demo(steps=1, clips_per_digit=1, entrants=(EAGER, Candidate("broken", fail)))


def test_a_model_that_ditc_left_alone_is_not_shown_as_ditc() -> None:
    ditc = next(candidate for candidate in candidates() if "ditc" in candidate.name)
    assert ditc.check is not None
    with pytest.raises(RuntimeError, match="did not quantise"):
        ditc.check(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="compiled module"):
        ditc.check(lambda x: x)


def test_the_command_prints_json_and_writes_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "candidates", lambda: (EAGER, ROUNDED))
    arguments = ["--out", str(tmp_path / "new"), "--steps", "1", "--clips-per-digit", "1", "--json"]
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert [row["name"] for row in figures["candidates"]] == ["eager", "rounded"]
    for file in figures["files"]:
        with Image.open(file) as image:
            assert min(image.size) > 200
    with Image.open(tmp_path / "new" / "clips.gif") as animation:
        assert animation.n_frames == 14  # type: ignore[attr-defined]


def test_the_command_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "candidates", lambda: (EAGER, ROUNDED))
    result = CliRunner().invoke(app(), ["--out", str(tmp_path), "--steps", "1", "--clips-per-digit", "1"])
    assert result.exit_code == 0, result.output
    for word in ("eager", "rounded", "held-out data", "speed", "PSNR"):
        assert word in result.stdout


def test_an_interrupt_ends_the_command_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor, *_: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            Interrupting.calls += 1
            if Interrupting.calls == 3:
                raise KeyboardInterrupt
            return (x,)

    monkeypatch.setattr(demo_module, "candidates", lambda: (Candidate("slow", lambda model: Interrupting()),))
    result = CliRunner().invoke(app(), ["--out", str(tmp_path / "out"), "--steps", "5"])
    assert result.exit_code == 130
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--steps", "1001"],
        ["--clips-per-digit", "0"],
        ["--clips-per-digit", "101"],
        ["--seed", "-1"],
        ["--guidance", "-1"],
        ["--guidance", "nan"],
        ["--guidance", "21"],
    ],
)
def test_absurd_arguments_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(app(), arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    result = CliRunner().invoke(app(), ["--out", str(path)])
    assert result.exit_code == 2
    assert "folder" in result.output


def test_pictures_show_the_pixels_where_they_belong(tmp_path: Path) -> None:
    video = torch.full((2, *CLIP_SHAPE), -1.0)
    video[1, :, 2] = 1.0
    sheet = contact_sheet({"a": video, "b": -video}, ["zero", "one"], frames=[0, 2], scale=2)
    histogram = sheet.convert("L").histogram()
    # of the 8 tiles of 48x48, 3 and 3 are black or white in group a and b: (3 + 1) of each
    assert histogram[0] == 4 * 48 * 48
    assert histogram[255] == 4 * 48 * 48
    pictures = animate({"a": video}, ["zero", "one"], scale=2)
    assert [picture.convert("L").histogram()[255] for picture in pictures] == [0, 0, 48 * 48, 0, 0, 0, 0, 0]
    save_animation(pictures, tmp_path / "a.gif")
    assert enlarge(video, 2).unique().tolist() == [0, 255]


def test_pictures_of_nothing_are_refused() -> None:
    video = torch.zeros(2, *CLIP_SHAPE)
    with pytest.raises(ValueError, match="at least one group"):
        contact_sheet({}, ["0"], frames=[0])
    with pytest.raises(ValueError, match="'a' is"):
        contact_sheet({"a": video}, ["0"], frames=[0])
    with pytest.raises(ValueError, match="below 8"):
        contact_sheet({"a": video}, ["0", "1"], frames=[8])
    with pytest.raises(ValueError, match="at least 2"):
        save_animation([], Path("never.gif"))


@pytest.mark.slow
def test_the_candidates_agree(tmp_path: Path) -> None:
    """Of ditc's, the one with everything on top of the teacher, and a student, which walks a path of its own."""
    eager, inductor, *stages = candidates()
    teacher = [stage for stage in stages if stage.student is None]
    result = run_demo(steps=4, clips_per_digit=1, entrants=(eager, inductor, teacher[-1], *stages[len(teacher) :][:1]))
    _, compiled, stacked, *students = result.rows
    assert compiled.psnr is not None and compiled.psnr > 60
    assert stacked.psnr is not None and 15 < stacked.psnr < compiled.psnr
    assert stacked.weight_bytes < compiled.weight_bytes and stacked.state_bytes > 0
    assert result.guards.keys() == {stacked.name}
    for student in students:
        assert student.psnr is None and student.calls < 8 and student.quality.accuracy > 0.7
    save_pictures(result, tmp_path)
