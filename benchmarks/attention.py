"""Suite: attention in low precision beside torch's own, alone, in a compiled graph, at many lengths and head sizes.

Queries, keys and values arrive as ``[B, L, H, D]`` and the result leaves as ``[B, L, H * D]``, as between the linears
of a block; quantisation counts in. Errors are against float64 attention of the very operands of the run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditc.bench.harness import Call, Candidate, Clock, Result, Spread, best, measure, ratios
from ditc.kernels import quantize as quantize_ops
from ditc.kernels.attention import (
    RECIPES,
    attention_blocks,
    attention_int8,
    attention_quantized,
    attention_reason,
    quantize_operands,
)
from ditc.kernels.matmul import fp32_matmul, fp32_matmul_reason

from .environment import describe
from .report import markdown, preamble, rows, show, to_json, write

SUITE = "attention"
CPU_TOKENS, CPU_HEADS = (256, 1024, 2048, 4096), (64, 72, 128)
CUDA_TOKENS, CUDA_HEADS = (4096, 16384, 32768), (64, 128)
WIDTH = 1152
"""Features of all heads together, nearly, on CPU."""
CUDA_HEAD_COUNT = 24
PADDED = 0.75
"""Part of the keys that a padding mask leaves."""
THRESHOLD = 0.03
"""Of the block map of the sparse candidates."""
SEGMENTS = 4
"""Of the tokens of a sparse task."""
QUANTISED_BOUNDS = {"int8": 5e-2, "sparse": 2e-1, **{name: 2 * 10 ** (-r.sqnr / 20) for name, r in RECIPES.items()}}

Kind = Literal["dense", "padded", "sparse"]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""``[B, H, L, D]`` each, and a mask."""

# dense peaks of the data sheets, TFLOP/s, by what the products' operands are
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("H100(?! PCIe| NVL)|H200", {"bf16": 989.4, "fp16": 989.4, "int8": 1978.9, "fp8": 1978.9}),
    ("B200", {"bf16": 2250.0, "fp16": 2250.0, "int8": 4500.0, "fp8": 4500.0, "nvfp4": 9000.0}),
    ("RTX 5090", {"bf16": 209.5, "fp16": 209.5, "int8": 838.0, "fp8": 419.0, "nvfp4": 1676.0}),
)


@dataclass(frozen=True)
class Task:
    """One attention of batch 1: tokens of queries and of keys, heads, their features, and what is seen."""

    queries: int
    keys: int
    H: int
    D: int
    kind: Kind = "dense"

    def __str__(self) -> str:
        tokens = f"{self.queries} tokens" if self.queries == self.keys else f"{self.queries} of {self.keys} tokens"
        return f"{tokens}, {self.H} heads of {self.D}, {self.kind}"

    @property
    def flops(self) -> float:
        """Of both products, nothing left out."""
        return 4.0 * self.queries * self.keys * self.H * self.D


@dataclass(frozen=True)
class Entrant:
    """A way to attend.

    Attributes:
        name: in tables.
        dtype: of the operands.
        recipe: ``native``, ``int8`` (the CPU's op) or one of the recipes.
        formats: of the operands of the two products, which set the ceiling.
        attend: does it.
        bound: largest relative error with which it gets a number.
        around: entered around compilation and every call.
        skip: why it does not run here.
    """

    name: str
    dtype: torch.dtype
    recipe: str
    formats: tuple[str, str]
    attend: Attend
    bound: float
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    skip: str | None = None


def tasks(device: torch.device, tokens: Sequence[int], heads: Sequence[int]) -> list[Task]:
    """The grid: on CPU each size dense, with a padding mask and with a block map, on CUDA dense."""
    if device.type == "cuda":
        sizes = [(L, D) for D in heads or CUDA_HEADS for L in tokens or CUDA_TOKENS]
        return [Task(L, L, CUDA_HEAD_COUNT, D) for L, D in sizes]
    sizes = [(L, D) for D in heads or CPU_HEADS for L in tokens or CPU_TOKENS]
    kinds: tuple[Kind, ...] = ("dense", "padded", "sparse")
    return [Task(L, L, max(1, round(WIDTH / D)), D, kind) for kind in kinds for L, D in sizes]


def entrants(device: torch.device, kind: Kind) -> list[Entrant]:
    """Who takes part; torch's own first."""
    return _cuda_entrants() if device.type == "cuda" else _cpu_entrants(kind)


def _cpu_entrants(kind: Kind) -> list[Entrant]:
    fp32, bf16, reason = torch.float32, torch.bfloat16, attention_reason()
    own, bound = ("int8, sparse", "sparse") if kind == "sparse" else ("int8", "int8")
    attend, formats = _int8_sparse if kind == "sparse" else _int8, ("int8", "int8")
    allowed = QUANTISED_BOUNDS[bound]
    return [
        Entrant("SDPA fp32", fp32, "native", ("fp32", "fp32"), _native, 1e-4),
        Entrant(
            "SDPA fp32, oneDNN", fp32, "native", ("fp32", "fp32"), _native, 1e-4, fp32_matmul, fp32_matmul_reason()
        ),
        Entrant("SDPA bf16", bf16, "native", ("bf16", "bf16"), _native, 3e-2),
        Entrant(f"ditc {own} over fp32", fp32, "int8", formats, attend, allowed, skip=reason),
        Entrant(f"ditc {own} over bf16", bf16, "int8", formats, attend, allowed + 1e-2, skip=reason),
    ]


def _cuda_entrants() -> list[Entrant]:
    bf16 = torch.bfloat16
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    field = [
        Entrant(f"SDPA bf16, {name}", bf16, "native", ("bf16", "bf16"), _native, 3e-2, partial(sdpa_kernel, backend))
        for name, backend in backends.items()
    ]
    return field + [
        Entrant(f"ditc {name}", bf16, name, (r.qk, r.pv), partial(_quantised, name), QUANTISED_BOUNDS[name])
        for name, r in RECIPES.items()
    ]


def _native(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


def _int8(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return attention_int8(q, k, v, q.shape[-1] ** -0.5, mask)


def _int8_sparse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return attention_int8(q, k, v, scale, mask, blocks=attention_blocks(q, k, scale, THRESHOLD))


def _quantised(recipe: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    parts = quantize_operands(q, k, v, RECIPES[recipe])
    y: Tensor = attention_quantized(
        parts.q, parts.k, parts.v, recipe, q.shape[-1] ** -0.5, q.dtype, parts.bias, mask, False, None, -1
    )
    return y


def operands(task: Task, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
    """Float32 ``[1, L, H, D]`` of each of q, k and v, and the mask.

    Sparse tasks have tokens that come in :data:`SEGMENTS` segments of resembling ones, so that a query's weight lies in
    its own segment; else all are independent Gaussians.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, L, task.H, task.D, generator=generator) for L in (task.queries, task.keys, task.keys))
    if task.kind == "sparse":
        coarse = torch.randn(1, SEGMENTS, task.H, task.D, generator=generator)
        slow = coarse.repeat_interleave(-(-task.keys // SEGMENTS), 1)[:, : task.keys]
        q, k = slow + 0.5 * q, slow + 0.5 * k
    mask = torch.arange(task.keys).view(1, 1, 1, -1) < round(PADDED * task.keys) if task.kind == "padded" else None
    return [t.to(device) for t in (q, k, v)], None if mask is None else mask.to(device)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Float64 attention of ``[1, L, H, D]``, as ``[1, L, H * D]``; a head and some queries at a time."""
    _, L, H, D = q.shape
    out = q.new_empty((1, L, H, D), dtype=torch.float64)
    chunk = max(1, 2**25 // k.shape[1])
    for head in range(H):
        keys, values = k[0, :, head].double(), v[0, :, head].double()
        for begin in range(0, L, chunk):
            scores = q[0, begin : begin + chunk, head].double() @ keys.T * D**-0.5
            if mask is not None:
                scores.masked_fill_(~mask[0, 0], -math.inf)
            out[0, begin : begin + chunk, head] = scores.softmax(-1) @ values
    return out.flatten(2)


def measure_task(task: Task, field: Sequence[Entrant], device: torch.device, *, rounds: int, clock: Clock) -> Measured:
    """The entrants' results for one attention."""
    torch._dynamo.reset()
    inputs, mask = operands(task, device)

    def prepare(entrant: Entrant) -> Call:
        own = [t.to(entrant.dtype) for t in inputs]
        compiled = torch.compile(_between_linears(entrant.attend), backend=_backend(device), fullgraph=True)

        def call(_: int) -> Tensor:
            with torch.no_grad(), entrant.around():
                output: Tensor = compiled(*own, mask)
            return output

        return call

    kept = 1.0
    if task.kind == "sparse":
        q, k, _ = (t.transpose(1, 2) for t in inputs)
        kept = float(attention_blocks(q, k, task.D**-0.5, THRESHOLD).float().mean())
    candidates = [Candidate(e.name, partial(prepare, e), e.bound, e.skip) for e in field]
    results = measure(candidates, [exact(*inputs, mask)], rounds=rounds, clock=clock)
    return Measured(task, kept, tuple(field), tuple(results))


def _between_linears(attend: Attend) -> Attend:
    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attend(*(t.transpose(1, 2) for t in (q, k, v)), mask).transpose(1, 2).flatten(2)

    return function


def _backend(device: torch.device) -> Callable[[fx.GraphModule, list[Any]], Any]:
    """Inductor with what takes ``ditc::quantize`` apart; a new function, as Dynamo shares graphs of equal ones."""
    table = {**select_decomp_table(), **quantize_ops.lowerings(device)}

    def compile_graph(graph: fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_fx(graph, example_inputs, decompositions=table)

    return compile_graph


@dataclass(frozen=True)
class Measured:
    """The results of one task, in the order of its entrants; ``kept`` is the part of its blocks that is looked at."""

    task: Task
    kept: float
    entrants: tuple[Entrant, ...]
    results: tuple[Result, ...]

    def best(self, *, native: bool) -> str | None:
        """The fastest entrant that is torch's own, or that is not."""
        return best(self.results, [e.name for e in self.entrants if (e.recipe == "native") == native])

    def gain(self) -> Spread | None:
        """How many times faster the fastest of ours is than the fastest of torch's, round by round."""
        ours, theirs = self.best(native=False), self.best(native=True)
        return None if ours is None or theirs is None else ratios(self.results, theirs)[ours]


def ceiling(gpu: str | None, formats: tuple[str, str]) -> float | None:
    """FLOP/s of the data sheet for two products of equal size in two formats; ``None`` where it is not known."""
    for pattern, peaks in _PEAKS:
        if gpu is not None and re.search(pattern, gpu):
            # what the tensor cores cannot multiply is decoded to float16
            first, second = (peaks.get(name, peaks["fp16"]) for name in formats)
            return 2e12 / (1 / first + 1 / second)
    return None


def detail(measured: Measured, gpu: str | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each entrant."""
    theirs = measured.best(native=True)
    header, body = rows(measured.results, [] if theirs is None else [theirs])
    lines = []
    for line, entrant, result in zip(body, measured.entrants, measured.results, strict=True):
        rate = None if result.seconds is None else measured.task.flops / result.seconds.median
        top = ceiling(gpu, entrant.formats)
        share = "" if rate is None or top is None else f"{100 * rate / top:.0f} %"
        lines.append((*line, _sqnr(result), "" if rate is None else f"{rate / 1e12:.3g}", share))
    return (*header, "SQNR dB", "TFLOP/s", "of the ceiling"), lines


def summary(all_measured: Sequence[Measured]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A line for each task: the best of torch's, the best of ours, and how many times faster that is."""
    body = []
    for one in all_measured:
        found = {result.name: result for result in one.results}
        ours, theirs, gain = one.best(native=False), one.best(native=True), one.gain()
        cells = [f"{name}: {_milliseconds(found[name])}" if name else "no number" for name in (theirs, ours)]
        ratio = "" if gain is None else f"{gain.median:.2f} ({gain.low:.2f} – {gain.high:.2f})"
        sqnr = "" if ours is None else _sqnr(found[ours])
        body.append((_title(one), *cells, ratio, sqnr))
    return ("attention", "best SDPA, ms", "best ditc, ms", "x (quartiles)", "SQNR dB"), body


def _title(measured: Measured) -> str:
    kept = f", {100 * measured.kept:.0f} % of blocks kept" if measured.task.kind == "sparse" else ""
    return f"{measured.task}{kept}"


def _milliseconds(result: Result) -> str:
    return "" if result.seconds is None else f"{1e3 * result.seconds.median:.4g}"


def _sqnr(result: Result) -> str:
    return "" if not result.error else f"{-20 * math.log10(result.error):.1f}"


def rounds_of(task: Task, rounds: int) -> int:
    """Fewer where a round takes seconds."""
    return rounds if task.flops < 2e10 else max(1, min(rounds, max(3, rounds // 3)))


def run(
    device: torch.device,
    *,
    rounds: int,
    clock: Clock,
    tokens: Sequence[int] = (),
    heads: Sequence[int] = (),
    save: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the grid and returns the document; writes it when ``save`` is set.

    Args:
        device: where to measure.
        rounds: timed calls per candidate; on CPU a third of them for the largest.
        clock: see :func:`ditc.bench.harness.timer`.
        tokens: lengths instead of the grid's.
        heads: head sizes instead of the grid's.
        save: write JSON and Markdown.
        progress: is told what happens.
    """
    document: dict[str, Any] = {**describe(device), "clock": clock, "rounds": rounds}
    gpu, done, parts = document["hardware"].get("gpu"), list[Measured](), list[str]()
    for task in tasks(device, tokens, heads):
        own_rounds = rounds if device.type == "cuda" else rounds_of(task, rounds)
        one = measure_task(task, entrants(device, task.kind), device, rounds=own_rounds, clock=clock)
        done.append(one)
        show(_title(one), *detail(one, gpu))
        parts.append(f"## {_title(one)}\n\n{markdown(*detail(one, gpu))}\n")
    document["tasks"] = [
        {
            "queries": one.task.queries, "keys": one.task.keys, "heads": one.task.H, "features": one.task.D,
            "kind": one.task.kind, "kept": one.kept, "results": to_json(one.results),
        }
        for one in done
    ]  # fmt: skip
    show(SUITE, *summary(done))
    if save:
        text = [
            preamble(SUITE, document),
            f"Batch 1; padded: {PADDED:.0%} of the keys are seen; sparse: torch's own looks at all blocks, and rates "
            "count all of them. SQNR is against float64 attention of all keys that are seen.\n",
            markdown(*summary(done)) + "\n",
            *parts,
        ]
        progress(f"written: {', '.join(str(path) for path in write(SUITE, document, chr(10).join(text)))}")
    return document
