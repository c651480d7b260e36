"""Compiles C++ kernels on first use, and keeps the library for later processes."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_SOURCES = (Path(__file__).parent / "ops.cpp", Path(__file__).parent / "kernel.h")
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma", "f16c")
# no contraction: products and sums are rounded one by one, as the reference rounds them
_OPTIONS = ("-O3", "-std=c++20", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-w")
_TIMEOUT_S = 300


@functools.cache
def vnni_reason() -> str | None:
    """Why the AVX512-VNNI kernels cannot run here; ``None`` when they can, and then their ops are loaded.

    The first call of a machine compiles them (seconds) into inductor's cache folder; later ones load the library.
    """
    return load_reason(_SOURCES)


def load_reason(sources: tuple[Path, ...]) -> str | None:
    """Compiles the first of ``sources``, unless it was before, and loads it; why not, or ``None``.

    The others are the headers of ours that it includes: a library is compiled anew when any of them changes.
    """
    reason = _machine_reason()
    if reason is not None:
        return reason
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler: neither $CXX nor g++, clang++ or c++ is there"
    library = _library(compiler, sources)
    if not library.exists():
        reason = _compile(compiler, sources[0], library)
        if reason is not None:
            return reason
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled library does not load: {error}"
    return None


def _machine_reason() -> str | None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the VNNI kernels are for Linux on x86_64, this is {platform.system()} on {platform.machine()}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    missing = [flag for flag in _CPU_FLAGS if flag not in flags]
    return f"the CPU lacks {', '.join(missing)}" if missing else None


def _compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def _library(compiler: str, sources: tuple[Path, ...]) -> Path:
    """Where the library of these sources, options, compiler and torch lies."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    parts = [*_command(compiler, sources[0], Path()), torch.__version__]
    parts += [source.read_text(encoding="utf-8") for source in sources]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return Path(cache_dir()) / "ditc" / f"vnni-{digest}.so"


def _command(compiler: str, source: Path, output: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    target = [f"-m{flag.replace('_', '')}" for flag in _CPU_FLAGS]
    headers = [f"-I{path}" for path in include_paths()]
    libraries = [f"-L{path}" for path in library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [
        compiler,
        *_OPTIONS,
        *target,
        abi,
        *headers,
        str(source),
        "-o",
        str(output),
        *libraries,
        "-ltorch_cpu",
        "-lc10",
    ]


def _compile(compiler: str, source: Path, library: Path) -> str | None:
    """Compiles to ``library``, which appears whole or not at all; the reason why not."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            output = Path(folder) / library.name
            command = _command(compiler, source, output)
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_TIMEOUT_S)
            if done.returncode != 0:
                errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                return f"{compiler} failed: {errors[0] if errors else f'exit status {done.returncode}'}"
            output.replace(library)
    except OSError as error:
        return f"cannot write {library}: {error}"
    except subprocess.TimeoutExpired:
        return f"{compiler} took more than {_TIMEOUT_S} s"
    return None
