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
