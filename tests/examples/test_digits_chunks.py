"""Chunks on the demo's clips, a digit that moves in front of a still background: what is computed follows the digit."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from PIL import Image

import ditc
from ditc.examples.digits.chunk_map import save_chunk_map
from ditc.examples.digits.evaluate import denoiser_of, draw_clips, find_subject
from ditc.examples.digits.model import load_transformer
from ditc.examples.digits.pictures import overlay_chunks, spread_chunks

STEPS = 8


def test_active_chunks_follow_the_digit() -> None:
    labels, seeds = torch.tensor([3, 7]), [1, 2]
    model = load_transformer()
    exact = draw_clips(denoiser_of(model), labels, seeds, steps=STEPS, guidance=1.0)
    chunks = {"box": [2, 1, 1], "warmup": 2, "reset": 0, "threshold": 0.22}
    compiled = torch.compile(model, backend="ditc", options={"lower": "eager", "chunks": chunks}, dynamic=False)
    video = draw_clips(denoiser_of(compiled), labels, seeds, steps=STEPS, guidance=1.0)
    assert 10 * torch.log10(4 / (video - exact).square().mean()) > 30
    stats = ditc.stats(compiled).programs[-1].chunks
    assert stats is not None
    sparse = [step for step in stats.steps if not step.dense]
    assert len(sparse) >= 2 and stats.computed_part < 0.95
    digit = find_subject(exact)[:, 0]
    for clip in range(2):
        active = torch.stack([spread_chunks(step.active[clip], digit.shape[1:]) for step in sparse])
        found = float((active & digit[clip]).sum() / active.sum())
        missed = float((~active & digit[clip]).sum() / (~active).sum())
        assert found > 1.5 * digit[clip].float().mean() > 3 * missed, (found, missed)


def test_the_demo_draws_a_map(tmp_path: Path) -> None:
    assert 0.3 < save_chunk_map(tmp_path / "chunks.png") < 0.95
    with Image.open(tmp_path / "chunks.png") as sheet:
        assert sheet.size[0] > 4 * 4 * 24 and sheet.size[1] > 2 * 4 * 24


def test_the_tint_lies_on_the_chunks() -> None:
    chunks = torch.zeros(2, 3, 3, dtype=torch.bool)
    chunks[1, 0, 2] = True
    wide = spread_chunks(chunks, (8, 24, 24))
    assert wide.shape == (8, 24, 24) and wide[4:, :8, 16:].all() and wide.sum() == 4 * 8 * 8
    grey = torch.zeros(1, 8, 24, 24)
    sheet = overlay_chunks(grey, {"a": chunks}, frames=(0, 4), scale=1)
    colours = sheet.getcolors(1 << 20)
    assert colours is not None and sum(n for n, (r, g, b) in colours if r > g + 40) == 8 * 8
    with pytest.raises(ValueError, match="must divide"):
        spread_chunks(torch.zeros(3, 3, 3, dtype=torch.bool), (8, 24, 24))
    with pytest.raises(ValueError, match="at least one map"):
        overlay_chunks(grey, {}, frames=(0,))
