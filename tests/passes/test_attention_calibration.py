"""Errors of attention on a model's own operands: measured, kept in a file, and used."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ditc
from ditc.kernels.attention import RECIPES
from ditc.kernels.formats import FORMATS, format_of
from ditc.passes.attention.observe import errors_of, recipes_of
from ditc.passes.attention.recognise import RecogniseAttention
from ditc.passes.attention.use import UseAttention
from ditc.passes.capture import capture_export
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan
from ditc.passes.quantize.calibration import HEADER, SCHEMA, AttentionRecord
from ditc.passes.quantize.tables import DeviceKind

ALL = ("int8", *RECIPES)


def decibels(energy: tuple[Tensor, Tensor]) -> float:
    return 10 * math.log10(float(energy[0]) / float(energy[1]))


def operands(H: int = 4, G: int = 4, Lq: int = 200, Lk: int = 150, D: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (3, H, Lq, D), (3, G, Lk, D), (3, G, Lk, D)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("causal", [False, True])
def test_errors_are_those_of_the_recipes(causal: bool) -> None:
    q, k, v = operands(Lk=200 if causal else 150)
    found = errors_of((q, k, v, None, 0.0, causal), None, ALL)
    sqnr = {name: decibels(energy) for name, energy in found.items()}
    for recipe in RECIPES.values():
        assert abs(sqnr[recipe.name] - recipe.sqnr) < 6
    assert sqnr["int8_fp16"] > sqnr["int8"] > sqnr["fp8"] > sqnr["nvfp4"]


def test_shared_heads_masks_and_missing_heads() -> None:
    q, k, v = operands(H=4, G=2)
    mask = torch.arange(150) < 90
    grouped = errors_of((q, k, v, mask, 0.0, False), 0.125, ("fp8",))
    repeated = errors_of(
        (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask.expand(3, 4, 200, 150), 0.0, False),
        0.125, ("fp8",),
    )  # fmt: skip
    assert grouped == repeated
    # what is hidden has no part in the signal
    exact = F.scaled_dot_product_attention(q[::2, ::2], *(x[::2, :, :90] for x in (k, v)), scale=0.125)
    assert float(grouped["fp8"][0]) == pytest.approx(float(exact.double().square().sum()), rel=1e-4)
    flat = errors_of((q[:, 0], k[:, 0], v[:, 0], mask.expand(3, 200, 150), 0.0, False), None, ("fp8",))
    assert decibels(flat["fp8"]) > 15


def test_a_sample_bounds_time_and_memory() -> None:
    q, k, v = operands(H=16, G=16, Lq=1000, Lk=64, D=8)
    (signal, _) = errors_of((q, k, v, None, 0.0, False), None, ("fp8",))["fp8"]
    whole = F.scaled_dot_product_attention(q, k, v).double().square().sum()
    assert 0 < float(signal) < 0.1 * float(whole)


def test_recipes_by_format() -> None:
    assert recipes_of(tuple(FORMATS.values())) == ALL
    assert recipes_of((format_of("int8"),)) == ("int8", "int8_fp16")
    assert recipes_of((format_of("nvfp4"),)) == ("nvfp4",)
    assert recipes_of(()) == ()


def calibrate(make_dit: Any, dit_inputs: Any, steps: int = 4) -> Any:
    model = make_dit(width=32)

    def run(module: Any) -> None:
        with ditc.session():
            for step in range(steps):
                module(*dit_inputs(time=900.0 - 100 * step))

    return model, ditc.calibrate(model, run)


def test_a_calibration_holds_attentions(make_dit: Any, dit_inputs: Any, tmp_path: Path) -> None:
    model, found = calibrate(make_dit, dit_inputs)
    assert set(found.attentions) == {"blocks.0", "blocks.1"}
    record = found.attentions["blocks.0"]
    assert record.kind == "self" and record.steps == (0, 1, 2), "step 3 is not sampled"
    assert set(record.sqnr) == set(ALL) and all(len(steps) == 3 for steps in record.sqnr.values())
    assert found.attention_sqnr("blocks.0", "fp8") == min(record.sqnr["fp8"])
    assert found.attention_sqnr("blocks.7", "fp8") is None and found.attention_sqnr("blocks.0", "fp9") is None
    path = tmp_path / "c.safetensors"
    found.save(path)
    again = ditc.Calibration.load(path, model)
    assert again.attentions == found.attentions
    assert "2 attentions" in str(again) and "nvfp4 dB" in str(again)


def test_files_of_before_are_refused(make_dit: Any, dit_inputs: Any, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    _, found = calibrate(make_dit, dit_inputs, steps=1)
    path = tmp_path / "c.safetensors"
    found.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()[HEADER].replace(f'"schema_number":{SCHEMA}', f'"schema_number":{SCHEMA - 1}')
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {HEADER: header})
    with pytest.raises(ditc.CalibrationError, match=f"layout {SCHEMA - 1}, this ditc reads {SCHEMA}: calibrate again"):
        ditc.Calibration.load(path)


def test_attention_by_hand_is_measured_too(zoo: Any) -> None:
    model, args, kwargs = zoo["explicit_dit"]()
    found = ditc.calibrate(model, lambda module: module(*args, **kwargs), formats=["nvfp4"])
    assert len(found.attentions) == 3 and all(set(r.sqnr) == {"nvfp4"} for r in found.attentions.values())


def test_linear_attention_is_not_measured(zoo: Any) -> None:
    model, args, kwargs = zoo["sana"]()
    found = ditc.calibrate(model, lambda module: module(*args, **kwargs), formats=["nvfp4"])
    assert {record.kind for record in found.attentions.values()} == {"cross"}


def test_a_model_that_diverged_is_refused(make_dit: Any, dit_inputs: Any) -> None:
    latent, timestep = dit_inputs()
    model = make_dit()

    def run(module: Any) -> None:
        module(latent * math.inf, timestep)

    with pytest.raises(ditc.CalibrationError, match="NaN or infinity"):
        ditc.calibrate(model, run)


def test_the_pass_uses_what_was_measured(make_dit: Any, dit_inputs: Any, tmp_path: Path) -> None:
    model, found = calibrate(make_dit, dit_inputs)
    path = tmp_path / "c.safetensors"
    found.save(path)
    plan = Plan(attention="nvfp4", calibration=str(path))
    report = next(r for r in rewrite(capture_export(model, dit_inputs()), plan).reports if r.name == UseAttention.name)
    measured = [row["sqnr"] for row in report.decisions]
    assert measured == [found.attention_sqnr(row["site"], "nvfp4") for row in report.decisions]
    assert measured != [RECIPES["nvfp4"].sqnr] * 2


def test_auto_keeps_the_budget_by_what_was_measured(make_dit: Any, dit_inputs: Any, tmp_path: Path) -> None:
    _, found = calibrate(make_dit, dit_inputs, steps=1)
    bad = {"fp8": (3.0,), "int8_fp8": (4.0,), "int8_fp16": (5.0,), "nvfp4": (2.0,)}
    records = {"blocks.0": AttentionRecord(name="blocks.0", kind="self", steps=(0,), sqnr=bad)}
    h100 = DeviceKind("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
    pass_ = UseAttention(calibration=replace(found, attentions=records), kind=h100)
    model = make_dit(width=256, heads=2).to("meta")
    inputs = tuple(x.to("meta") for x in dit_inputs(batch=1, size=256))
    done = rewrite(capture_export(model, inputs, check=False), Plan(attention="auto"), (RecogniseAttention(), pass_))
    first, second = done.reports[2].decisions
    assert first["recipe"] == "native" and "4.0 dB, less than 20" in first["reason"]
    assert second["recipe"] != "native" and second["gain"] > 1.1
