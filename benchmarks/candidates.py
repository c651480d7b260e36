"""Who takes part in the step benchmark: eager and inductor, bfloat16, torchao, ditc."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditc.bench.harness import Call, Candidate
from ditc.kernels.attention import attention_reason
from ditc.kernels.matmul import fp32_matmul, fp32_matmul_reason

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
DITC_ATTENTION, DITC_ATTENTION_ONEDNN, DITC_ATTENTION_BF16 = (
    f"ditc int8 + attention over {d}" for d in ("fp32", "fp32, oneDNN", "bf16")
)
PEERS = (BF16, BF16_FROZEN, AO, AO_FROZEN, AO_BF16, AO_BF16_FROZEN)
"""Against the best of these ditc's goal is set."""
DITCS = (DITC, DITC_ONEDNN, DITC_BF16, DITC_ATTENTION, DITC_ATTENTION_ONEDNN, DITC_ATTENTION_BF16)

# what torchao's configuration sets for the whole process when asked to; here for its own compilations only
_TORCHAO_INDUCTOR = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
}


def candidates(model: nn.Module, latent: Tensor, timesteps: Sequence[Tensor]) -> list[Candidate]:
    """Every candidate, for a float32 ``model`` and its inputs; those that make no sense here say why they skip."""
    gpu = latent.is_cuda
    no_onednn = "oneDNN is a CPU library" if gpu else fp32_matmul_reason()
    no_freezing = "freezing is measured on CPU, where it packs weights for oneDNN" if gpu else None
    no_torchao = _missing("torchao")

    def plain(dtype: Dtype) -> tuple[nn.Module, Tensor, Sequence[Tensor]]:
        if dtype == "fp32":
            return copy.deepcopy(model), latent, timesteps
        return copy.deepcopy(model).bfloat16(), latent.bfloat16(), timesteps

    def eager() -> Call:
        return lambda step: run_step(model, latent, timesteps, step)

    def inductor(dtype: Dtype, *, frozen: bool = False, region: bool = False) -> Callable[[], Call]:
        return lambda: _compiled(*plain(dtype), frozen=frozen, region=region)

    def torchao(dtype: Dtype, *, frozen: bool) -> Callable[[], Call]:
        def prepare() -> Call:
            own = plain(dtype)
            _quantize_with_torchao(own[0])
            return _compiled(*own, frozen=frozen, patch=_TORCHAO_INDUCTOR)

        return prepare

    def ditc(dtype: Dtype, plan: dict[str, Any]) -> Callable[[], Call]:
        return lambda: _compiled(*plain(dtype), backend="ditc", options=plan)

    default, onednn = {"quantize": "int8"}, {"quantize": "int8", "fp32_matmul": "onednn"}
    attention, attention_onednn = default | {"attention": "int8"}, onednn | {"attention": "int8"}
    no_attention = "the INT8 attention kernel is for CPUs" if gpu else attention_reason()
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
        Candidate(DITC_ATTENTION, ditc("fp32", attention), INT8_BOUND, skip=no_attention, plan=attention),
        Candidate(
            DITC_ATTENTION_ONEDNN,
            ditc("fp32", attention_onednn),
            INT8_BOUND,
            skip=no_onednn or no_attention,
            plan=attention_onednn,
        ),
        Candidate(DITC_ATTENTION_BF16, ditc("bf16", attention), INT8_BOUND, skip=no_attention, plan=attention),
    ]


def _missing(package: str) -> str | None:
    from importlib.util import find_spec

    return None if find_spec(package) else f"{package} is not installed"


def run_step(model: Callable[..., Any], latent: Tensor, timesteps: Sequence[Tensor], step: int) -> Tensor:
    """One step of a generation; after the last timestep the next generation begins."""
    with torch.no_grad():
        output: Tensor = model(latent, timesteps[step % len(timesteps)])
    return output


def _quantize_with_torchao(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def _compiled(
    model: nn.Module,
    latent: Tensor,
    timesteps: Sequence[Tensor],
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
    compiled = torch.compile(model, backend=own_backend(backend, options), fullgraph=True, dynamic=False)
    with torch._inductor.config.patch({"freezing": frozen, **(patch or {})}), _count_freezing() as frozen_graphs:
        run_step(compiled, latent, timesteps, 0)
    if frozen and not frozen_graphs:
        raise RuntimeError("freezing was asked for and inductor froze nothing")

    def call(step: int) -> Tensor:
        around: AbstractContextManager[None] = fp32_matmul() if region else nullcontext()
        with around:
            return run_step(compiled, latent, timesteps, step)

    return call


def own_backend(name: str, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The backend of this name as a function that no other candidate uses.

    Dynamo would hand the graph that one candidate compiled to the next one with an equal model and backend, and a
    "frozen" candidate would run what was compiled without freezing.
    """

    def compile_graph(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        backend: Callable[..., Callable[..., Any]] = torch._dynamo.lookup_backend(name)
        return backend(graph, example_inputs) if options is None else backend(graph, example_inputs, options=options)

    return compile_graph


@contextmanager
def _count_freezing() -> Iterator[list[str]]:
    """Sees each time inductor freezes a graph: ``options={"freezing": True}`` is ignored without a word."""
    from torch._inductor import freezing

    freeze, seen = freezing.freeze, list[str]()

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append("frozen")
        return freeze(*args, **kwargs)

    freezing.freeze = spy
    try:
        yield seen
    finally:
        freezing.freeze = freeze
