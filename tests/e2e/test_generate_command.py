"""`ditc generate`: files from a pipeline's folder and from the demo's transformers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import ditc
from ditc.cli import app
from ditc.runtime.samplers import Sampler

diffusers = pytest.importorskip("diffusers")
EAGER = ["--set", "lower=eager"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DiTPipeline of tiny random weights."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=4, num_embeds_ada_norm=10, norm_type="ada_norm_zero", attention_bias=True,
        activation_fn="gelu-approximate", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("pipeline")
    diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler()).save_pretrained(folder)
    return folder


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_a_pipeline_draws_a_picture_for_each_seed(pipeline: Path, tmp_path: Path) -> None:
    labels = ["--label", 3, "--seed", 7, "--seed", 8, "--steps", 2, "--guidance", 1]
    result = run(pipeline, *labels, "--out", tmp_path / "a", "--json", *EAGER)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [Path(file).name for file in told["files"]] == ["7.png", "8.png"] and told["plan"]["lower"] == "eager"
    again = run(pipeline, "--label", 3, "--seed", 8, *labels[6:], "--out", tmp_path / "b", *EAGER)
    assert again.exit_code == 0, again.output
    with Image.open(tmp_path / "a" / "8.png") as both, Image.open(tmp_path / "b" / "8.png") as alone:
        assert both.size == (8, 8) and both.tobytes() == alone.tobytes(), "a picture is its seed's"


def test_the_demo_draws_clips(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from ditc.examples.digits.model import WEIGHTS

    result = run(WEIGHTS, "--label", 4, "--steps", 1, "--out", tmp_path, *EAGER)
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "0.gif") as clip:
        assert clip.n_frames == 8  # type: ignore[attr-defined]
    manifest = tmp_path / "sampler.json"
    manifest.write_text(student().to_json(), "utf-8")
    refused = run(WEIGHTS, "--label", 4, "--steps", 9, "--sampler", manifest, "--out", tmp_path, *EAGER)
    assert isinstance(refused.exception, ditc.SamplerError) and "2 steps, not 9" in str(refused.exception)
    guided = run(WEIGHTS, "--label", 4, "--guidance", 3, "--sampler", manifest, "--out", tmp_path, *EAGER)
    assert isinstance(guided.exception, ditc.SamplerError) and "distilled into it" in str(guided.exception)


def student() -> Sampler:
    return Sampler(
        role="student", kind="euler", process="flow", solver="ode", prediction="velocity", steps=2,
        sigmas=(1.0, 0.5, 0.0), warped=True, timestep_scale=1000.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either --prompt, or --label"),
        (["--label", 1, "--label", 2, "--seed", 1], "one for each seed"),
        (["--prompt", "a cat"], "takes no prompt: use --label"),
        (["--label", 1, "--with", "hight=8"], "takes no hight"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipeline: Path, tmp_path: Path, arguments: list[Any], said: str) -> None:
    result = run(pipeline, *arguments, "--out", tmp_path / "none", *EAGER)
    assert isinstance(result.exception, ditc.DitcError) and said in str(result.exception)
    assert not (tmp_path / "none").exists()


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, "--label", 1)
    assert isinstance(result.exception, ditc.DitcError) and "model_index.json" in str(result.exception)
