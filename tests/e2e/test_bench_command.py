"""`ditc bench`: a model of diffusers timed three ways, and what a guard decided."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from ditc.cli import app

pytest.importorskip("diffusers")
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 64, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "wan.json"
    path.write_text(json.dumps(WAN), "utf-8")
    return path


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["bench", "WanTransformer3DModel", *map(str, arguments)])


def test_three_ways_and_the_decisions_of_a_guard(config: Path, tmp_path: Path) -> None:
    picture = tmp_path / "decisions.png"
    cache = '{policy = "first-block", threshold = 100.0}'
    plan = ["--set", f"cache={cache}", "--set", "lower=eager", "--bound", "10"]
    result = run("--config", config, *plan, "--rounds", 2, "--steps", 6, "--decisions", picture, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [entry["name"] for entry in found["results"]] == ["eager", "inductor", "ditc"]
    assert all(entry["seconds"]["median"] > 0 for entry in found["results"]), found
    assert found["results"][1]["error"] < 1e-3 < found["results"][2]["error"], "reuse shows in the error"
    hits = [step["hits"][0] for step in found["guard"]["steps"]]
    assert hits == [False, True, True, True, True, True]
    with Image.open(picture) as image:
        assert min(image.size) > 200


def test_a_wrong_result_gets_no_number(config: Path) -> None:
    result = run("--config", config, "--set", "quantize=mxfp4", "--set", "lower=eager", "--bound", "0", "--rounds", 1)
    assert result.exit_code == 0, result.output
    assert "no number: wrong" in " ".join(result.stdout.split())


def test_a_picture_of_nothing_is_refused(config: Path, tmp_path: Path) -> None:
    result = run("--config", config, "--decisions", tmp_path / "x.png")
    assert result.exit_code == 2 and "without a cache" in result.output
