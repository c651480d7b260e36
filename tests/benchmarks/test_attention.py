"""The suites attention and attention-cost: references are exact, wrong results have no point, tables are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from benchmarks import attention_cost
from benchmarks.__main__ import app
from benchmarks.attention import (
    CUDA_TOKENS,
    Entrant,
    Measured,
    Task,
    ceiling,
    detail,
    entrants,
    exact,
    measure_task,
    operands,
    summary,
    tasks,
)
from benchmarks.attention_cost import grid, points
from ditc.bench.harness import Result, Spread
from ditc.kernels.attention import RECIPES, attention_reason
from ditc.passes.quantize.tables import TABLES, AttentionSection, load_table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REASON = attention_reason()


def result(name: str, seconds: list[float] | None) -> Result:
    spread = None if seconds is None else Spread.of(seconds)
    return Result(name, error=0.01, seconds=spread, samples=seconds or [], refused=None if seconds else "wrong")


def measured(task: Task, seconds: dict[str, list[float] | None]) -> Measured:
    field = [e for e in entrants(CPU, task.kind) if e.name in seconds]
    return Measured(task, 1.0, tuple(field), tuple(result(e.name, seconds[e.name]) for e in field))


SMALL = Task(256, 256, 16, 72)
DONE = measured(
    SMALL,
    {
        "SDPA fp32": [4e-3, 4e-3],
        "SDPA fp32, oneDNN": [3e-3, 6e-3],
        "SDPA bf16": [2e-3, 4e-3],
        "ditc int8 over fp32": [1e-3, 1e-3],
        "ditc int8 over bf16": None,
    },
)


@pytest.mark.parametrize("kind", ["dense", "padded", "sparse"])
def test_the_reference_is_attention(kind: Any) -> None:
    (q, k, v), mask = operands(Task(130, 130, 2, 24, kind), CPU)
    wanted = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)), mask)
    assert torch.allclose(exact(q, k, v, mask), wanted.transpose(1, 2).flatten(2), atol=1e-12)
    assert (mask is None) == (kind != "padded")


def test_grids() -> None:
    assert {(t.queries, t.D, t.kind) for t in tasks(CPU, [], [])} >= {(256, 72, "dense"), (4096, 128, "sparse")}
    assert all(1024 < t.H * t.D < 1200 for t in tasks(CPU, [], []))
    assert {t.queries for t in tasks(CUDA, [], [])} == set(CUDA_TOKENS)
    assert {t.queries for t in tasks(CPU, [64], [40])} == {64}
    assert set(grid(CPU, quick=True)) < set(grid(CPU, quick=False))
    assert any(t.queries != t.keys for t in grid(CPU, quick=False))
    assert {e.recipe for e in entrants(CUDA, "dense")} == {"native", *RECIPES}


def test_gain_is_of_the_best_against_the_best() -> None:
    assert DONE.best(native=True) == "SDPA bf16" and DONE.best(native=False) == "ditc int8 over fp32"
    gain = DONE.gain()
    assert gain is not None and (gain.low, gain.median, gain.high) == (2.5, 3.0, 3.5)
    assert summary([DONE])[1][0][3].startswith("3.00")
    lines = {line[0]: line for line in detail(DONE, None)[1]}
    assert "no number" in lines["ditc int8 over bf16"][1]
    assert lines["ditc int8 over fp32"][-2] == f"{SMALL.flops / 1e-3 / 1e12:.3g}"
    nothing = measured(SMALL, {"SDPA fp32": [1.0], "ditc int8 over fp32": None})
    assert nothing.gain() is None and "no number" in summary([nothing])[1][0][2]


def test_ceilings_are_of_both_products() -> None:
    assert ceiling("NVIDIA H100 80GB HBM3", ("bf16", "bf16")) == pytest.approx(989.4e12)
    assert ceiling("NVIDIA H100 80GB HBM3", ("int8", "fp16")) == pytest.approx(1319.2e12, rel=1e-3)
    assert ceiling("NVIDIA H200", ("nvfp4", "nvfp4")) == pytest.approx(989.4e12)
    assert ceiling("NVIDIA B200", ("nvfp4", "nvfp4")) == pytest.approx(9000e12)
    assert ceiling("NVIDIA H100 PCIe", ("bf16", "bf16")) is None and ceiling(None, ("bf16", "bf16")) is None


def test_points_are_the_fastest_of_a_kind() -> None:
    found = {(p.recipe, p.dtype): p for p in points([DONE])}
    assert set(found) == {("native", "float32"), ("native", "bfloat16"), ("int8", "float32")}
    assert found["native", "float32"].seconds == 4e-3
    point = found["int8", "float32"]
    assert (point.B, point.H, point.Lq, point.Lk, point.D, point.seconds) == (1, 16, 256, 256, 72, 1e-3)
    AttentionSection(points=tuple(found.values()))


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_runs_and_installs_a_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-cpu.json"
    shipped = next(path for path in sorted(TABLES.glob("*.json")) if load_table(path).device == "cpu")
    (tmp_path / name).write_bytes(shipped.read_bytes())
    monkeypatch.setattr(attention_cost, "TABLES", tmp_path)
    monkeypatch.setattr(attention_cost, "hardware_slug", lambda _: "a-cpu")
    monkeypatch.setattr(attention_cost, "grid", lambda *_, **__: [Task(64, 48, 2, 16)])
    call = CliRunner().invoke(
        app, ["attention-cost", "--device", "cpu", "--rounds", "2", "--no-save", "--install-table"]
    )
    assert call.exit_code == 0, call.output
    table = load_table(tmp_path / name)
    assert {(p.recipe, p.dtype) for p in table.attention.points} >= {("native", "float32"), ("int8", "bfloat16")}
    assert all((p.Lq, p.Lk) == (64, 48) for p in table.attention.points)
    assert table.points == load_table(shipped).points


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_runs_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.report.ROOT", tmp_path)
    arguments = ["attention", "--device", "cpu", "--rounds", "2", "--tokens", "256", "--features", "64"]
    call = CliRunner().invoke(app, arguments)
    assert call.exit_code == 0, call.output
    document = json.loads(next(tmp_path.rglob("attention-*.json")).read_text())
    assert [task["kind"] for task in document["tasks"]] == ["dense", "padded", "sparse"]
    assert document["tasks"][2]["kept"] == pytest.approx(0.25)
    refused = [r["refused"] for task in document["tasks"] for r in task["results"] if "oneDNN" not in r["name"]]
    assert refused == [None] * len(refused)
    assert "SQNR" in next(tmp_path.rglob("attention-*.md")).read_text()


def test_every_recipe_compiles_and_is_right() -> None:
    field = [e for e in entrants(CUDA, "dense") if e.recipe != "native"]
    found = measure_task(Task(130, 130, 2, 24), field, CPU, rounds=1, clock="wall")
    assert [r.refused for r in found.results] == [None] * len(RECIPES)


def test_an_entrant_that_is_wrong_gets_no_number() -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros_like(q)

    field = [Entrant("wrong", torch.float32, "int8", ("int8", "int8"), wrong, 0.1)]
    found = measure_task(Task(16, 16, 1, 8), field, CPU, rounds=1, clock="wall")
    assert found.results[0].seconds is None and "wrong" in str(found.results[0].refused)
