"""Cache guards against caches that nobody here wrote: bit by bit, on models that nobody here named."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.passes.cache.guard import GuardRegion
from ditc.passes.cache.mark import MarkBorders
from ditc.passes.cache.options import CacheOptions, Policy
from ditc.passes.capture import capture_export
from ditc.passes.pipeline import rewrite
from ditc.passes.plan import Plan

STEPS = 8
Inputs = Mapping[str, Any]

# thresholds at which, with random weights, some steps are reused and some are not
CASES = [("flux", 0.4), ("wan", 0.1), ("cogvideox", 0.2), ("ltx", 0.1)]


def at_step(kwargs: Inputs, i: int) -> dict[str, Any]:
    """The inputs of the first sample at step ``i`` of a trajectory."""
    found = {name: v[:1] if isinstance(v, Tensor) and v.dim() and v.shape[0] == 2 else v for name, v in kwargs.items()}
    time = kwargs["timestep"]
    whole = not time.is_floating_point() or float(time.max()) > 1
    found["timestep"] = ((1 - i / STEPS) * (1000 if whole else 1) * torch.ones(1)).to(time.dtype)
    found["hidden_states"] = found["hidden_states"] * (1 - 0.03 * i)
    return found


def draw(
    model: Callable[..., Any], kwargs: Inputs, context: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> list[Tensor]:
    outputs = []
    with torch.no_grad():
        for i in range(STEPS):
            with context():
                output = model(**at_step(kwargs, i))
            outputs.append(output[0] if isinstance(output, tuple) else output.sample)
    return outputs


@pytest.mark.parametrize(("name", "threshold"), CASES)
def test_first_block_cache_of_diffusers(
    name: str, threshold: float, zoo: Mapping[str, Callable[[], tuple[nn.Module, Any, Inputs]]]
) -> None:
    hooks = pytest.importorskip("diffusers.hooks")
    model, _, kwargs = zoo[name]()
    exact = draw(model, kwargs)
    theirs: Any = copy.deepcopy(model)
    theirs.enable_cache(hooks.FirstBlockCacheConfig(threshold=threshold))
    expected = draw(theirs, kwargs, lambda: theirs.cache_context("cond"))
    torch._dynamo.reset()
    options = {"cache": {"policy": "first-block", "threshold": threshold, "warmup": 0}, "lower": "eager", "fuse": False}
    with ditc.session():
        ours = draw(torch.compile(model, backend="ditc", options=options, fullgraph=True), kwargs)
    assert all(map(torch.equal, ours, expected))
    guard = ditc.stats(model).programs[-1].guard
    assert guard is not None and [step.hits == (True,) for step in guard.steps] == [
        not torch.equal(a, b) for a, b in zip(expected, exact, strict=True)
    ]
    assert 0 < guard.hit_rate < 1, "reuse and computation both occur, or this shows little"


@pytest.mark.parametrize(("threshold", "front", "back", "warmup"), [(0.1, 1, 0, 2), (0.1, 1, 1, 3), (0.13, 2, 0, 3)])
def test_dbcache_of_cache_dit(
    threshold: float, front: int, back: int, warmup: int,
    zoo: Mapping[str, Callable[[], tuple[nn.Module, Any, Inputs]]],
) -> None:  # fmt: skip
    """Its first generation; in later ones cache-dit 1.5 begins with what the one before left."""
    cache_dit = pytest.importorskip("cache_dit")
    model, _, kwargs = zoo["wan"]()
    theirs: Any = copy.deepcopy(model)
    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=theirs, blocks=theirs.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_2
        ),
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=front, Bn_compute_blocks=back, residual_diff_threshold=threshold,
            max_warmup_steps=warmup, num_inference_steps=STEPS,
        ),
    )  # fmt: skip
    expected = draw(theirs, kwargs)
    cache = {"policy": "first-block", "threshold": threshold, "front": front, "back": back, "warmup": warmup}
    torch._dynamo.reset()
    options = {"cache": cache, "lower": "eager", "fuse": False}
    with ditc.session():
        ours = draw(torch.compile(model, backend="ditc", options=options, fullgraph=True), kwargs)
    assert all(map(torch.equal, ours, expected))
    guard = ditc.stats(model).programs[-1].guard
    assert guard is not None and 0 < guard.hit_rate < 1


# by diffusers and by hand: one stream or several, streams that join, stacks that alternate, long skips, one block many
# times, sound beside pictures, no attention at all, windows, adapters, a timestep for each token
SHAPES = [
    *("dit", "pixart", "sd3", "flux", "flux2", "qwenimage", "wan", "ltx", "hunyuan_video", "cosmos", "latte", "ltx2"),
    *("einops_dit", "mha_dit", "mmdit", "swiglu_dit", "uvit", "recurrent_dit", "functional_dit", "per_token"),
    *("lora_dit", "mixer", "window_dit"),
]


@pytest.mark.parametrize(
    ("policy", "name"),
    [*(("first-block", n) for n in SHAPES), *(("teacache", n) for n in ("latte", "mixer", "window_dit"))],
)
def test_a_guard_that_computes_changes_no_bit_and_one_that_reuses_replays(
    policy: Policy, name: str, zoo: Mapping[str, Callable[[], tuple[nn.Module, tuple[Any, ...], Inputs]]]
) -> None:
    model, args, kwargs = zoo[name]()
    capture = capture_export(model, args, dict(kwargs))
    plain = rewrite(capture, Plan(fuse=False), ())
    with torch.no_grad():
        exact = plain.graph(*capture.examples)
    options = CacheOptions(policy=policy)
    guarded = rewrite(capture, Plan(fuse=False), (MarkBorders(options), GuardRegion(options)))
    state = guarded.state.initial(torch.device("cpu"))
    hit = next(i for i, entry in enumerate(guarded.state.entries) if entry.name == "cache.hit")
    for reuse in (False, True):
        with torch.no_grad():
            found = guarded.graph(*capture.examples, *state, torch.tensor([*options.controls().values()]))
        outputs, state = found[: len(exact)], found[len(exact) :]
        assert bool(state[hit].all()) == reuse
        for mine, right in zip(outputs, exact, strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-5 if reuse else 0)


@pytest.mark.parametrize("name", ["dit", "flux", "latte"])
def test_a_whole_model_replays(
    name: str, zoo: Mapping[str, Callable[[], tuple[nn.Module, tuple[Any, ...], Inputs]]]
) -> None:
    """Also one that predicts variances beside the noise (dit, latte): its output has not the shape of its latent."""
    model, _, kwargs = zoo[name]()
    cache = {"policy": "fixed", "scope": "model", "interval": 4}
    options = {"cache": cache, "lower": "eager", "fuse": False}
    torch._dynamo.reset()
    guarded = torch.compile(model, backend="ditc", options=options, fullgraph=True)
    exact = draw(model, kwargs)
    with ditc.session():
        found = draw(guarded, kwargs)
    program = ditc.stats(model).programs[-1]
    assert program.guard is not None
    hits = [step.hits == (True,) for step in program.guard.steps]
    assert hits == [i % 4 != 0 for i in range(STEPS)]
    latents = [at_step(kwargs, i)["hidden_states"] for i in range(STEPS)]
    for i, hit in enumerate(hits):
        last = i - i % 4
        again = exact[last]
        if exact[i].shape == latents[i].shape:
            again = latents[i] + (exact[last] - latents[last])
        assert torch.equal(found[i], again if hit else exact[i])
