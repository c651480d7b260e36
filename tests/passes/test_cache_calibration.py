"""What cache policies take from a calibration: the fits are those of the papers, and a plan finds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.passes.backend import unquantized
from ditc.passes.cache.calibrated import with_calibration
from ditc.passes.cache.options import CacheOptions
from ditc.passes.cache.policy import MagCache, Seen
from ditc.passes.errors import PlanError
from ditc.passes.plan import Plan

STEPS = 8


def latents(seed: int = 0) -> list[Tensor]:
    start, end = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return [start + (i / STEPS) ** 1.5 * end for i in range(STEPS)]


def trajectory(model: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad(), ditc.session():
        return [model(x, torch.full((len(x),), 900.0 - 100 * i)) for i, x in enumerate(inputs)]


def generations(model: Callable[..., Tensor]) -> None:
    for seed in range(2):
        for output in trajectory(model, latents(seed)):
            output.mul_(0)  # a sampler may work on the output in place


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[nn.Module], tuple[ditc.Calibration, Path]]:
    found: list[tuple[ditc.Calibration, Path]] = []

    def calibrate(model: nn.Module) -> tuple[ditc.Calibration, Path]:
        if not found:
            path = tmp_path_factory.mktemp("calibration") / "dit.safetensors"
            torch._dynamo.reset()
            calibration = ditc.calibrate(model, generations, formats=["int8"])
            calibration.save(path)
            found.append((calibration, path))
        return found[0]

    return calibrate


def by_hooks(model: nn.Module) -> tuple[list[float], list[float], list[list[float]]]:
    """Changes of the first block's input and of the output, and ratios of what the blocks add, step by step."""
    looked: dict[str, list[Tensor]] = {"read": [], "in": [], "out": []}
    blocks: Any = model.blocks
    handles = [
        blocks[0].to_q.register_forward_pre_hook(lambda _, args: looked["read"].append(args[0])),
        blocks[0].register_forward_pre_hook(lambda _, args: looked["in"].append(args[0])),
        blocks[-1].register_forward_hook(lambda *values: looked["out"].append(values[2])),
    ]
    x, y = [], []
    ratios: list[list[float]] = [[] for _ in range(STEPS - 1)]
    for seed in range(2):
        for values in looked.values():
            values.clear()
        outputs = trajectory(model, latents(seed))
        added = [b - a for a, b in zip(looked["in"], looked["out"], strict=True)]
        for t in range(1, STEPS):
            for found, values in ((x, looked["read"]), (y, outputs)):
                now, before = values[t], values[t - 1]
                found += [float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True)]
            ratios[t - 1].append(float((added[t].norm(dim=-1) / added[t - 1].norm(dim=-1)).mean()))
    for handle in handles:
        handle.remove()
    return x, y, ratios


def test_fits_are_those_of_the_papers(make_dit: Any, calibrated: Any) -> None:
    model = make_dit(depth=3)
    x, y, ratios = by_hooks(model)
    calibration, _ = calibrated(model)
    record = calibration.cache
    assert record is not None and record.pairs == len(x) == 2 * 2 * (STEPS - 1)
    expected = np.polyfit(x, y, 4)
    points = np.linspace(min(x), max(x), 9)
    np.testing.assert_allclose(np.polyval(record.polynomial, points), np.polyval(expected, points), rtol=1e-3)
    assert record.deviation == pytest.approx(np.sqrt(np.mean((np.polyval(expected, x) - y) ** 2)), rel=1e-2)
    assert record.ratios == pytest.approx([1.0, *(np.mean(found) for found in ratios)], rel=1e-4)
    assert "teacache polynomial" in str(calibration) and f"over {STEPS} steps" in str(calibration)


def test_a_plan_reads_them_where_it_names_none(make_dit: Any, calibrated: Any) -> None:
    model = make_dit(depth=3)
    calibration, path = calibrated(model)
    assert ditc.Calibration.load(path, model).cache == calibration.cache
    base = {"policy": "teacache", "threshold": 0.2}
    own = Plan(cache={**base, "polynomial": list(calibration.cache.polynomial)}, lower="eager")
    masks = []
    for plan in (own, Plan(cache=base, calibration=str(path), lower="eager")):
        torch._dynamo.reset()
        trajectory(ditc.compile(model, plan), latents(5))
        guard = ditc.stats(model).programs[-1].guard
        assert guard is not None
        masks.append([step.hits for step in guard.steps])
    assert masks[0] == masks[1] and 0 < sum(any(hits) for hits in masks[0]) < STEPS - 1
    options = with_calibration(CacheOptions.model_validate({"policy": "magcache"}), calibration)
    assert options.table == calibration.cache.ratios and len(options.ratios) == STEPS


def test_precise_steps_read_them_too() -> None:
    plan = Plan(cache={"policy": "magcache"}, calibration="a", quantize="int8", precise_first=1)
    assert unquantized(plan).calibration == "a"
    own = Plan(cache={"policy": "fixed"}, calibration="a", quantize="int8", precise_first=1)
    assert unquantized(own).calibration is None


def test_refusals(make_dit: Any, calibrated: Any) -> None:
    _, path = calibrated(make_dit(depth=3))
    with pytest.raises(PlanError, match=r"needs ratios.*calibration='file"):
        Plan(cache={"policy": "magcache"})
    with pytest.raises(PlanError, match="all blocks together"):
        Plan(cache={"policy": "magcache", "front": 1}, calibration=str(path))
    torch._dynamo.reset()
    short = ditc.calibrate(make_dit(depth=3), lambda m: trajectory(m, latents()[:1]), formats=["int8"])
    assert short.cache is None
    with pytest.raises(ditc.CalibrationError, match=r"no polynomial.*fewer than five"):
        with_calibration(CacheOptions(policy="teacache"), short)
    with pytest.raises(ditc.CalibrationError, match="no ratios"):
        with_calibration(CacheOptions(policy="magcache"), short)
    mine = CacheOptions(policy="teacache", polynomial=(1.0, 0.0))
    assert with_calibration(mine, short) is mine


@pytest.mark.parametrize(
    ("steps", "seen"), [(0, [1, 2, 3, 4, 4, 4]), (5, [1, 2, 3, 4]), (3, [2, 4]), (9, [0, 1, 2, 2])]
)
def test_ratios_of_another_number_of_steps_are_the_nearest(steps: int, seen: list[int]) -> None:
    table = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    controls = {"steps": torch.tensor(float(steps)), "threshold": torch.tensor(0.0)}
    state = {"ratio": torch.ones(1), "error": torch.zeros(1)}
    found = [
        MagCache().decide(Seen(True, torch.tensor([i])), state, controls, table)[2] for i in range(1, 1 + len(seen))
    ]
    assert [float(vectors["ratio"]) for vectors in found] == [float(table[i]) for i in seen]
