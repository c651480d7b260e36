"""Suite: what a call of a compiled model costs beside its kernels.

A model so small that its kernels take microseconds is called through ditc, through inductor, and through the compiled
function alone; each sample is a loop of calls, and the loops are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditc.bench.harness import Call, Candidate, Clock, measure, ratios

from .candidates import own_backend, run_step
from .environment import describe
from .model import Size, build
from .report import markdown, preamble, rows, show, to_json, write

SUITE = "guard-overhead"
SIZE = Size(64, 2, 16)
INDUCTOR, DITC, INNER = "inductor", "ditc", "compiled function alone"
_BOUND = 0.2  # a width of 64 quantises badly; this asks for the right function, not for quality


def run(
    device: torch.device,
    *,
    rounds: int,
    clock: Clock,
    calls: int = 50,
    save: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures and writes as :func:`benchmarks.step_latency.run`; ``calls`` is the length of a loop."""
    torch._dynamo.reset()
    model, latent, timesteps = build(SIZE, device)
    reference = run_step(model, latent, timesteps, calls - 1)

    def loop(function: Callable[..., Any]) -> Call:
        def run_loop(_: int) -> Tensor:
            with torch.no_grad():
                for step in range(calls):
                    output: Tensor = function(latent, timesteps[step % len(timesteps)])
            return output

        return run_loop

    def through(backend: str, options: dict[str, Any] | None) -> Callable[[], Call]:
        own = own_backend(backend, options)
        return lambda: loop(torch.compile(model, backend=own, fullgraph=True, dynamic=False))

    def alone() -> Call:
        """What Dynamo calls once its guards have passed: inductor's function of the graph, weights included."""
        caught: list[tuple[Callable[..., Any], list[Any]]] = []

        def backend(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            function: Callable[..., Any] = own_backend("inductor")(graph, example_inputs)

            def spy(*arguments: Any) -> Any:
                caught[:] = [(function, list(arguments))]
                return function(*arguments)

            return spy

        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(latent, timesteps[0])
        function, arguments = caught[0]
        place = next(i for i, argument in enumerate(arguments) if argument is timesteps[0])

        def call(_: Tensor, timestep: Tensor) -> Any:
            arguments[place] = timestep
            return function(*arguments)[0]

        return loop(call)

    plan = {"quantize": "int8"}
    field = [
        Candidate(INDUCTOR, through("inductor", None), _BOUND),
        Candidate(DITC, through("ditc", plan), _BOUND, plan=plan),
        Candidate("ditc, weights frozen", through("ditc", {**plan, "weights": "frozen"}), _BOUND),
        Candidate(INNER, alone, _BOUND),
    ]
    results = measure(field, [reference], rounds=rounds, clock=clock, progress=progress)
    for result in results:
        result.samples = [sample / calls for sample in result.samples]
        if result.seconds is not None:
            result.seconds = type(result.seconds).of(result.samples)
    header, body = rows(results, [INDUCTOR])
    show(f"{SUITE}: one call of a DiT {SIZE}", header, body)
    document: dict[str, Any] = {**describe(device), "clock": clock, "rounds": rounds, "calls": calls}
    document["results"] = to_json(results)
    if any(r.name == INDUCTOR and r.seconds for r in results):
        document["ratios_to_inductor"] = {name: vars(spread) for name, spread in ratios(results, INDUCTOR).items()}
    text = f"{preamble(SUITE, document)}\nOne call of a DiT {SIZE}; loops of {calls} calls, {rounds} rounds.\n\n"
    if save:
        progress(f"written: {', '.join(str(p) for p in write(SUITE, document, text + markdown(header, body)))}")
    return document
