"""``torch.compile(model, backend="ditc")``: capture, rewrite, lower, and hand the program to the runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx

from ditc.kernels.matmul import fp32_matmul_reason
from ditc.runtime.artifact import Artifact, Manifest, Segment, StateSpec

from .attention.use import UseAttention
from .cache.lowering import lower_guard
from .cache.mark import MarkBorders
from .capture import Capture, GraphInput, capture_dynamo, graph_inputs
from .errors import CaptureError, PassError, PlanError
from .lower.eager import lower_eager
from .lower.inductor import lower_inductor, mode_options
from .pipeline import Rewritten, rewrite
from .plan import Plan
from .quantize.linears import QuantizeLinears
from .rewrite import device_of, input_of
from .verify import graph_hash


class UntouchedWarning(UserWarning):
    """A graph runs as it was captured, without ditc's rewrites, for the reason given."""


def ditc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend that ``torch.compile`` calls for each captured graph.

    Args:
        gm: Dynamo's graph; it is copied, never changed.
        example_inputs: the tensors and integers of the first call.
        options: fields of :class:`Plan`.
        mode: as ``torch.compile``'s, refused where the plan makes it impossible.

    Raises:
        PlanError: the options are no plan.
        PassError: a pass failed, or found candidates and could rewrite none.
    """
    plan = Plan.from_options(options, mode)
    check_plan(plan)
    reason = reason_to_pass_through(gm, example_inputs)
    if reason is None:
        try:
            capture = capture_dynamo(gm, example_inputs)
        except CaptureError as error:
            reason = str(error)
        else:
            reason = capture.unsupported
    if reason is None:
        inputs = graph_inputs(capture.graph)
        spare = _copy(capture) if plan.precise_first or plan.precise_last else None
        rewritten = rewrite(capture, plan)
        reason = nothing_found(rewritten)
    if reason is not None:
        return pass_through(gm, example_inputs, plan, reason).load()
    artifact = assemble(rewritten, inputs, plan, capture.source)
    if spare is not None:
        artifact = with_precise_steps(artifact, spare, plan)
    return artifact.load()


def with_precise_steps(artifact: Artifact, spare: Capture, plan: Plan) -> Artifact:
    """Adds the program at full precision that runs the first and last steps of a generation.

    Args:
        artifact: the quantised program.
        spare: the graph that it came from, as captured; it is handed over.
        plan: of ``artifact``.

    Raises:
        PassError: the two carry different state between steps.
    """
    inputs, exact = graph_inputs(spare.graph), unquantized(plan)
    precise = assemble(rewrite(spare, exact), inputs, exact, spare.source)
    try:
        return replace(artifact, precise=precise, precise_first=plan.precise_first, precise_last=plan.precise_last)
    except ValueError as error:
        raise PassError(str(error)) from None


def _copy(capture: Capture) -> Capture:
    """The same capture with a graph of its own; fake values are shared, so both graphs have the same symbols."""
    copied: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    new.output(new.graph_copy(capture.graph.graph, copied))
    for node in capture.graph.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            copied[node]._dynamo_source = node._dynamo_source
    return replace(capture, graph=fx.GraphModule(capture.graph, new))


def unquantized(plan: Plan) -> Plan:
    """The same plan with neither linears nor attention on few bits."""
    reads = plan.cache is not None and plan.cache.reads_calibration
    return Plan(
        fuse=plan.fuse, fp32_matmul=plan.fp32_matmul, weights=plan.weights, mode=plan.mode, lower=plan.lower,
        cache=plan.cache, chunks=plan.chunks, calibration=plan.calibration if reads else None,
    )  # fmt: skip


def check_plan(plan: Plan) -> None:
    """Refuses a plan that this machine cannot carry out as written.

    Raises:
        PlanError: says what is missing and what would be right.
    """
    if plan.fp32_matmul == "onednn":
        reason = fp32_matmul_reason()
        if reason is not None:
            raise PlanError(f"fp32_matmul='onednn' is not possible here: {reason}; use fp32_matmul='default'")


def reason_to_pass_through(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Why this graph must run exactly as captured; ``None`` when it may be rewritten."""
    tensors = [x for x in example_inputs if isinstance(x, torch.Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are recorded: call the model under torch.no_grad() or torch.inference_mode()"
    for device in ({t.device.type for t in tensors} or {"cpu"}) - {"meta"}:
        if torch.is_autocast_enabled(device):
            return "autocast is on: convert the model to the dtype instead (model.to(torch.bfloat16))"
    if any(t.numel() == 0 for t in tensors):
        return "an input is empty"
    if any(type(t) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) for t in tensors if not _is_fake(t)):
        kinds = sorted({type(t).__name__ for t in tensors} - {"Tensor", "Parameter", "Buffer"})
        return f"an input is a tensor subclass ({', '.join(kinds)})"
    return None


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def pass_through(gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan, reason: str) -> Artifact:
    """Compiles Dynamo's graph with inductor alone, and says why."""
    warnings.warn(f"ditc leaves a graph as it is: {reason}", UntouchedWarning, stacklevel=2)
    run: Callable[..., Any] = gm.forward
    if plan.lower == "inductor":
        lowered = compile_fx(gm, list(example_inputs), config_patches=mode_options(plan.mode))
        run = cast(Callable[..., Any], lowered)
    manifest = Manifest(plan.to_toml(), "", versions(), "dynamo", untouched=reason)
    owner = next((i for i, x in enumerate(example_inputs) if isinstance(x, torch.nn.Parameter)), None)
    names = tuple(node.name for node in gm.graph.find_nodes(op="placeholder"))
    return Artifact((run,), StateSpec(), manifest, owner=owner, input_names=names)


def nothing_found(rewritten: Rewritten) -> str | None:
    """Why a rewritten graph holds nothing of what the plan asked for; ``None`` when it does, or nothing was asked.

    A graph may be a fragment between graph breaks or no transformer at all, so this is a reason and no error: where
    there was something to rewrite and none of it could be, the runner has raised already.
    """
    requested = [report for report in rewritten.reports if report.requested]
    if not requested or any(report.rewrites for report in requested):
        return None
    names = " and ".join(report.name for report in requested)
    missing = " and no ".join(_CANDIDATES.get(report.name, "candidate") for report in requested)
    why = "; ".join(rewritten.structure.notes) or "the structure analysis found none"
    return f"{names} was asked for, but there is no {missing}: {why}"


_CANDIDATES = {
    QuantizeLinears.name: "linear on a token path inside a block",
    UseAttention.name: "attention",
    MarkBorders.name: "chain of repeated blocks",
}


def assemble(rewritten: Rewritten, inputs: Sequence[GraphInput], plan: Plan, source: str) -> Artifact:
    """Lowers a rewritten graph and describes it as an artifact.

    Args:
        rewritten: what :func:`rewrite` returned; its graph is handed over.
        inputs: the captured graph's inputs, which are the caller's.
        plan: chooses the lowering.
        source: ``dynamo`` or ``export``.
    """
    graph, prologue = rewritten.graph, rewritten.prologue
    manifest = Manifest(
        plan.to_toml(),
        graph_hash(graph),
        versions(),
        source,
        reports=rewritten.reports,
        notes=rewritten.structure.notes,
    )
    timestep = _timestep(rewritten)
    kept = _drop_unread(graph, len(inputs))

    def lower(part: fx.GraphModule) -> Segment:
        return lower_eager(part) if plan.lower == "eager" else lower_inductor(part, plan)

    guard = rewritten.guard
    cuda_graphs = device_of(graph).type == "cuda" and bool(mode_options(plan.mode).get("triton.cudagraphs"))
    segment = lower_guard(graph, guard, rewritten.state, lower, cuda_graphs) if guard is not None else lower(graph)
    return Artifact(
        (segment,),
        rewritten.state,
        manifest,
        prepare=prologue.pieces() if prologue else (),
        prepare_inputs=prologue.inputs if prologue else (),
        releasable=tuple(i for i in prologue.floating() if i not in kept) if prologue and plan.free_originals else (),
        input_names=tuple(fact.name for fact in inputs),
        kept_inputs=kept,
        owner=next((i for i, fact in enumerate(inputs) if fact.kind == "parameter"), None),
        data_inputs=tuple(i for i, fact in enumerate(inputs) if fact.kind == "data"),
        timestep=timestep,
        watch_weights=plan.weights == "watch",
        controls=rewritten.controls,
        fp32_matmul=plan.fp32_matmul,
        gauges=rewritten.gauges,
    )


def _drop_unread(graph: fx.GraphModule, count: int) -> tuple[int, ...]:
    """Removes placeholders of the caller's that nothing reads, such as weights that are read packed."""
    kept = []
    for position, node in enumerate(graph.graph.find_nodes(op="placeholder")[:count]):
        # symbols of symbolic shapes are bound by integers that may have no other reader
        if node.users or input_of(node).kind == "size":
            kept.append(position)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return tuple(kept)


def _timestep(rewritten: Rewritten) -> int | None:
    found = rewritten.structure.timestep
    names = [node.name for node in rewritten.graph.graph.find_nodes(op="placeholder")]
    return names.index(found.node) if found is not None and found.node in names else None


def versions() -> dict[str, str]:
    """Versions of what compiles."""
    from importlib.metadata import version

    return {"ditc": version("ditc"), "torch": torch.__version__}
