"""What is kept of the exits in few bits: how many bytes that is, and how near it stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.kernels.formats import sqnr
from ditc.passes.cache.storage import Storage

STEPS = 6
FORMATS = {"int8": (1 + 4 / 32, 35.0), "fp8": (1 + 4 / 32, 25.0), "nvfp4": (0.5 + 1 / 16 + 4 / 32, 15.0)}
"""Bytes a value of rows of 32, and the least SQNR in dB of a replay."""


def latents(batch: int = 1) -> list[Tensor]:
    start, end = torch.randn(2, batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    speed = torch.linspace(0.3, 3.0, batch).reshape(-1, 1, 1, 1)
    return [start + speed * i / STEPS * end for i in range(STEPS)]


def draw(model: nn.Module, cache: Mapping[str, Any], inputs: list[Tensor], **plan: Any) -> tuple[list[Tensor], Any]:
    torch._dynamo.reset()
    options = {"cache": dict(cache), "lower": "eager", "fuse": False, **plan}
    guarded = torch.compile(model, backend="ditc", options=options, fullgraph=True)
    with torch.no_grad(), ditc.session(steps=STEPS) as session:
        outputs = [guarded(x, torch.full((len(x),), 900.0 - 70 * i)) for i, x in enumerate(inputs)]
    program = ditc.stats(model).programs[-1]
    assert program.guard is not None
    assert session.bytes() == program.state_bytes_per_branch
    return outputs, program


@pytest.fixture
def model(make_dit: Callable[..., nn.Module]) -> nn.Module:
    return make_dit(depth=3, width=32)


def test_replays_stay_near_and_bytes_are_few(model: nn.Module) -> None:
    cache = {"policy": "first-block", "threshold": 0.45, "order": 1}
    native, before = draw(model, cache, latents(2))
    for format, (per_value, least) in FORMATS.items():
        found, program = draw(model, cache | {"storage": format}, latents(2))
        hits = [step.hits for step in program.guard.steps]
        assert hits == [step.hits for step in before.guard.steps], "what decides is not quantised"
        assert {hit for step in hits for hit in step} == {False, True}
        for i, step in enumerate(hits):
            for k, hit in enumerate(step):
                assert sqnr(native[i][k], found[i][k]) > (least if hit else 90)
        values = 2 * 16 * 32 * 2  # samples, tokens, features, orders
        assert before.state_bytes_per_branch - program.state_bytes_per_branch == values * (4 - per_value)
        details = " ".join(detail for report in program.passes for detail in report.details)
        assert f"{int(values * per_value)} bytes kept in {format} instead of {4 * values}" in details


def test_the_whole_model_is_stored_in_rows_of_enough_values(model: nn.Module) -> None:
    cache = {"policy": "easycache", "threshold": 1e9, "storage": "int8"}
    outputs, program = draw(model, cache, latents())
    native, _ = draw(model, {**cache, "storage": "native"}, latents())
    assert min(sqnr(a, b) for a, b in zip(native, outputs, strict=True)) > 35
    details = " ".join(detail for report in program.passes for detail in report.details)
    assert f"{4 * 64 + 4 * 4} bytes kept in int8 instead of {4 * 4 * 64}" in details


def test_rows_that_do_not_fit_are_kept_as_they_are(make_dit: Callable[..., nn.Module]) -> None:
    _, program = draw(make_dit(depth=3, width=40), {"policy": "fixed", "storage": "nvfp4"}, latents()[:2])
    (skip,) = next(report.skipped for report in program.passes if report.name == "guard")
    assert "multiple of 16 values, got K = 40" in skip.reason
    assert program.state_bytes_per_branch > 4 * 16 * 40


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("joined", [1, 2])
def test_parts_are_as_they_are_declared(format: str, joined: int) -> None:
    shape = (3, 4, 16)
    storage = Storage(format, shape, torch.bfloat16, joined)
    values = [torch.randn(shape, dtype=torch.bfloat16) for _ in range(2)]
    parts = storage.write(values)
    assert [(tuple(part.shape), part.dtype) for part in parts] == 2 * list(storage.parts)
    for value, again in zip(values, storage.read(parts), strict=True):
        assert again.shape == value.shape and again.dtype == value.dtype
        assert sqnr(value.float(), again.float()) > 15
    assert sum(math.prod(shape) * dtype.itemsize for shape, dtype in storage.parts) < 2 * 3 * 4 * 16


def test_inductor_agrees(model: nn.Module) -> None:
    cache = {"policy": "fixed", "storage": "fp8"}
    eager, _ = draw(model, cache, latents()[:3])
    compiled, _ = draw(model, cache, latents()[:3], lower="inductor")
    assert min(sqnr(a, b) for a, b in zip(eager, compiled, strict=True)) > 40
