"""The harness of the Triton kernels: what runs in the interpreter, what is only compiled, and golden numbers.

Triton interprets or compiles, one or the other in a process, as ``TRITON_INTERPRET`` says. So there are two markers:

- ``interpreter``: a property test that runs kernels, in the interpreter under ``TRITON_INTERPRET=1`` and on the
  device where there is CUDA;
- ``ptx``: compiles kernels for GPUs that need not be there, and looks at what came out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GOLDEN = Path(__file__).parents[2] / "golden" / "triton"
TRITON_MISSING = importlib.util.find_spec("triton") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _why_not(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not(item: pytest.Item) -> str | None:
    here = Path(__file__).parent in item.path.parents
    if not here:
        return None
    if TRITON_MISSING:
        return "needs triton: pip install 'ditc[triton]'"
    if item.get_closest_marker("ptx") is not None and INTERPRETED:
        return "compiles kernels: run in a process without TRITON_INTERPRET"
    if item.get_closest_marker("interpreter") is not None and not INTERPRETED and not torch.cuda.is_available():
        return "runs kernels without a GPU: run with TRITON_INTERPRET=1"
    return None


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run in this process: ``cpu`` in the interpreter, else ``cuda``."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(scope="module", autouse=True)
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` comes filled with NaN or the largest integer, so what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture: its PTX and what ptxas made of it."""

    ptx: str
    registers: int
    """Of each thread."""
    spills: int
    """Bytes of local memory of each thread; a Triton kernel has nothing else there."""
    shared: int
    """Bytes of shared memory of each program."""

    def numbers(self) -> dict[str, int]:
        """What the golden files hold."""
        return {"registers": self.registers, "spills": self.spills, "shared": self.shared}


@pytest.fixture(scope="session")
def compile_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """``compile_kernel(kernel, signature, constexprs, arch, num_warps=4, num_stages=None, ...)`` for ``sm_<arch>``.

    ``signature`` gives the type of each argument that is no constexpr, as ``"*fp32"`` or ``"i32"``, in any order;
    pointers are taken to be divisible by 16 bytes, and so are the integers named in ``divisible``.
    """
    folder = tmp_path_factory.mktemp("cubin")

    def compiled(
        kernel: Any,
        signature: Mapping[str, str],
        constexprs: Mapping[str, Any],
        arch: int,
        num_warps: int = 4,
        num_stages: int | None = None,
        divisible: tuple[str, ...] = (),
        fp_fusion: bool = True,
    ) -> Compiled:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource  # private: used here and nowhere else

        types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
        aligned = [name for name, kind in types.items() if kind.startswith("*") or name in divisible]
        attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        source = ASTSource(kernel, types, dict(constexprs), attrs)
        # the default of fusing a multiplication and an addition changes with Triton's version
        options = {"num_warps": num_warps, "enable_fp_fusion": fp_fusion}
        if num_stages is not None:
            options["num_stages"] = num_stages
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        cubin = folder / f"{built.hash}.cubin"
        cubin.write_bytes(built.asm["cubin"])
        registers, local = _resources(cubin)
        return Compiled(built.asm["ptx"], registers, local, built.metadata.shared)

    return compiled


def _resources(cubin: Path) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as the tool beside Triton's ptxas reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    run = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    usage = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


@pytest.fixture
def golden_numbers(
    request: pytest.FixtureRequest, golden: Callable[[str, str], None]
) -> Callable[[str, Mapping[str, Compiled]], None]:
    """``golden_numbers(name, {label: compiled})`` compares with ``tests/golden/triton/<name>-<Triton's version>.json``.

    Compilers differ from one version to the next, so each has its own file; ``pytest --accept`` writes it.
    A version that has none is skipped.
    """

    def check(name: str, kernels: Mapping[str, Compiled]) -> None:
        import triton

        version = ".".join(triton.__version__.split(".")[:2])
        known = (GOLDEN / f"{name}-{version}.json").exists()
        if not known and not request.config.getoption("--accept"):
            pytest.skip(f"no golden numbers for Triton {version}")
        lines = (f"  {json.dumps(label)}: {json.dumps(kernel.numbers())}" for label, kernel in kernels.items())
        golden(f"triton/{name}-{version}.json", "{\n" + ",\n".join(lines) + "\n}")

    return check
