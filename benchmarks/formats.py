"""Suite: the trained demo model in every format at equal seeds: quality, bytes and speed in one table.

Beside ditc's plans run torchao and modelopt with the same formats on the same linears. PSNR and SSIM are against eager
fp32; accuracy and Fréchet distance are of the clips themselves.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ditc
from ditc.examples.digits.demo import DemoResult, Row, run_demo
from ditc.examples.digits.evaluate import GUIDANCE, STEPS, denoiser_of, draw_clips
from ditc.examples.digits.model import load_transformer
from ditc.examples.digits.stages import Candidate

from .environment import describe
from .report import markdown, preamble, write

SUITE = "formats"
REFERENCE = "eager fp32"
_BLOCK_LINEAR = re.compile(r"blocks\.\d+\.(attn1|attn2|ffn)\.")
CALIBRATION_SEED = 10_000
"""Far from the seeds that are measured."""


def calibrate(folder: Path, steps: int) -> Path:
    """Calibrates the demo's model on one clip of each digit, with the sampler and guidance of the measurement."""
    model = load_transformer()

    def run(transformer: nn.Module) -> None:
        digits = torch.arange(10)
        seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + len(digits))
        draw_clips(denoiser_of(transformer), digits, seeds, steps=steps, guidance=GUIDANCE)

    path = folder / "digits.calibration.safetensors"
    ditc.calibrate(model, run).save(path)
    return path


def plans(calibration: Path) -> dict[str, dict[str, Any]]:
    """ditc's entrants by name."""
    static = {"activations": "static", "calibration": str(calibration)}
    found: dict[str, dict[str, Any]] = {}
    for format in ("int8", "fp8", "mxfp8", "nvfp4", "mxfp4"):
        found[f"ditc {format}"] = {"quantize": format}
    for format in ("int8", "fp8", "nvfp4"):
        found[f"ditc {format} static"] = {"quantize": format, **static}
    found["ditc nvfp4 weight-only"] = {"quantize": "nvfp4", "activations": "none"}
    found["ditc nvfp4 + rank 16"] = {"quantize": "nvfp4", "lowrank": 16, "calibration": str(calibration)}
    found["ditc nvfp4, first 4 steps precise"] = {"quantize": "nvfp4", "precise_first": 4}
    found["ditc auto"] = {"quantize": "auto", "calibration": str(calibration)}
    return found


def peers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """torchao and modelopt, eagerly, on the linears that ditc takes: what matters of them here is the quality."""
    return {
        "torchao int8": _torchao_int8,
        "torchao mxfp8, emulated": lambda model: _torchao_mx(model, "mxfp8"),
        "torchao mxfp4, emulated": lambda model: _torchao_mx(model, "mxfp4"),
        "modelopt fp8 (static)": lambda model: _modelopt(model, "FP8_DEFAULT_CFG"),
        "modelopt int8 (static)": lambda model: _modelopt(model, "INT8_DEFAULT_CFG"),
    }


def is_block_linear(module: nn.Module, name: str) -> bool:
    """Whether the module called ``name`` is one of the linears that ditc's plans quantise in the demo's model."""
    return isinstance(module, nn.Linear) and _BLOCK_LINEAR.search(name) is not None


def _torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), filter_fn=is_block_linear)
    return model


def _torchao_mx(model: nn.Module, format: str) -> nn.Module:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    dtype = torch.float8_e4m3fn if format == "mxfp8" else torch.float4_e2m1fn_x2
    configuration = MXDynamicActivationMXWeightConfig(
        activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference.EMULATED
    )
    quantize_(model, configuration, filter_fn=is_block_linear)
    return model


def _modelopt(model: nn.Module, name: str) -> nn.Module:
    import modelopt.torch.quantization as mtq

    def run(transformer: nn.Module) -> None:
        digits = torch.arange(10)
        seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + len(digits))
        draw_clips(denoiser_of(transformer), digits, seeds, steps=STEPS, guidance=GUIDANCE)

    quantized: nn.Module = mtq.quantize(model, copy.deepcopy(getattr(mtq, name)), run)
    for path, module in quantized.named_modules():
        if hasattr(module, "weight_quantizer") and _BLOCK_LINEAR.search(f"{path}.") is None:
            module.weight_quantizer.disable()
            module.input_quantizer.disable()
    return quantized


def run(device: torch.device, *, clips_per_digit: int, only: Sequence[str] = (), save: bool = True) -> dict[str, Any]:
    """Measures every entrant and prints the table.

    Args:
        device: must be the one that the demo takes: CUDA where there is one.
        clips_per_digit: clips of each digit, by each entrant.
        only: parts of names of entrants; all when empty.
        save: write the files into ``benchmarks/results``.
    """
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        found = plans(calibrate(Path(folder), STEPS))
        drift = _drift(Path(folder))
        compiled: dict[str, nn.Module] = {}
        entrants = [Candidate(REFERENCE, lambda model: model)]
        for name, plan in found.items():
            if not only or any(part in name for part in only):
                entrants.append(Candidate(name, _compile(name, plan, compiled)))
        for name, prepare in peers().items():
            if only and not any(part in name for part in only):
                continue
            reason = _why_not(prepare)
            if reason is None:
                entrants.append(Candidate(name, prepare))
            else:
                skipped[name] = reason
        # every entrant compiles the same forward anew, which Dynamo would take for a model that keeps recompiling
        with torch._dynamo.config.patch(recompile_limit=128):
            result = run_demo(clips_per_digit=clips_per_digit, entrants=entrants)
    document, text = _report(device, result, found, compiled, skipped, drift, clips_per_digit)
    print(text)
    if save:
        print(f"written: {', '.join(str(path) for path in write(SUITE, document, text))}")
    return document


def _compile(name: str, plan: dict[str, Any], compiled: dict[str, nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        compiled[name] = ditc.compile(model, plan)
        return compiled[name]

    return prepare


def _why_not(prepare: Callable[[nn.Module], nn.Module]) -> str | None:
    """Runs a peer once: libraries refuse formats on machines without the hardware in ways of their own."""
    model = load_transformer()
    try:
        quantized = prepare(model)
        draw_clips(denoiser_of(quantized), torch.arange(1), range(1), steps=1, guidance=1.0)
    except Exception as error:  # noqa: BLE001 - whatever another library raises is the reason that is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
    return None


def _drift(folder: Path) -> tuple[float, float]:
    """Median and largest ratio of a linear's ranges over the steps of a generation."""
    calibration = ditc.Calibration.load(folder / "digits.calibration.safetensors")
    ratios = sorted(calibration.drift(name) for name in calibration.records)
    return ratios[len(ratios) // 2], ratios[-1]


def _bytes(module: nn.Module | None) -> tuple[int, int] | None:
    """Bytes of the packed linears, and of the weights that they stand for."""
    if module is None:
        return None
    programs = ditc.stats(module).programs
    return sum(p.memory.packed for p in programs), sum(p.memory.originals for p in programs)


def _report(
    device: torch.device,
    result: DemoResult,
    found: dict[str, dict[str, Any]],
    compiled: dict[str, nn.Module],
    skipped: dict[str, str],
    drift: tuple[float, float],
    clips_per_digit: int,
) -> tuple[dict[str, Any], str]:
    document: dict[str, Any] = {**describe(device), "clips": 10 * clips_per_digit, "steps": STEPS, "drift": drift}
    document["skipped"] = skipped
    document["entrants"] = []
    header = ("", "PSNR dB", "SSIM", "accuracy %", "Fréchet", "x eager", "weights MB", "of fp32")
    body = []
    for row in result.rows:
        size = _bytes(compiled.get(row.name))
        document["entrants"].append(_data(row, found.get(row.name), size))
        body.append(_cells(row, size))
    held_out = result.held_out
    body.append(("held-out data", "", "", f"{100 * held_out.accuracy:.0f}", f"{held_out.frechet:.2f}", "", "", ""))
    lines = [
        preamble(SUITE, document),
        f"Demo model, {STEPS} steps, guidance {GUIDANCE:g}, {10 * clips_per_digit} clips at equal seeds.",
        "Speed: this machine has arithmetic for int8 alone; the other formats are decoded at every call here.",
        f"Ranges of inputs over a generation: largest by smallest step {drift[0]:.2f} (median linear), "
        f"{drift[1]:.2f} (worst).",
        "",
        markdown(header, body),
        "",
        *(f"- {name}: no number, {reason}" for name, reason in skipped.items()),
    ]
    return document, "\n".join(lines)


def _data(row: Row, plan: dict[str, Any] | None, size: tuple[int, int] | None) -> dict[str, Any]:
    shown = {key: value for key, value in (plan or {}).items() if key != "calibration"}
    return {
        "name": row.name, "plan": shown, "psnr": row.psnr, "ssim": row.ssim, "accuracy": row.quality.accuracy,
        "frechet": row.quality.frechet, "speed_up": row.speed_up, "seconds_per_clip": row.seconds_per_clip,
        "packed_bytes": size[0] if size else None, "original_bytes": size[1] if size else None,
    }  # fmt: skip


def _cells(row: Row, size: tuple[int, int] | None) -> tuple[str, ...]:
    quality = row.quality
    return (
        row.name,
        "" if row.psnr is None else f"{row.psnr:.1f}",
        "" if row.ssim is None else f"{row.ssim:.4f}",
        f"{100 * quality.accuracy:.0f}",
        f"{quality.frechet:.2f}",
        f"{row.speed_up:.2f}",
        "" if not size or not size[1] else f"{size[0] / 1e6:.2f}",
        "" if not size or not size[1] else f"{size[0] / size[1]:.2f}",
    )
