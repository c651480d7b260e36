"""Guards and the modules they guard: copies, pickles and moved modules share no state with anybody."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc

OPTIONS: dict[str, Any] = {
    "cache": {"policy": "first-block", "threshold": 1e9},
    "lower": "eager",
    "fuse": False,
}


@pytest.fixture
def model(make_dit: Callable[..., nn.Module]) -> nn.Module:
    return make_dit(depth=3)


@pytest.fixture
def latent(dit_inputs: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    return dit_inputs(batch=1)[0]


def guarded(model: nn.Module) -> nn.Module:
    found: nn.Module = torch.compile(model, backend="ditc", options=OPTIONS, fullgraph=True)
    return found


def other(model: nn.Module) -> nn.Module:
    """A module of the same class with other weights, which Dynamo runs with the same graph."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(1.25)
    return found


def step(model: nn.Module, latent: Tensor, time: float) -> Tensor:
    with torch.no_grad():
        return model(latent, torch.full((1,), time, dtype=latent.dtype))  # type: ignore[no-any-return]


def hits(model: nn.Module) -> list[bool]:
    return [step.hits[0] for program in ditc.stats(model).programs if program.guard for step in program.guard.steps]


@pytest.mark.parametrize("lowering", ["cond", "split"])
@pytest.mark.parametrize("inside", [True, False])
def test_two_experts_of_one_generation_reuse_nothing_of_each_other(
    model: nn.Module, latent: Tensor, lowering: str, inside: bool
) -> None:
    """Wan 2.2 has two transformers of one class: one denoises the first steps of a generation, one the last."""
    early, late = model, other(model)
    options = OPTIONS | {"cache": OPTIONS["cache"] | {"lowering": lowering}}
    first, second = (torch.compile(m, backend="ditc", options=options, fullgraph=True) for m in (early, late))
    context: Any = ditc.session(steps=4) if inside else torch.no_grad()
    with context:
        outputs = [step(m, latent, t) for m, t in ((first, 900.0), (first, 700.0), (second, 500.0), (second, 300.0))]
    assert torch.equal(outputs[0], step(early, latent, 900.0))
    assert torch.equal(outputs[2], step(late, latent, 500.0)), "its first step reused what the other had left"
    assert hits(early) == [False, True] and hits(late) == [False, True]


def test_alternating_modules_keep_to_their_own(model: nn.Module, latent: Tensor) -> None:
    both = [model, other(model)]
    compiled = [guarded(m) for m in both]
    with ditc.session():
        outputs = [[step(m, latent, 900.0 - 100 * i) for m in compiled] for i in range(3)]
    for m, mine in zip(both, zip(*outputs, strict=True), strict=True):
        torch._dynamo.reset()
        with ditc.session():
            alone = guarded(m)
            assert all(torch.equal(a, step(alone, latent, 900.0 - 100 * i)) for i, a in enumerate(mine))


def _deepcopied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


@pytest.mark.parametrize("again", [_deepcopied, _pickled])
def test_a_copy_in_mid_generation_begins_anew(
    model: nn.Module, latent: Tensor, again: Callable[[nn.Module], nn.Module]
) -> None:
    compiled = guarded(model)
    with ditc.session():
        step(compiled, latent, 900.0)
        step(compiled, latent, 800.0)
        twin = again(model)
        copied = guarded(twin)
        fresh = step(copied, latent, 700.0)
        went_on = step(compiled, latent, 700.0)
    assert torch.equal(fresh, step(model, latent, 700.0))
    assert not torch.equal(went_on, fresh), "the original goes on with what it has"
    assert hits(twin) == [False] and hits(model) == [False, True, True]


def test_a_compiled_module_can_be_copied(model: nn.Module, latent: Tensor) -> None:
    compiled = guarded(model)
    with ditc.session():
        step(compiled, latent, 900.0)
        copied = copy.deepcopy(compiled)
        assert torch.equal(step(copied, latent, 800.0), step(model, latent, 800.0))


def test_a_module_compiled_in_place_can_be_pickled(model: nn.Module, latent: Tensor) -> None:
    model.compile(backend="ditc", options=OPTIONS, fullgraph=True)
    with ditc.session():
        step(model, latent, 900.0)
        restored = _pickled(model)
        exact = step(restored, latent, 800.0)  # nothing compiled travels in a pickle
        restored.compile(backend="ditc", options=OPTIONS, fullgraph=True)
        assert torch.equal(step(restored, latent, 800.0), exact)
    assert hits(restored) == [False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_that_is_moved_in_mid_generation_computes(
    model: nn.Module, latent: Tensor, dtype: torch.dtype
) -> None:
    compiled = guarded(model)
    with ditc.session():
        step(compiled, latent, 900.0)
        assert not torch.equal(step(compiled, latent, 800.0), step(model, latent, 800.0))
        model.to(dtype)
        moved = step(compiled, latent.to(dtype), 700.0)
        assert moved.dtype == dtype and torch.equal(moved, step(model, latent.to(dtype), 700.0))
        again = step(compiled, latent.to(dtype), 600.0)
        assert torch.isfinite(again).all() and not torch.equal(again, step(model, latent.to(dtype), 600.0))
