"""Who takes part in the step benchmark: eager and inductor, bfloat16, torchao, ditc."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditc.kernels.matmul import fp32_matmul, fp32_matmul_reason

from .harness import Call, Candidate

Dtype = Literal["fp32", "bf16"]

FP32_BOUND = 1e-4
BF16_BOUND = 3e-2
INT8_BOUND = 6e-2
"""Relative error of a step beyond which a candidate gets no number. An INT8 linear is off by about one per cent and
the errors of a stack of blocks add up; a broken scale or layout is off by tens of per cent."""

EAGER, INDUCTOR, ONEDNN = "eager fp32", "inductor fp32", "inductor fp32, oneDNN"
BF16, BF16_FROZEN = "inductor bf16", "inductor bf16, frozen"
AO, AO_FROZEN, AO_BF16, AO_BF16_FROZEN = (
    f"torchao int8 over {d}" for d in ("fp32", "fp32, frozen", "bf16", "bf16, frozen")
)
DITC, DITC_ONEDNN, DITC_BF16 = (f"ditc int8 over {d}" for d in ("fp32", "fp32, oneDNN", "bf16"))
PEERS = (BF16, BF16_FROZEN, AO, AO_FROZEN, AO_BF16, AO_BF16_FROZEN)
"""Against the best of these ditc's goal is set."""
DITCS = (DITC, DITC_ONEDNN, DITC_BF16)

# what torchao's configuration sets for the whole process when asked to; here for its own compilations only
_TORCHAO_INDUCTOR = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
}


def candidates(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> list[Candidate]:
    """Every candidate, for a float32 ``model`` and its inputs; those that make no sense here say why they skip."""
    device = inputs[0].device
    gpu = device.type == "cuda"
    no_onednn = "oneDNN is a CPU library" if gpu else fp32_matmul_reason()
    no_freezing = "freezing is measured on CPU, where it packs weights for oneDNN" if gpu else None
    no_torchao = _missing("torchao")

    def plain(dtype: Dtype) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        if dtype == "fp32":
            return copy.deepcopy(model), inputs
        return copy.deepcopy(model).bfloat16(), (inputs[0].bfloat16(), inputs[1])

    def eager() -> Call:
        return lambda: _run(model, inputs)

    def inductor(dtype: Dtype, *, frozen: bool = False, region: bool = False) -> Callable[[], Call]:
        return lambda: _compiled(*plain(dtype), frozen=frozen, region=region)

    def torchao(dtype: Dtype, *, frozen: bool) -> Callable[[], Call]:
        def prepare() -> Call:
            own, own_inputs = plain(dtype)
            _quantize_with_torchao(own)
            return _compiled(own, own_inputs, frozen=frozen, patch=_TORCHAO_INDUCTOR)

        return prepare

    def ditc(dtype: Dtype, plan: dict[str, Any]) -> Callable[[], Call]:
        return lambda: _compiled(*plain(dtype), backend="ditc", options=plan)

    default, onednn = {"quantize": "int8"}, {"quantize": "int8", "fp32_matmul": "onednn"}
    return [
        Candidate(EAGER, eager, FP32_BOUND),
        Candidate(INDUCTOR, inductor("fp32"), FP32_BOUND),
        Candidate(ONEDNN, inductor("fp32", region=True), FP32_BOUND, skip=no_onednn),
        Candidate(BF16, inductor("bf16"), BF16_BOUND),
        Candidate(BF16_FROZEN, inductor("bf16", frozen=True), BF16_BOUND, skip=no_freezing),
        Candidate(AO, torchao("fp32", frozen=False), INT8_BOUND, skip=no_torchao),
        Candidate(AO_FROZEN, torchao("fp32", frozen=True), INT8_BOUND, skip=no_torchao or no_freezing),
        Candidate(AO_BF16, torchao("bf16", frozen=False), INT8_BOUND, skip=no_torchao),
        Candidate(AO_BF16_FROZEN, torchao("bf16", frozen=True), INT8_BOUND, skip=no_torchao or no_freezing),
        Candidate(DITC, ditc("fp32", default), INT8_BOUND, plan=default),
        Candidate(DITC_ONEDNN, ditc("fp32", onednn), INT8_BOUND, skip=no_onednn, plan=onednn),
        Candidate(DITC_BF16, ditc("bf16", default), INT8_BOUND, plan=default),
    ]


def _missing(package: str) -> str | None:
    from importlib.util import find_spec

    return None if find_spec(package) else f"{package} is not installed"


def _run(model: Callable[..., Any], inputs: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(*inputs)
    return output


def _quantize_with_torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def _compiled(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor],
    *,
    frozen: bool = False,
    region: bool = False,
    backend: str = "inductor",
    options: dict[str, Any] | None = None,
    patch: dict[str, Any] | None = None,
) -> Call:
    """Compiles on a first call and returns the call to be timed.

    ``region`` runs each call where float32 products go to oneDNN; ``patch`` and freezing hold while compiling only.

    Raises:
        RuntimeError: freezing was asked for and did not happen.
    """
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True, dynamic=False)
    with torch._inductor.config.patch({"freezing": frozen, **(patch or {})}), _count_freezing() as frozen_graphs:
        _run(compiled, inputs)
    if frozen and not frozen_graphs:
        raise RuntimeError("freezing was asked for and inductor froze nothing")

    def call() -> Tensor:
        around: AbstractContextManager[None] = fp32_matmul() if region else nullcontext()
        with around:
            return _run(compiled, inputs)

    return call


@contextmanager
def _count_freezing() -> Iterator[list[str]]:
    """Sees each time inductor freezes a graph: ``options={"freezing": True}`` is ignored without a word.

    Compiled graphs come fresh here, because a graph from inductor's cache would not be frozen again.
    """
    from torch._inductor import freezing

    freeze, seen = freezing.freeze, list[str]()

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append("frozen")
        return freeze(*args, **kwargs)

    freezing.freeze = spy
    try:
        with torch._inductor.config.patch({"force_disable_caches": True}):
            yield seen
    finally:
        freezing.freeze = freeze
