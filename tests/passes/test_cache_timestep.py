"""TeaCache that looks at the timestep's embedding: the host decides as the device would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditc
from ditc.passes.errors import PlanError
from ditc.passes.plan import Plan
from ditc.runtime.guards import GuardStep
from ditc.runtime.program import programs_of

Options = Mapping[str, Any]
STEPS = 6


def compiled(model: nn.Module, cache: Options) -> Callable[..., Any]:
    options = {"cache": dict(cache), "lower": "eager", "fuse": False}
    found: Callable[..., Any] = torch.compile(model, backend="ditc", options=options, fullgraph=True, dynamic=False)
    return found


def decided(model: nn.Module, number: int) -> list[GuardStep]:
    """The last steps of the program that was made as the ``number``-th."""
    guard = programs_of(model)[number].guard_by({id(p): p for p in model.parameters()})
    assert guard is not None
    return list(guard.steps[-STEPS:])


TIMED: Options = {"policy": "teacache", "indicator": "timestep"}


def generation(built: tuple[nn.Module, tuple[Any, ...], dict[str, Any]]) -> tuple[nn.Module, Callable[..., Any]]:
    """A model, and what draws six steps with it."""
    model, args, kwargs = built
    place = "timestep" if "timestep" in kwargs else 1
    example = (kwargs | dict(enumerate(args)))[place]
    unit = 1 if example.max() > 1 or not example.is_floating_point() else 1000

    def draw_with(function: Callable[..., Any], **session: Any) -> list[Tensor]:
        found = []
        with torch.no_grad(), ditc.session(steps=STEPS, **session):
            for i in range(STEPS):
                t = (torch.tensor([900.0 - 100 * i, 800.0 - 150 * i]) / unit).to(example.dtype)
                given = [t if k == place else a for k, a in enumerate(args)]
                result = function(*given, **(kwargs | ({place: t} if isinstance(place, str) else {})))
                found.append(result[0] if isinstance(result, tuple) else result)
        return found

    return model, draw_with


@pytest.mark.parametrize("name", ["tiny", "wan", "flux", "einops_dit"])
def test_the_timestep_decides_alike_in_all_lowerings(
    zoo: Mapping[str, Callable[[], Any]], make_dit: Callable[..., nn.Module], name: str
) -> None:
    torch._dynamo.reset()
    tiny = make_dit(depth=2), (torch.randn(2, 4, 4, 4), torch.zeros(2)), {}
    model, draw_with = generation(tiny if name == "tiny" else zoo[name]())
    functions = [compiled(model, TIMED | {"lowering": lowering}) for lowering in ("cond", "split", "auto")]
    mixed = False
    for threshold in (0.0, 0.02, 0.2, 0.7, 1.5, 1e9):
        drawn = [draw_with(function, cache={"threshold": threshold}) for function in functions]
        made = programs_of(model)
        assert len(made) == 3, "a threshold compiles nothing anew"
        first, *others = (decided(model, number) for number in range(3))
        for steps, outputs in zip(others, drawn[1:], strict=True):
            assert [s.hits for s in steps] == [s.hits for s in first]
            for mine, his, a, b in zip(steps, first, outputs, drawn[0], strict=True):
                torch.testing.assert_close(mine.scores, his.scores, rtol=1e-4, atol=1e-6, equal_nan=True)
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        mixed |= len({s.hits for s in first[1:]}) > 1
    assert mixed, "some threshold reuses some of the steps"
    assert "from the timestep" in " ".join(made[2].artifact.manifest.reports[-1].details)


def test_the_host_sees_new_weights_of_the_embedder(make_dit: Callable[..., nn.Module]) -> None:
    torch._dynamo.reset()
    model, x = make_dit(depth=2), torch.randn(2, 4, 4, 4)
    functions = [compiled(model, TIMED | {"lowering": lowering}) for lowering in ("cond", "schedule")]
    embedder: nn.Linear = model.time_out  # type: ignore[assignment]
    scores = []
    for edit in (None, lambda: embedder.weight.mul_(2.0), lambda: embedder.weight.data.mul_(0.1)):
        with torch.no_grad():
            _ = edit() if edit is not None else None
        for function in functions:
            with torch.no_grad(), ditc.session(steps=STEPS, cache={"threshold": 0.3}):
                for i in range(STEPS):
                    function(x, torch.tensor([900.0 - 100 * i, 800.0 - 150 * i]))
        first, second = ([s.scores for s in decided(model, number)] for number in range(2))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6, equal_nan=True)
        scores.append(first[2])
    assert len(set(scores)) == 3


def test_only_teacache_has_an_indicator() -> None:
    with pytest.raises(PlanError, match="indicator belongs to the policy 'teacache', not to 'first-block'"):
        Plan(cache={"policy": "first-block", "indicator": "timestep"})
    assert not Plan(cache=TIMED).cache.reads_calibration  # type: ignore[union-attr]
