"""Every kind of model runs right through the whole compiler: rewritten, packed, and run by the runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import ditc
from ditc.passes.backend import UntouchedWarning

DIFFUSERS = ("dit", "pixart", "sd3", "flux", "flux2", "qwenimage", "wan", "ltx", "hunyuan_video", "cosmos")
BY_HAND = (
    "einops_dit",
    "mha_dit",
    "mmdit",
    "swiglu_dit",
    "uvit",
    "recurrent_dit",
    "functional_dit",
    "per_token",
    "lora_dit",
)
LEFT_ALONE = ("convnet",)
BROKEN = ("broken",)


def outputs(value: Any) -> list[torch.Tensor]:
    return [leaf.clone() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", [*DIFFUSERS, *BY_HAND, *BROKEN, *LEFT_ALONE])
def test_runs_right(name: str, zoo: Mapping[str, Callable[[], Any]]) -> None:
    if name in DIFFUSERS:
        pytest.importorskip("diffusers")
    model, args, kwargs = zoo[name]()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntouchedWarning)
        expected = outputs(model(*args, **kwargs))
        for quantize, bound in (("none", 1e-4), ("int8", 0.08)):
            torch._dynamo.reset()
            run = torch.compile(model, backend="ditc", options={"quantize": quantize, "lower": "eager"})
            for _ in range(2):
                for got, want in zip(outputs(run(*args, **kwargs)), expected, strict=True):
                    assert got.dtype is want.dtype
                    assert float((got - want).norm() / want.norm().clamp(min=1e-6)) < bound
        programs = ditc.stats(run).programs
    done = sum(report.rewrites for p in programs for report in p.passes if report.name == "quantize")
    if name in LEFT_ALONE:
        assert done == 0
        assert all(p.untouched for p in programs)
    else:
        assert done > 0
    torch._dynamo.reset()
