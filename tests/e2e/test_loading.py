"""From a full-precision checkpoint to a compiled quantised model that never held the full-precision weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ditc

diffusers = pytest.importorskip("diffusers")

PLAN = {"quantize": {"*": "int8", "mlp": "nvfp4"}, "lower": "eager", "fuse": False}


def wan(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4,
        "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 128, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    model: nn.Module = diffusers.WanTransformer3DModel(**settings | changes).eval()
    return model


def inputs() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 6, 32),
    }


def test_a_plan_is_loaded_layer_by_layer_and_runs_as_if_packed_live(tmp_path: Path) -> None:
    original = wan()
    original.save_pretrained(tmp_path)
    with ditc.parameters_on_meta():
        model = wan()
    report = ditc.load_and_quantize(model, tmp_path, PLAN)
    assert set(report.formats.values()) == {"int8", "nvfp4"}
    assert report.packed_bytes < 0.5 * sum(p.numel() * p.element_size() for p in original.parameters())
    with torch.no_grad():
        live = ditc.compile(original, PLAN)(**inputs()).sample
        torch._dynamo.reset()
        loaded = ditc.compile(model, PLAN)
        torch.testing.assert_close(loaded(**inputs()).sample, live, rtol=1e-5, atol=1e-5)
    assert ditc.stats(loaded).programs[0].untouched is None


def test_a_plan_without_candidates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ditc.PlanError, match="quantises nothing"):
        ditc.load_and_quantize(nn.Linear(4, 4), tmp_path, {"quantize": "int8"}, (torch.ones(1, 4),))
