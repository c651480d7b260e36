"""The cost model: facts that it must respect, tables that are read strictly, and a choice that can be followed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ditc.kernels.formats import FORMATS, sqnr
from ditc.passes.errors import PlanError
from ditc.passes.quantize.cost import (
    FEW_ROWS,
    PLAIN,
    TYPICAL_SQNR,
    TYPICAL_WEIGHT_SQNR,
    CostError,
    CostTable,
    DeviceKind,
    Estimate,
    Option,
    choose,
    estimate,
    expected_sqnr,
    load_table,
    options,
    roofline,
    table_for,
)
from ditc.passes.quantize.tables import TABLES

CPU = DeviceKind("cpu", "AMD EPYC")
H100 = DeviceKind("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
H200 = DeviceKind("cuda", "NVIDIA H200", (9, 0))
B200 = DeviceKind("cuda", "NVIDIA B200", (10, 0))
RTX5090 = DeviceKind("cuda", "NVIDIA GeForce RTX 5090", (12, 0))
DEVICES = (CPU, H100, H200, B200, RTX5090)
BF16, FP32 = torch.bfloat16, torch.float32

sizes = st.integers(1, 8192)


def gain(device: DeviceKind, M: int, N: int, K: int, format: str, activations: Any = "dynamic") -> float:
    return estimate(M, N, K, device, format, activations, FP32 if device is CPU else BF16).gain


# --- what is known ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("M", "N", "K"), [(64, 1152, 1152), (1024, 4608, 1152), (4096, 3072, 3072)])
def test_on_a_cpu_only_int8_pays(M: int, N: int, K: int) -> None:
    assert gain(CPU, M, N, K, "int8") > 1.5
    for name in set(FORMATS) - {"int8"}:
        for activations in ("dynamic", "none"):
            found = estimate(M, N, K, CPU, name, activations, FP32)
            assert found.gain < 1
            assert f"no arithmetic in {name} here: storage only" in found.source


@pytest.mark.parametrize("M", [1, FEW_ROWS])
def test_for_few_rows_a_cpu_reads_int8_weights_faster(M: int) -> None:
    assert gain(CPU, M, 6912, 1152, "int8", "none") > 1.5
    assert gain(CPU, M, 6912, 1152, "int8", "none") > gain(CPU, 256, 6912, 1152, "int8", "none")
    for name in set(FORMATS) - {"int8"}:
        assert gain(CPU, M, 6912, 1152, name, "none") < 1


def test_dynamic_nvfp4_on_a_b200_breaks_even_at_about_4096() -> None:
    assert gain(B200, 2048, 2048, 2048, "nvfp4") < 0.5
    assert gain(B200, 4096, 4096, 4096, "nvfp4") == pytest.approx(1, abs=0.1)
    assert gain(B200, 8192, 8192, 8192, "nvfp4") > 2
    # a calibrated range is part of what makes the input
    assert gain(B200, 4096, 4096, 4096, "nvfp4", "static") > 2


def test_hopper_has_no_fp4_and_no_mx_units() -> None:
    for device in (H100, H200):
        for name in ("nvfp4", "mxfp4", "mxfp8"):
            assert gain(device, 4096, 4096, 4096, name) < 1
            assert "storage only" in estimate(4096, 4096, 4096, device, name, "dynamic", BF16).source
        for name in ("int8", "fp8"):
            assert 1 < gain(device, 4096, 4096, 4096, name) < 2
            assert gain(device, 64, 512, 512, name) < 1


def test_published_numbers_say_so_and_measured_ones_say_where() -> None:
    for device in DEVICES[1:]:
        assert "not measured" in estimate(256, 256, 256, device, "int8", "dynamic", BF16).source
    source = estimate(256, 256, 256, CPU, "int8", "dynamic", FP32).source
    assert source.startswith("measured on") and "torch" in source
    table = table_for(CPU)
    assert table.source.kind == "measured" and table.source.date and table.source.versions["torch"]


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@settings(deadline=None, max_examples=30)
@given(M=sizes, N=sizes, K=sizes, data=st.data())
def test_estimates_are_times(device: DeviceKind, M: int, N: int, K: int, data: st.DataObject) -> None:
    format = data.draw(st.sampled_from([PLAIN, *FORMATS]))
    activations: Any = data.draw(st.sampled_from(["dynamic", "static", "none"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    found = estimate(M, N, K, device, format, activations, dtype)
    assert 0 < found.seconds < 1e3 and 0 < found.plain_seconds < 1e3
    assert found.gain == pytest.approx(found.plain_seconds / found.seconds)
    if format == PLAIN:
        assert found.gain == 1


@settings(deadline=None, max_examples=50)
@given(M=sizes, N=sizes, K=sizes, format=st.sampled_from([PLAIN, *FORMATS]))
def test_the_roofline_rises_with_every_size(M: int, N: int, K: int, format: str) -> None:
    table = table_for(B200)

    def seconds(m: int, n: int, k: int) -> float:
        return roofline(table, m, n, k, format, "dynamic", "bfloat16")

    base = seconds(M, N, K)
    assert base <= seconds(M + 1, N, K) and base <= seconds(M, N + 1, K) and base <= seconds(M, N, K + 1)


def test_static_activations_cost_no_more_than_dynamic_ones() -> None:
    for device in DEVICES:
        for name in ("int8", "fp8", "nvfp4"):
            for M in (1, 64, 2048):
                assert gain(device, M, 2048, 2048, name, "static") >= gain(device, M, 2048, 2048, name, "dynamic")


# --- points ----------------------------------------------------------------------------------------------------------


def made_table(**changes: Any) -> dict[str, Any]:
    point = {"format": "none", "activations": "none", "dtype": "float32", "M": 64, "N": 256, "K": 256}
    quantised = {**point, "format": "int8", "activations": "dynamic"}
    return {
        "schema_number": 1,
        "device": "cpu",
        "name": "Test CPU",
        "capability": None,
        "source": {"kind": "measured", "text": "measured here", "hardware": "a test", "date": "2026-01-01"},
        "launch": 1e-6,
        "quantize": {},
        "bandwidth": 1e10,
        "rates": {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11},
        "points": [{**point, "seconds": 4e-4}, {**quantised, "seconds": 1e-4}],
    } | changes


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(**changes: Any) -> Path:
        path = tmp_path / "table.json"
        path.write_text(json.dumps(made_table(**changes)), encoding="utf-8")
        return path

    return written


def test_an_estimate_at_a_point_is_the_point(write: Callable[..., Path]) -> None:
    table = load_table(write())
    found = estimate(64, 256, 256, CPU, "int8", "dynamic", FP32, table=table)
    assert found.plain_seconds == pytest.approx(4e-4)
    assert found.seconds == pytest.approx(1e-4)


def test_between_points_the_correction_is_between_theirs(write: Callable[..., Path]) -> None:
    plain = {"format": "none", "activations": "none", "dtype": "float32", "N": 256, "K": 256}
    points = [{**plain, "M": 64, "seconds": 4e-4}, {**plain, "M": 1024, "seconds": 8e-3}]
    table = load_table(write(points=points))
    corrections = [
        estimate(M, 256, 256, CPU, PLAIN, "none", FP32, table=table).seconds
        / roofline(table, M, 256, 256, PLAIN, "none", "float32")
        for M in (64, 128, 512, 1024)
    ]
    low, high = sorted((corrections[0], corrections[-1]))
    assert low < corrections[1] < high and low < corrections[2] < high
    assert abs(corrections[1] - corrections[0]) < abs(corrections[1] - corrections[-1])


def test_what_was_not_measured_strays_as_the_plain_linear_does(write: Callable[..., Path]) -> None:
    table = load_table(write())
    plain = estimate(64, 256, 256, CPU, PLAIN, "none", FP32, table=table).seconds
    stray = plain / roofline(table, 64, 256, 256, PLAIN, "none", "float32")
    fp8 = estimate(64, 256, 256, CPU, "fp8", "dynamic", FP32, table=table).seconds
    assert fp8 == pytest.approx(stray * roofline(table, 64, 256, 256, "fp8", "dynamic", "float32"))
    # integers are the same whatever the dtype beside them
    bf16 = estimate(64, 256, 256, CPU, "int8", "dynamic", BF16, table=table).seconds
    ratio = 1e-4 / roofline(table, 64, 256, 256, "int8", "dynamic", "float32")
    assert bf16 == pytest.approx(ratio * roofline(table, 64, 256, 256, "int8", "dynamic", "bfloat16"))


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_every_table_that_ships_is_one(path: Path) -> None:
    table = load_table(path)
    assert table.source.hardware
    assert table.source.kind == "measured" or (table.source.links and table.source.assumptions)
    assert {"float32", "bfloat16"} <= set(table.rates)
    assert json.loads(path.read_text()) == json.loads(table.model_dump_json(exclude_unset=True))


@pytest.mark.parametrize(
    ("name", "capability", "hardware"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100"),
        ("NVIDIA H200", (9, 0), "H200"),
        ("NVIDIA GH200 480GB", (9, 0), "H200"),
        ("NVIDIA H100 PCIe", (9, 0), "H100"),
        ("NVIDIA B200", (10, 0), "B200"),
        ("NVIDIA GeForce RTX 5090", (12, 0), "5090"),
        ("NVIDIA GeForce RTX 5080", (12, 0), "5090"),
    ],
)
def test_devices_find_their_table(name: str, capability: tuple[int, int], hardware: str) -> None:
    assert hardware in table_for(DeviceKind("cuda", name, capability)).source.hardware


def test_a_table_that_stands_in_says_so() -> None:
    sibling = DeviceKind("cuda", "NVIDIA GeForce RTX 5080", (12, 0))
    source = estimate(256, 256, 256, sibling, "int8", "dynamic", BF16).source
    assert "taken for NVIDIA GeForce RTX 5080" in source
    other = DeviceKind("cpu", "Some Other CPU")
    assert "taken for Some Other CPU" in estimate(256, 256, 256, other, "int8", "dynamic", FP32).source
    assert "taken for" not in estimate(256, 256, 256, CPU, "int8", "dynamic", FP32).source


def test_a_device_without_a_table_is_refused() -> None:
    with pytest.raises(CostError, match=r"no cost table for 'NVIDIA T4'.*cost_table"):
        table_for(DeviceKind("cuda", "NVIDIA T4", (7, 5)))
    assert issubclass(CostError, PlanError)


def test_this_machine_has_a_name() -> None:
    kind = DeviceKind.of("cpu")
    assert kind.type == "cpu" and kind.name and kind.capability is None
    assert estimate(64, 256, 256, "cpu", "int8", "dynamic", FP32).seconds > 0


def test_a_gpu_is_known_by_name_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert DeviceKind.of(torch.device("cuda")) == H200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise: Extra"),
        ({"schema_number": 2}, "schema_number"),
        ({"device": "tpu"}, "device"),
        ({"launch": "fast"}, "launch"),
        ({"launch": -1.0}, "launch"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"rates": {"int3": 1e12}}, "no format 'int3'"),
        ({"rates": {"int8": 0.0}}, "not positive"),
        ({"quantize": {"float31": 1e-6}}, "float31"),
        ({"rates": {"bfloat16": 1e12}}, "points of float32, which has no rate"),
        ({"name": "("}, "name"),
        ({"capability": [9]}, "capability"),
        ({"points": [{"format": "int8"}]}, "points.0"),
        ({"points": [made_table()["points"][0] | {"seconds": -1.0}]}, "seconds"),
        ({"points": [made_table()["points"][0] | {"format": "int9"}]}, "int9"),
        ({"source": {"kind": "guessed", "text": "", "hardware": "", "date": ""}}, "source.kind"),
    ],
)
def test_what_is_no_table_is_refused(changes: dict[str, Any], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(CostError, match=message):
        load_table(write(**changes))


def test_files_that_are_no_json_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("{")
    with pytest.raises(CostError, match="no cost table"):
        load_table(path)
    with pytest.raises(CostError, match="cannot be read"):
        load_table(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CostError, match="no cost table"):
        load_table(path)


def test_a_table_without_the_dtype_is_refused(write: Callable[..., Path]) -> None:
    table = load_table(write(rates={"float32": 1e11}, points=[]))
    with pytest.raises(CostError, match="no rate of bfloat16"):
        estimate(1, 1, 1, CPU, PLAIN, "none", BF16, table=table)
    half = estimate(64, 256, 256, CPU, PLAIN, "none", torch.float16, table=load_table(write()))
    assert half.seconds == estimate(64, 256, 256, CPU, PLAIN, "none", BF16, table=load_table(write())).seconds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, CPU, "int8", "dynamic", FP32), "0 x 1 x 1"),
        ((1, 1, 1, CPU, "int9", "dynamic", FP32), "int9"),
        ((1, 1, 1, CPU, "int8", "dynamic", torch.int8), "int8 linears"),
    ],
)
def test_questions_that_make_no_sense(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(*arguments)


# --- errors and choice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
def test_typical_errors_are_those_of_gaussian_data(name: str) -> None:
    generator, K = torch.Generator().manual_seed(3), 1152
    x_MK = torch.randn(256, K, generator=generator)
    w_NK = torch.randn(256, K, generator=generator) / math.sqrt(K)
    format = FORMATS[name]
    granularity: Literal["row", "tensor"] = "tensor" if name == "nvfp4" else "row"
    rounded_NK = format.dequantize(format.quantize(w_NK, granularity=granularity)).double()
    y_MN = x_MK.double() @ w_NK.double().t()
    both = sqnr(y_MN, format.dequantize(format.quantize(x_MK)).double() @ rounded_NK.t())
    assert TYPICAL_SQNR[name] == pytest.approx(both, abs=0.2)
    assert TYPICAL_WEIGHT_SQNR[name] == pytest.approx(sqnr(y_MN, x_MK.double() @ rounded_NK.t()), abs=0.2)


def test_typical_errors_meet_the_yardsticks() -> None:
    for name, least in (("int8", 35), ("mxfp8", 25), ("mxfp4", 12), ("nvfp4", 15)):
        assert TYPICAL_SQNR[name] >= least
    assert set(TYPICAL_SQNR) == set(TYPICAL_WEIGHT_SQNR) == set(FORMATS)


class Measured:
    """Stands for a calibration."""

    def __contains__(self, name: str) -> bool:
        return name == "known"

    def sqnr(self, name: str, format: str, activations: str) -> float | None:
        return {"dynamic": 12.5, "none": 14.5}[activations] if format == "int8" else None


def test_calibrated_errors_replace_typical_ones() -> None:
    calibration: Any = Measured()
    assert expected_sqnr("int8", "dynamic", calibration, "known") == 12.5
    assert expected_sqnr("int8", "none", calibration, "known") == 14.5
    assert expected_sqnr("fp8", "dynamic", calibration, "known") == TYPICAL_SQNR["fp8"]
    assert expected_sqnr("int8", "dynamic", calibration, "unknown") == TYPICAL_SQNR["int8"]
    assert expected_sqnr("int8", "none") == TYPICAL_WEIGHT_SQNR["int8"]
    found = options(1024, 1152, 1152, CPU, FP32, ["int8"], calibration=calibration, name="known")
    assert [option.sqnr for option in found] == [math.inf, 12.5, 14.5]
    assert choose(found, 20).option.format == PLAIN
    assert choose(found, 12).option.format == "int8"


def test_options_leave_out_what_does_not_fit() -> None:
    found = options(64, 100, 48, B200, BF16, list(FORMATS))
    assert {option.format for option in found} == {PLAIN, "int8", "fp8", "nvfp4"}
    assert found[0].format == PLAIN and found[0].sqnr == math.inf


def option(format: str, seconds: float, error: float, activations: Any = "dynamic") -> Option:
    return Option(format, activations, Estimate(seconds, 1.0, "a test"), error)


PLAIN_OPTION = option(PLAIN, 1.0, math.inf, "none")


def test_the_fastest_that_is_good_enough_is_chosen() -> None:
    candidates = [PLAIN_OPTION, option("int8", 0.5, 39.0), option("nvfp4", 0.25, 17.4), option("fp8", 0.6, 28.6)]
    choice = choose(candidates, 20)
    assert choice.option.format == "int8"
    assert choice.reason == "int8: 2.00 x as fast, 39.0 dB for at least 20 (a test)"
    assert [reason for _, reason in choice.rejected] == [
        "none: 2.00 x the time of int8",
        "nvfp4: 17.4 dB, less than 20",
        "fp8: 1.20 x the time of int8",
    ]
    assert choose(candidates, 17.4).option.format == "nvfp4"
    assert choose(candidates, 50).option.format == PLAIN
    assert "nvfp4: 17.4 dB" in choose(candidates, 50).reason


def test_of_equally_fast_options_the_most_exact_is_chosen() -> None:
    candidates = [PLAIN_OPTION, option("fp8", 0.5, 28.6), option("int8", 0.5, 39.0)]
    assert choose(candidates, 0).option.format == "int8"
    assert choose([PLAIN_OPTION, option("int8", 1.0, 39.0)], 0).option is PLAIN_OPTION


def test_weight_only_options_are_named_so() -> None:
    choice = choose([PLAIN_OPTION, option("int8", 0.5, 42.0, "none")], 20)
    assert choice.reason.startswith("int8 weight-only: 2.00 x")


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no candidate reaches 50 dB; the best has 39\.0 dB"):
        choose([option("int8", 0.5, 39.0)], 50)
    with pytest.raises(ValueError, match="no candidate"):
        choose([], 10)


@settings(deadline=None, max_examples=100)
@given(
    times=st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(0, 60)), max_size=6),
    budget=st.floats(0, 60),
)
def test_a_choice_is_within_budget_and_nothing_within_it_is_faster(
    times: list[tuple[float, float]], budget: float
) -> None:
    candidates = [PLAIN_OPTION, *(option("int8", seconds, error) for seconds, error in times)]
    choice = choose(candidates, budget)
    assert choice.option.sqnr >= budget
    assert all(o.estimate.seconds >= choice.option.estimate.seconds for o in candidates if o.sqnr >= budget)
    assert len(choice.rejected) == len(candidates) - 1


def test_tables_may_be_given(write: Callable[..., Path]) -> None:
    table = load_table(write())
    assert isinstance(table, CostTable)
    found = options(64, 256, 256, CPU, FP32, ["int8"], table=table)
    assert found[1].estimate.source == "measured here (of a test, taken for AMD EPYC)"
    assert found[1].estimate.gain == pytest.approx(4)
