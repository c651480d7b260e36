"""Suite: one linear in each format over a grid of shapes, and the cost table that the compiler chooses formats by.

Every candidate goes through ``torch.compile``, so all pay the same fixed cost of a call. A sample is a loop of calls
that walks through copies of the weight, because a model's next linear does not find its weight in the cache either.
"""

from __future__ import annotations

import datetime
import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.nn.functional import linear

from ditc.bench.harness import Call, Candidate, Clock, Result, measure
from ditc.kernels import linear as linear_ops
from ditc.kernels import quantize as quantize_ops
from ditc.passes.quantize.cost import FEW_ROWS
from ditc.passes.quantize.tables import TABLES, CostTable, Point, Source, table_for

from .candidates import BF16_BOUND, FP32_BOUND, INT8_BOUND
from .environment import describe, hardware_slug
from .report import markdown, preamble, show, to_json, write

SUITE = "linear-cost"
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
FEATURES = ((256, 256), (1152, 1152), (4608, 1152), (1152, 4608))
"""(N, K)."""

WEIGHT_ONLY_ROWS = (1, 4, 64)
"""Beyond a few rows a weight-only linear is a plain one behind a decoding: two points say what there is to say."""

_FP8_BOUND = 8e-2
_SAMPLE_S = 3e-3
_COPIES_BYTES = 64e6


@dataclass(frozen=True)
class Series:
    """A way to run a linear; the names are those of a cost table's points."""

    name: str
    format: str
    activations: str
    dtype: str
    bound: float


CPU_SERIES = (
    Series("fp32", "none", "none", "float32", FP32_BOUND),
    Series("bf16", "none", "none", "bfloat16", BF16_BOUND),
    Series("int8 over fp32", "int8", "dynamic", "float32", INT8_BOUND),
    Series("int8 weight-only over fp32", "int8", "none", "float32", INT8_BOUND),
)
CUDA_SERIES = (
    Series("bf16", "none", "none", "bfloat16", BF16_BOUND),
    Series("int8 over bf16", "int8", "dynamic", "bfloat16", INT8_BOUND),
    Series("fp8 over bf16", "fp8", "dynamic", "bfloat16", _FP8_BOUND),
    Series("int8 weight-only over bf16", "int8", "none", "bfloat16", INT8_BOUND),
)


@dataclass(frozen=True)
class Shape:
    """Rows, output and input features of a linear."""

    M: int
    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.M} x {self.N} x {self.K}"


def shapes(quick: bool) -> list[Shape]:
    """The grid, or a corner of it that shows that everything works."""
    rows, features = (ROWS[::3], FEATURES[:2]) if quick else (ROWS, FEATURES)
    return [Shape(M, N, K) for (N, K), M in itertools.product(features, rows)]


def series_for(device: torch.device) -> tuple[Series, ...]:
    """Who takes part: plain linears first, and what the device has arithmetic for."""
    return CUDA_SERIES if device.type == "cuda" else CPU_SERIES


class Functions:
    """The compiled functions of all series; each serves every shape, but the few rows have code of their own."""

    def __init__(self, device: torch.device) -> None:
        lowerings = (quantize_ops.lowerings(device), linear_ops.lowerings(device))
        self._table = {**select_decomp_table(), **lowerings[0], **lowerings[1]}
        self._compiled: dict[tuple[str, bool], Callable[..., Tensor]] = {}

    def of(self, series: Series, M: int) -> Callable[..., Tensor]:
        """A function of the input, the weight's parts and the bias."""
        few = M <= FEW_ROWS
        key = (series.name, few)
        if key not in self._compiled:
            # a backend of its own: Dynamo would hand one series' graph to another with an equal one
            own = partial(self._compile)
            self._compiled[key] = torch.compile(_function(series), backend=own, fullgraph=True, dynamic=not few)
        return self._compiled[key]

    def _compile(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_fx(graph, example_inputs, decompositions=self._table)


def _function(series: Series) -> Callable[..., Tensor]:
    ops, format = torch.ops.ditc, series.format

    def plain(x: Tensor, weight: list[Tensor], bias: Tensor) -> Tensor:
        return linear(x, weight[0], bias)

    def weight_only(x: Tensor, weight: list[Tensor], bias: Tensor) -> Tensor:
        y: Tensor = ops.weight_linear(x, weight, bias, format)
        return y

    def dynamic(x: Tensor, weight: list[Tensor], bias: Tensor) -> Tensor:
        y: Tensor = ops.quantized_linear(ops.quantize(x, format), weight, bias, None, None, format, x.dtype)
        return y

    if format == "none":
        return plain
    return weight_only if series.activations == "none" else dynamic


def _pack(series: Series, weight: Tensor) -> list[Tensor]:
    if series.format == "none":
        return [weight.to(getattr(torch, series.dtype))]
    parts: list[Tensor] = torch.ops.ditc.quantize_weight(weight, series.format)
    return parts


def measure_shape(
    shape: Shape, device: torch.device, functions: Functions, *, rounds: int, clock: Clock
) -> tuple[list[Result], int]:
    """The results of the series that make sense for a shape, in seconds per call, and how many calls a sample had."""
    generator = torch.Generator().manual_seed(0)
    copies = max(1, min(32, math.ceil(_COPIES_BYTES / (4 * shape.N * shape.K))))
    x, bias = (torch.randn(size, generator=generator).to(device) for size in ((shape.M, shape.K), (shape.N,)))
    weights = [
        (torch.randn(shape.N, shape.K, generator=generator) / math.sqrt(shape.K)).to(device) for _ in range(copies)
    ]
    reference = linear(x, weights[0], bias)
    calls = _calls(lambda: linear(x, weights[-1], bias), device)

    def prepare(series: Series) -> Call:
        function = functions.of(series, shape.M)
        dtype = getattr(torch, series.dtype)
        packed = [_pack(series, weight) for weight in weights]
        own_x, own_bias = x.to(dtype), bias.to(dtype)

        def call(_: int) -> Tensor:
            with torch.no_grad():
                # the first copy comes last: its output is the one that is checked
                for index in range(calls - 1, -1, -1):
                    output = function(own_x, packed[index % copies], own_bias)
            return output

        return call

    field = [
        Candidate(series.name, partial(prepare, series), series.bound)
        for series in series_for(device)
        if series.format == "none" or series.activations == "dynamic" or shape.M in WEIGHT_ONLY_ROWS
    ]
    results = measure(field, [reference], rounds=rounds, clock=clock, warmup=1)
    for result in results:
        result.samples = [sample / calls for sample in result.samples]
        if result.seconds is not None:
            result.seconds = type(result.seconds).of(result.samples)
    return results, calls


def _calls(once: Callable[[], object], device: torch.device) -> int:
    """So many calls that a sample takes some milliseconds, which every clock can tell."""
    for _ in range(2):
        start = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return max(1, min(256, math.ceil(_SAMPLE_S / seconds)))


def table_of(document: dict[str, Any], measured: Sequence[tuple[Shape, Sequence[Result]]]) -> CostTable:
    """The cost table of this machine: medians as points, and a roofline through the best of them.

    Raises:
        ValueError: a plain series has no point.
    """
    hardware, versions = document["hardware"], document["versions"]
    by_name = {series.name: series for series in (*CPU_SERIES, *CUDA_SERIES)}
    points = [
        Point(
            format=by_name[result.name].format,
            activations=by_name[result.name].activations,  # type: ignore[arg-type]
            dtype=by_name[result.name].dtype,  # type: ignore[arg-type]
            M=shape.M,
            N=shape.N,
            K=shape.K,
            seconds=float(f"{result.seconds.median:.4g}"),
        )
        for shape, results in measured
        for result in results
        if result.seconds is not None
    ]
    plain = [point for point in points if point.format == "none"]
    if not plain:
        raise ValueError("no plain linear was measured")
    gpu = hardware.get("gpu")
    name = gpu or hardware["cpu"]
    machine = gpu or f"{hardware['cores']} cores of {name}, {hardware['threads']} threads"
    # formats that were not measured keep the rates that the data sheet promises
    base = None if gpu is None else table_for("cuda")
    rates = dict(base.rates) if base else {}
    for key, rate in _rates(points).items():
        rates[key] = float(f"{rate:.4g}")
    bandwidth = max(p.N * p.K * getattr(torch, p.dtype).itemsize / p.seconds for p in plain)
    return CostTable(
        schema_number=1,
        device="cuda" if gpu else "cpu",
        name=re.escape(name),
        capability=base.capability if base else None,
        source=Source(
            kind="measured",
            text=f"measured on {machine}, torch {versions['torch']}, {document['date']}",
            hardware=machine,
            date=document["date"],
            versions=versions,
        ),
        launch=min(point.seconds for point in plain),
        quantize=dict(base.quantize) if base else {},
        bandwidth=float(f"{bandwidth:.4g}"),
        rates=rates,
        points=tuple(points),
    )


def _rates(points: Sequence[Point]) -> dict[str, float]:
    """The best multiply-add rate, by dtype of plain linears and by format of those with both operands quantised."""
    rates: dict[str, float] = {}
    for point in points:
        if point.format == "none" or point.activations == "dynamic":
            key = point.dtype if point.format == "none" else point.format
            rates[key] = max(rates.get(key, 0.0), 2 * point.M * point.N * point.K / point.seconds)
    return rates


def run(
    device: torch.device,
    *,
    rounds: int,
    clock: Clock,
    quick: bool = False,
    install: bool = False,
    save: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the grid and returns the document; writes it when ``save`` is set.

    Args:
        device: where to measure.
        rounds: timed loops per candidate and shape.
        clock: see :func:`ditc.bench.harness.timer`.
        quick: a corner of the grid.
        install: write the table to where the compiler reads it.
        save: write JSON and Markdown.
        progress: is told what happens.
    """
    torch._dynamo.reset()
    functions = Functions(device)
    measured: list[tuple[Shape, list[Result]]] = []
    entries = []
    # one compiled function serves many shapes: the few rows are specialised
    with torch._dynamo.config.patch(recompile_limit=64):
        for shape in shapes(quick):
            results, calls = measure_shape(shape, device, functions, rounds=rounds, clock=clock)
            measured.append((shape, results))
            entries.append({"M": shape.M, "N": shape.N, "K": shape.K, "calls": calls, "results": to_json(results)})
            progress(f"{shape}: " + ", ".join(f"{r.name} {_milliseconds(r)}" for r in results))
    document: dict[str, Any] = {**describe(device), "date": datetime.date.today().isoformat()}
    document |= {"clock": clock, "rounds": rounds, "shapes": entries}
    table = table_of(document, measured)
    document["table"] = table.model_dump(mode="json")
    series = series_for(device)
    plain = [one.name for one in series if one.format == "none"]
    quantised = next(one.name for one in series if one.activations == "dynamic")
    header, body = _rows(measured, [one.name for one in series], quantised, plain)
    show(SUITE, header, body)
    if save:
        text = f"{preamble(SUITE, document)}\nOne linear, M x N x K; medians in ms, {rounds} rounds.\n\n"
        progress(f"written: {', '.join(str(p) for p in write(SUITE, document, text + markdown(header, body)))}")
    if install:
        path = TABLES / f"{hardware_slug(document['hardware'])}.json"
        path.write_text(table.model_dump_json(indent=1) + "\n")
        progress(f"installed: {path}")
    return document


def _rows(
    measured: Sequence[tuple[Shape, Sequence[Result]]], names: Sequence[str], quantised: str, plain: Sequence[str]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line per shape: milliseconds of each series, and how many times faster than plain linears one of them is."""
    header = ("M x N x K", *names, *(f"{quantised} x {name}" for name in plain))
    body = []
    for shape, results in measured:
        found = {result.name: result for result in results}
        cells = [_milliseconds(found[name]) if name in found else "" for name in names]
        own = found[quantised].seconds
        bases = (found[name].seconds for name in plain)
        body.append((str(shape), *cells, *(f"{b.median / own.median:.2f}" if b and own else "" for b in bases)))
    return header, body


def _milliseconds(result: Result) -> str:
    return "no number: " + str(result.refused) if result.seconds is None else f"{1e3 * result.seconds.median:.4g}"
