"""Suite: what a cache guard costs where it computes, and what is left where it reuses, for each lowering.

A step that computes is compared with the same program without a guard; a step that reuses with a model that holds no
more than what still runs: the blocks in front of the region, the embedders and the head. Samples are loops of steps of
one generation that goes on and on, and the loops are interleaved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import ditc
from ditc.bench.harness import Call, Candidate, Clock, Spread, measure, ratios

from .candidates import own_backend
from .environment import describe
from .model import Size, build
from .report import markdown, preamble, rows, show, to_json, write

SUITE = "guard-lowerings"
SIZE = Size(384, 12, 256)
CUDA_SIZE = Size(3072, 16, 4096)
PLAIN = "no guard"
_ANY = float("inf")  # a step that reuses gives what an older one gave: there is no reference

Numbers = Mapping[str, float]
GUARDS: Mapping[str, tuple[Mapping[str, Any], int, Numbers, Numbers]] = {
    "first-block, cond": ({"policy": "first-block", "lowering": "cond"}, 1, {"threshold": 0.0}, {"threshold": 1e9}),
    "first-block, split": ({"policy": "first-block", "lowering": "split"}, 1, {"threshold": 0.0}, {"threshold": 1e9}),
    "fixed, schedule": ({"policy": "fixed", "lowering": "schedule"}, 0, {"warmup": 1e9}, {"interval": 1e9}),
}
"""Of each guard its options, how many blocks in front always run, and the numbers with which it never reuses and with
which it reuses all but the first step."""


def run(
    device: torch.device,
    *,
    rounds: int,
    clock: Clock,
    calls: int = 5,
    save: bool = True,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures and writes as :func:`benchmarks.step_latency.run`; ``calls`` is the length of a loop."""
    torch._dynamo.reset()
    model, latent, timesteps = build(CUDA_SIZE if device.type == "cuda" else SIZE, device)

    def through(subject: nn.Module, cache: Mapping[str, Any] | None, numbers: Numbers) -> Callable[[], Call]:
        def prepare() -> Call:
            own = own_backend("ditc", {"cache": dict(cache)} if cache is not None else {})
            function = torch.compile(subject, backend=own, fullgraph=True, dynamic=False)
            session = ditc.Session(cache=dict(numbers))

            def loop(_: int) -> Tensor:
                with torch.no_grad(), ditc.session(session):
                    for step in range(calls):
                        output: Tensor = function(latent, timesteps[step % len(timesteps)])
                return output

            return loop

        return prepare

    def left(blocks: int) -> nn.Module:
        found = copy.deepcopy(model)
        found.blocks = found.blocks[:blocks]
        return found

    field = [Candidate(PLAIN, through(model, None, {}), _ANY)]
    fronts = sorted({front for _, front, _, _ in GUARDS.values()})
    field += [Candidate(_left(front), through(left(front), None, {}), _ANY) for front in fronts]
    for name, (cache, _, never, always) in GUARDS.items():
        field.append(Candidate(f"{name}: computes", through(model, cache, never), _ANY, plan=dict(cache)))
        field.append(Candidate(f"{name}: reuses", through(model, cache, always), _ANY, plan=dict(cache)))
    with torch.no_grad():
        reference = model(latent, timesteps[calls - 1])
    with torch._dynamo.config.patch(recompile_limit=64):  # all candidates share the code of one model
        results = measure(field, [reference], rounds=rounds, clock=clock, progress=progress)
    for result in results:
        result.samples = [sample / calls for sample in result.samples]
        if result.seconds is not None:
            result.seconds = Spread.of(result.samples)
    against = {PLAIN: ratios(results, PLAIN)} | {_left(front): ratios(results, _left(front)) for front in fronts}
    overhead = {name: vars(against[PLAIN][f"{name}: computes"]) for name in GUARDS}
    remaining = {name: vars(against[_left(front)][f"{name}: reuses"]) for name, (_, front, _, _) in GUARDS.items()}
    header, body = rows(results, [PLAIN, *map(_left, fronts)])
    show(f"{SUITE}: one step of a DiT {SIZE}", header, body)
    document: dict[str, Any] = {**describe(device), "clock": clock, "rounds": rounds, "calls": calls}
    document |= {"results": to_json(results), "computes_to_no_guard": overhead, "reuses_to_what_is_left": remaining}
    text = f"{preamble(SUITE, document)}\nOne step of a DiT {SIZE}; loops of {calls} steps, {rounds} rounds.\n\n"
    if save:
        progress(f"written: {', '.join(str(p) for p in write(SUITE, document, text + markdown(header, body)))}")
    return document


def _left(front: int) -> str:
    return f"what is left: {front} blocks"
