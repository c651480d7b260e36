"""The harness: who runs when, what the ratios are, and that a wrong result gets no number."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import breakdown, candidates, environment, report, step_latency
from benchmarks.__main__ import app
from benchmarks.model import Size, build
from ditc.bench import harness
from ditc.bench.harness import Candidate, Result, Spread

REFERENCE = torch.arange(1.0, 9.0)


def candidate(
    name: str, run: Callable[[int], torch.Tensor] = lambda _: REFERENCE, bound: float = 1e-3, **rest: Any
) -> Candidate:
    return Candidate(name, lambda: run, bound, **rest)


def result(name: str, *seconds: float) -> Result:
    return Result(name, error=0.0, bound=1.0, seconds=Spread.of(seconds), samples=list(seconds))


@given(n=st.integers(1, 9), round_=st.integers(0, 40))
def test_each_round_runs_everybody_once(n: int, round_: int) -> None:
    assert sorted(harness.order(n, round_)) == list(range(n))


@given(n=st.integers(2, 7))
def test_everybody_takes_every_position(n: int) -> None:
    rounds = [harness.order(n, r) for r in range(2 * n)]
    for position in range(n):
        assert {r[position] for r in rounds} == set(range(n))
    neighbours = {(a, b) for r in rounds for a, b in itertools.pairwise(r)}
    assert all((b, a) in neighbours for a, b in neighbours)


def test_candidates_take_turns() -> None:
    calls: list[str] = []

    def logged(name: str) -> Callable[[int], torch.Tensor]:
        def run(_: int) -> torch.Tensor:
            calls.append(name)
            return REFERENCE

        return run

    field = [candidate(name, logged(name)) for name in "abc"]
    results = harness.measure(field, [REFERENCE], rounds=3, warmup=2)
    assert "".join(calls[:6]) == "aabbcc"  # warm-up, untimed
    assert "".join(calls[6:15]) == "abc" + "cba" + "bca"
    assert "".join(calls[15:]) == "abc"  # the check after the last round
    assert [len(r.samples) for r in results] == [3, 3, 3]
    assert all(r.seconds is not None and r.seconds.n == 3 for r in results)


def test_a_wrong_result_gets_no_number_and_no_timed_run() -> None:
    runs = []

    def wrong(_: int) -> torch.Tensor:
        runs.append(1)
        return REFERENCE * 1.01

    good, bad = harness.measure([candidate("good"), candidate("bad", wrong)], [REFERENCE], rounds=4, warmup=1)
    assert good.seconds is not None and good.refused is None
    assert bad.seconds is None and bad.samples == [] and len(runs) == 1
    assert bad.error == pytest.approx(0.01, rel=1e-3)
    assert "wrong: relative error 1.00e-02, allowed 1e-03" in str(bad.refused)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_wrong(value: float) -> None:
    (found,) = harness.measure([candidate("x", lambda _: torch.full((8,), value))], [REFERENCE], rounds=1)
    assert found.seconds is None and "wrong" in str(found.refused)


def test_a_result_that_turns_wrong_while_timed_gets_no_number() -> None:
    runs = []

    def drifting(_: int) -> torch.Tensor:
        runs.append(1)
        return REFERENCE if len(runs) < 4 else REFERENCE * 2

    (found,) = harness.measure([candidate("x", drifting)], [REFERENCE], rounds=3, warmup=2)
    assert len(found.samples) == 3 and found.seconds is None and "wrong" in str(found.refused)


def test_each_step_is_checked_against_its_own_reference() -> None:
    steps: list[int] = []

    def run(step: int) -> torch.Tensor:
        steps.append(step)
        return REFERENCE * (1 + step % 2)

    (found,) = harness.measure([candidate("x", run)], [REFERENCE, 2 * REFERENCE], rounds=3, warmup=2)
    assert steps == [0, 1, 2, 3, 4, 5]
    assert found.seconds is not None and found.error == 0.0
    (found,) = harness.measure([candidate("x", run)], [REFERENCE], rounds=1, warmup=2)
    assert "wrong" in str(found.refused) and found.error == 1.0


def test_a_candidate_that_raises_or_skips_leaves_the_others_alone() -> None:
    def broken(_: int) -> torch.Tensor:
        raise LookupError("no such kernel\nand a long trace")

    field = [candidate("broken", broken), candidate("skipped", skip="there is no GPU"), candidate("fine")]
    failed, skipped, fine = harness.measure(field, [REFERENCE], rounds=2)
    assert failed.refused == "LookupError: no such kernel"
    assert skipped.refused == "there is no GPU" and skipped.prepare_s is None
    assert fine.seconds is not None


def test_a_wrong_shape_is_an_error_and_not_a_broadcast() -> None:
    with pytest.raises(ValueError, match="shape"):
        harness.relative_error(torch.ones(1), torch.ones(3))


def test_processor_time_is_refused_for_several_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="one thread"):
            harness.timer("cpu")
    finally:
        torch.set_num_threads(before)


def test_the_clock_counts_seconds() -> None:
    import time

    def sleep() -> torch.Tensor:
        time.sleep(0.02)
        return REFERENCE

    assert 0.02 <= harness.timer("wall")(sleep) < 2


def test_ratios_are_taken_within_rounds() -> None:
    # the machine is twice as slow in the second round, and the ratio does not notice
    found = harness.ratios([result("base", 2.0, 4.0, 2.0), result("fast", 1.0, 2.0, 1.0)], "base")
    assert found["fast"] == Spread(2.0, 2.0, 2.0, 3)
    assert found["base"] == Spread(1.0, 1.0, 1.0, 3)


def test_ratios_leave_out_who_has_no_number() -> None:
    refused = Result("bad", refused="wrong", samples=[1.0, 1.0])
    assert set(harness.ratios([result("base", 1.0, 1.0), refused], "base")) == {"base"}
    with pytest.raises(KeyError, match="no number"):
        harness.ratios([refused], "bad")


def test_spread_holds_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(2.0, 3.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_best_is_the_fastest_that_has_a_number() -> None:
    refused = Result("wrong but quick", refused="wrong")
    field = [result("slow", 3.0), result("quick", 2.0), result("other", 1.0), refused]
    assert harness.best(field, ["slow", "quick", "wrong but quick"]) == "quick"
    assert harness.best(field, ["nobody"]) is None


def test_table_gives_no_number_where_there_is_none() -> None:
    header, body = report.rows(
        [result("base", 0.002, 0.002), Result("bad", error=0.5, refused="wrong")], ["base", "bad"]
    )
    assert header == ("candidate", "ms (quartiles)", "x base", "relative error")
    assert body[0] == ("base", "2.00 (2.00 – 2.00)", "1.00 (1.00 – 1.00)", "0.0e+00")
    assert body[1] == ("bad", "no number: wrong", "", "5.0e-01")
    lines = report.markdown(header, body).splitlines()
    assert len(lines) == 4 and all(line.count("|") == 5 for line in lines)


def test_written_json_has_the_schema(tmp_path: Path) -> None:
    document = {**environment.describe(torch.device("cpu")), "results": report.to_json([result("base", 0.5, 0.25)])}
    paths = report.write("some-suite", document, "text", tmp_path)
    slug = environment.hardware_slug(document["hardware"])
    assert re.fullmatch(rf"some-suite-{slug}-\d{{4}}-\d\d-\d\d\.json", paths[0].name)
    assert paths[1].read_text() == "text\n"
    read = json.loads(paths[0].read_text())
    assert set(read) == {"schema", "suite", "date", "hardware", "versions", "commit", "results"}
    assert {"cpu", "cpu_flags", "cores", "threads"} <= set(read["hardware"])
    assert {"python", "torch", "torchao", "ditc"} <= set(read["versions"])
    assert set(read["results"][0]) == {
        *("name", "plan", "error", "bound", "seconds", "refused", "prepare_s", "samples")
    }  # fmt: skip
    assert set(read["results"][0]["seconds"]) == {"low", "median", "high", "n"}


def test_hardware_slug_fits_a_file_name() -> None:
    assert environment.hardware_slug({"cpu": "AMD EPYC (x) 9", "cores": 2}) == "amd-epyc-x-9-2c"
    assert environment.hardware_slug({"cpu": "any", "cores": 2, "gpu": "NVIDIA H200"}) == "nvidia-h200"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_int_mm", breakdown._GEMM),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", breakdown._ATTENTION),
        ("ditc::vnni_norm_linear", breakdown._VNNI),
        ("ditc::vnni_weight_linear", breakdown._LINEAR),
        ("graph_0_cpp_fused__scaled_dot_product_flash_attention_for_cpu_quantized_linear_view_4", breakdown._SCALE),
        ("graph_0_cpp_fused_add_mul_norm_quantize_3", breakdown._NORM),
        ("graph_0_cpp_fused_activation_quantize_quantized_linear_7", breakdown._ACTIVATION),
        ("graph_0_cpp_fused_quantize_transpose_view_5", breakdown._QUANTISE),
        ("graph_0_cpp_fused_silu_1", breakdown._POINTWISE),
        ("aten::addmm", breakdown._LINEAR),
        ("aten::empty", None),
        ("Torch-Compiled Region: 0/0", None),
    ],
)
def test_profiled_names_find_their_category(name: str, kind: str | None) -> None:
    assert breakdown.category(name) == kind


def test_breakdown_sums_self_times_per_step() -> None:
    events = [SimpleNamespace(name="aten::_int_mm", self_cpu_time_total=t) for t in (1000.0, 3000.0)]
    events.append(SimpleNamespace(name="aten::empty", self_cpu_time_total=9e9))
    total, largest = breakdown.classify(events, torch.device("cpu"), repeats=2)
    assert total == {"integer GEMM": 2.0} and largest == {"aten::_int_mm": 2.0}


def test_operations_are_those_of_the_model() -> None:
    size = Size(128, 2, 12)
    model, latent, timesteps = build(size, torch.device("cpu"))
    linears = [m for block in model.blocks for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
    token_path = [m for m in linears if m.out_features != 6 * size.hidden]
    assert size.linear_ops == sum(2 * size.tokens * m.in_features * m.out_features for m in token_path)
    assert latent.shape[2] * latent.shape[3] == 4 * size.tokens
    out = model(latent, timesteps[0])
    assert out.shape == latent.shape and bool(out.isfinite().all())


def test_every_block_of_the_model_matters() -> None:
    model, latent, timesteps = build(Size(64, 3, 16), torch.device("cpu"))
    reference = model(latent, timesteps[0])
    assert harness.relative_error(model(latent, timesteps[5]), reference) > 0.05
    for index in range(3):
        kept, model.blocks[index] = model.blocks[index], _Identity()
        assert harness.relative_error(model(latent, timesteps[0]), reference) > 0.05
        model.blocks[index] = kept


class _Identity(torch.nn.Module):
    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x


def test_the_model_is_the_same_each_time_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    first = build(Size(64, 1, 16), torch.device("cpu"))
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)
    second = build(Size(64, 1, 16), torch.device("cpu"))
    assert torch.equal(first[0](first[1], first[2][3]), second[0](second[1], second[2][3]))


def test_peers_and_ditcs_are_candidates() -> None:
    names = [c.name for c in candidates.candidates(*build(Size(64, 1, 16), torch.device("cpu")))]
    assert set(candidates.PEERS) | set(candidates.DITCS) <= set(names)
    assert len(names) == len(set(names))


def test_a_suite_measures_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole suite with its eager candidate alone, which compiles nothing."""
    monkeypatch.setattr(step_latency, "ceiling", lambda *_: {"int8 _int_mm": 100.0})
    monkeypatch.setattr(report, "ROOT", tmp_path)
    said: list[str] = []
    document = step_latency.run(
        torch.device("cpu"), [Size(64, 1, 16)], rounds=2, clock="wall", only=["eager"], progress=said.append
    )
    (entry,) = document["sizes"]
    assert [r["name"] for r in entry["results"]] == [candidates.EAGER]
    assert entry["results"][0]["error"] == 0.0 and len(entry["results"][0]["samples"]) == 2
    assert entry["best_ditc"] is None and any("No ditc candidate" in line for line in said)
    (written,) = (tmp_path / "benchmarks" / "results").glob("*.json")
    assert json.loads(written.read_text())["sizes"][0]["tokens"] == 16


@pytest.mark.parametrize("arguments", [["--size", "1152"], ["--clock", "sundial"]])
def test_command_line_refuses_nonsense(arguments: list[str]) -> None:
    found = CliRunner().invoke(app, ["step-latency", "--no-save", *arguments])
    assert found.exit_code == 2
