"""What ran where: hardware, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)


def pick_device(wanted: str | None = None) -> torch.device:
    """``wanted``, or the first CUDA device where there is one, else the CPU."""
    if wanted is not None:
        return torch.device(wanted)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, as JSON holds them."""
    return {"hardware": hardware(device), "versions": versions(), "commit": commit()}


def hardware(device: torch.device) -> dict[str, Any]:
    """The processor with the instruction sets that matter, cores and threads, and the accelerator if one is used."""
    model, family, flags = _cpu()
    found: dict[str, Any] = {
        "cpu": model,
        "cpu_family": family,
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "os": platform.system(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_capability"] = f"sm_{properties.major}{properties.minor}"
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def hardware_slug(found: dict[str, Any]) -> str:
    """A short name of the hardware for file names, such as ``amd-epyc-2c`` or ``nvidia-h200``."""
    name = found["gpu"] if "gpu" in found else f"{found['cpu']}-{found['cores']}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu() -> tuple[str, str, set[str]]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), "", set()
    fields = dict(re.findall(r"^([^\t\n:]+)\t*: *(.*)$", info.read_text(), re.MULTILINE))
    family = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return fields.get("model name", platform.machine()), family, set(fields.get("flags", "").split())


def versions() -> dict[str, str]:
    """Versions of Python and of what takes part; ``absent`` for what is not installed."""
    found = {"python": platform.python_version()}
    for name in ("torch", "torchao", "triton", "ditc"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """The git commit, with ``+changes`` when tracked files differ from it; ``unknown`` outside a checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}+changes" if _git("status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
