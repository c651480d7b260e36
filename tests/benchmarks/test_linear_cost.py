"""The suite linear-cost: its table is one that the cost model reads, and wrong results have no point in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import linear_cost
from benchmarks.__main__ import app
from benchmarks.linear_cost import CPU_SERIES, Functions, Shape, measure_shape, series_for, shapes, table_of
from ditc.bench.harness import Result, Spread
from ditc.passes.quantize.cost import DeviceKind, estimate, load_table

CPU = torch.device("cpu")
DOCUMENT: dict[str, Any] = {
    "hardware": {"cpu": "Test (R) CPU", "cores": 2, "threads": 1},
    "versions": {"torch": "2.x"},
    "date": "2026-01-01",
}


def result(name: str, seconds: float | None) -> Result:
    return Result(name, seconds=None if seconds is None else Spread.of([seconds]), refused=None if seconds else "wrong")


def test_the_grid_spans_what_transformers_have() -> None:
    grid = shapes(quick=False)
    assert {shape.M for shape in grid} >= {1, 4, 4096}
    assert {shape.N for shape in grid} | {shape.K for shape in grid} == {256, 1152, 4608}
    assert set(shapes(quick=True)) < set(grid)
    assert len(grid) == len(set(grid))


def test_a_table_holds_the_medians_and_the_best_rates() -> None:
    small, large = Shape(1, 256, 256), Shape(1024, 1152, 1152)
    measured = [
        (small, [result("fp32", 1e-5), result("bf16", 2e-5), result("int8 over fp32", 1e-5)]),
        (large, [result("fp32", 2e-2), result("bf16", 1e-2), result("int8 over fp32", 5e-3)]),
    ]
    table = table_of(DOCUMENT, measured)
    assert len(table.points) == 6
    assert table.launch == 1e-5
    assert table.rates["float32"] == pytest.approx(2 * 1024 * 1152 * 1152 / 2e-2, rel=1e-3)
    assert table.rates["int8"] == pytest.approx(2 * 1024 * 1152 * 1152 / 5e-3, rel=1e-3)
    assert table.bandwidth == pytest.approx(256 * 256 * 4 / 1e-5, rel=1e-3)
    assert table.source.kind == "measured" and "1 threads" in table.source.text and "2.x" in table.source.text
    kind = DeviceKind("cpu", "Test (R) CPU")
    found = estimate(1024, 1152, 1152, kind, "int8", "dynamic", torch.float32, table=table)
    assert found.gain == pytest.approx(4)
    assert "taken for" not in found.source


def test_a_wrong_result_has_no_point() -> None:
    measured = [(Shape(4, 256, 256), [result("fp32", 1e-5), result("int8 over fp32", None)])]
    assert [point.format for point in table_of(DOCUMENT, measured).points] == ["none"]
    with pytest.raises(ValueError, match="no plain linear"):
        table_of(DOCUMENT, [(Shape(4, 256, 256), [result("fp32", None)])])


def test_a_gpu_keeps_the_published_rates_of_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    properties = SimpleNamespace(name="NVIDIA B200", major=10, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    document = DOCUMENT | {"hardware": {"cpu": "x", "cores": 1, "threads": 1, "gpu": "NVIDIA B200"}}
    table = table_of(document, [(Shape(4096, 4096, 4096), [result("bf16", 1e-4), result("int8 over bf16", 5e-5)])])
    assert table.device == "cuda" and table.capability == (10, 0)
    assert table.rates["bfloat16"] == pytest.approx(2 * 4096**3 / 1e-4, rel=1e-3)
    assert table.rates["nvfp4"] > table.rates["fp8"] > 0


def test_every_series_computes_a_linear() -> None:
    torch._dynamo.reset()
    results, calls = measure_shape(Shape(64, 48, 64), CPU, Functions(CPU), rounds=1, clock="wall")
    assert calls >= 1
    assert [r.name for r in results] == [series.name for series in CPU_SERIES]
    assert all(r.refused is None and r.seconds is not None and r.seconds.median > 0 for r in results)
    errors = {r.name: r.error for r in results}
    assert errors["fp32"] == pytest.approx(0, abs=1e-5)
    assert 1e-4 < (errors["int8 weight-only over fp32"] or 0) < (errors["int8 over fp32"] or 0) < 0.05


def test_a_series_sits_out_shapes_that_tell_nothing_new() -> None:
    torch._dynamo.reset()
    results, _ = measure_shape(Shape(2, 48, 64), CPU, Functions(CPU), rounds=1, clock="wall")
    assert [r.name for r in results] == ["fp32", "bf16", "int8 over fp32"]


def test_the_command_writes_and_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(linear_cost, "shapes", lambda quick: [Shape(4, 48, 64)])
    monkeypatch.setattr(linear_cost, "TABLES", tmp_path)
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(linear_cost, "write", lambda suite, document, text: written.append(document) or [text])
    done = CliRunner().invoke(app, ["linear-cost", "--quick", "--rounds", "1", "--device", "cpu", "--install-table"])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.iterdir()
    table = load_table(path)
    assert len(table.points) == 4
    (document,) = written
    assert json.loads(json.dumps(document["table"])) == json.loads(path.read_text())
    assert "4 x 48 x 64" in done.output


def test_a_gpu_compares_what_it_has_units_for() -> None:
    formats = [series.format for series in series_for(torch.device("cuda"))]
    assert formats[0] == "none" and {"int8", "fp8"} <= set(formats)
