"""Where the time of a step goes, and how fast the machine multiplies integers at best."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ditc.bench.harness import Clock, timer

from .candidates import own_backend, run_step

CATEGORIES = (
    "integer GEMM",
    "integer GEMM with all that surrounds it (VNNI)",
    "attention",
    "other linears (conditioning, embedding, head)",
    "norm, modulation, residual, with quantise and scale fused in",
    "activation, with quantise and scale fused in",
    "scale, bias and layout",
    "quantise alone",
    "other pointwise",
    "overhead (launches, Python, guards)",
)
_GEMM, _VNNI, _ATTENTION, _LINEAR, _NORM, _ACTIVATION, _SCALE, _QUANTISE, _POINTWISE, _OVERHEAD = CATEGORIES

# (M, K, N) beyond every cache, of the shapes that linears of transformers have
_CEILING_SHAPES = ((1024, 1152, 4608), (1024, 4608, 1152), (2048, 2048, 2048), (4096, 4096, 4096))


def ceiling(device: torch.device, clock: Clock, repeats: int = 5) -> dict[str, float]:
    """The best rate in 10**9 operations (two per multiply-add) a second of each way to multiply, over large shapes."""
    seconds_of, found = timer(clock), dict[str, float]()
    shapes = _CEILING_SHAPES if device.type == "cuda" else _CEILING_SHAPES[:3]
    for M, K, N in shapes:
        for name, product in _products(device, M, K, N).items():
            for _ in range(2):
                product()
            fastest = min(seconds_of(product) for _ in range(repeats))
            found[name] = max(found.get(name, 0.0), 2 * M * N * K / fastest / 1e9)
    return {name: round(rate, 1) for name, rate in found.items()}


def _products(device: torch.device, M: int, K: int, N: int) -> dict[str, Callable[[], Tensor]]:
    a, b = torch.randn(M, K, device=device), torch.randn(N, K, device=device)
    qa = torch.randint(-127, 128, (M, K), dtype=torch.int8, device=device)
    qb = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device)
    a16, b16 = a.bfloat16(), b.bfloat16()
    found: dict[str, Callable[[], Tensor]] = {
        "int8 _int_mm": lambda: torch._int_mm(qa, qb.t()),
        "bf16": lambda: a16 @ b16.t(),
        "fp32": lambda: a @ b.t(),
    }
    if device.type == "cpu" and hasattr(torch.ops.onednn, "qlinear_prepack"):
        ops, u8 = torch.ops.onednn, (qa.to(torch.int16) + 128).to(torch.uint8)
        weight = ops.qlinear_prepack(qb, [M, K])
        scales, zeros = torch.ones(N), torch.zeros(N, dtype=torch.int32)
        found["int8 qlinear u8 x s8"] = lambda: ops.qlinear_pointwise(
            u8, 1.0, 128, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    return found


def category(name: str) -> str | None:
    """The category of a profiled kernel or operator; ``None`` for what only calls others."""
    low = name.lower()
    if "vnni_weight_linear" in low:
        return _LINEAR
    if "ditc::vnni" in low:
        return _VNNI
    if "ditc::attention" in low:
        return _ATTENTION
    if "_int_mm" in low or "s8s8" in low or "i8816" in low or "imma" in low:
        return _GEMM
    if "scaled_dot_product" in low and "cpp_fused" not in low and "triton" not in low:
        return _ATTENTION
    if any(part in low for part in ("flash", "fmha")) and "cpp_fused" not in low and "triton" not in low:
        return _ATTENTION
    if "cpp_fused" in low or low.startswith("triton_"):
        return _fused(low)
    if any(
        part in low for part in ("addmm", "aten::mm", "aten::bmm", "linear_pointwise", "convolution", "gemm", "nvjet")
    ):
        return _LINEAR
    return None


def _fused(name: str) -> str:
    if "layer_norm" in name or "rms_norm" in name or "var_mean" in name:
        return _NORM
    if "activation_quantize" in name:
        return _ACTIVATION
    if "norm_quantize" in name:
        return _NORM
    if "quantize" in name and "quantized_linear" not in name:
        return _QUANTISE
    if "quantized_linear" in name or "weight_linear" in name:
        return _SCALE
    return _POINTWISE


def step_breakdown(
    model: nn.Module, latent: Tensor, timesteps: Sequence[Tensor], plan: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Milliseconds per step and category of ditc's compiled model, from the profiler.

    The model is compiled once more with a mark on each of inductor's CPU kernels, so the sum differs a little from
    the step measured; ``step_ms`` is the wall time of the same calls.
    """
    own, device = copy.deepcopy(model), latent.device
    patch = {"cpp.enable_kernel_profile": True} if device.type == "cpu" else {}
    with torch._inductor.config.patch(patch):
        compiled = torch.compile(own, backend=own_backend("ditc", plan), fullgraph=True, dynamic=False)
        for step in range(3):
            run_step(compiled, latent, timesteps, step)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        walls = []
        with profile(activities=activities) as profiler:
            for step in range(3, 3 + repeats):
                start = time.perf_counter()
                run_step(compiled, latent, timesteps, step)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                walls.append((time.perf_counter() - start) * 1e3)
    found, kernels = classify(profiler.events(), device, repeats)
    step_ms = statistics.mean(walls)
    found[_OVERHEAD] = step_ms - sum(found.values())
    parts = {name: round(found[name], 3) for name in CATEGORIES if name in found}
    return {"plan": plan, "step_ms": round(step_ms, 3), "parts_ms": parts, "largest_ms": kernels}


def classify(events: Iterable[Any], device: torch.device, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Sums the self times of profiled events by category (ms per step), and names the ten largest."""
    gpu = device.type == "cuda"
    total, single = dict[str, float](), dict[str, float]()
    for event in events:
        kind = category(event.name)
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        if kind is None or (gpu and event.device_type.name == "CPU"):
            continue
        total[kind] = total.get(kind, 0.0) + own / 1e3 / repeats
        single[event.name] = single.get(event.name, 0.0) + own / 1e3 / repeats
    largest = sorted(single.items(), key=lambda item: -item[1])[:10]
    return total, {name: round(ms, 3) for name, ms in largest}
