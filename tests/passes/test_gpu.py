"""The compiler on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ditc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_right_answers_and_cuda_graphs(
    make_dit: Any, dit_inputs: Any, quantize: str, dtype: torch.dtype, mode: str
) -> None:
    model = make_dit(width=64).to("cuda", dtype)
    run = ditc.compile(model, {"quantize": quantize, "mode": mode})
    with torch.inference_mode():
        for time in (900.0, 600.0, 300.0):
            latent, timestep = (x.cuda() for x in dit_inputs(time=time, dtype=dtype))
            got, want = run(latent, timestep).clone(), model(latent, timestep)
            assert float((got.double() - want.double()).norm() / want.double().norm()) < 3e-2
        model.get_parameter("blocks.0.down.weight").mul_(-3.0)
        got, want = run(latent, timestep).clone(), model(latent, timestep)
        assert float((got.double() - want.double()).norm() / want.double().norm()) < 3e-2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(("attention", "tolerance"), [("int8", 3e-2), ("fp8", 9e-2), ("nvfp4", 3.5e-1)])
@pytest.mark.parametrize("sparse", [0.0, 0.2])
def test_attention_on_few_bits(
    make_dit: Any, dit_inputs: Any, attention: str, tolerance: float, sparse: float, mode: str
) -> None:
    model = make_dit(width=128).to("cuda", torch.bfloat16)
    run = ditc.compile(model, {"attention": attention, "attention_sparse": sparse, "mode": mode}, fullgraph=True)
    with torch.inference_mode():
        for time in (900.0, 600.0, 300.0):
            latent, timestep = (x.cuda() for x in dit_inputs(size=48, time=time, dtype=torch.bfloat16))
            got, want = run(latent, timestep).clone(), model(latent, timestep)
            assert float((got.double() - want.double()).norm() / want.double().norm()) < tolerance
    (program,) = ditc.stats(run).programs
    assert program.untouched is None
    kept = program.measured.get("attention kept", {})
    assert len(kept) == (2 if sparse else 0) and all(0 < part <= 1 for part in kept.values())
