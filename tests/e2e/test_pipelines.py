"""diffusers' own pipelines around a compiled transformer: right pictures, and branches that do not mix."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import ditc
from ditc.runtime.session import current_branch, end_generation, find_slot, listen_to_diffusers

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """A FluxPipeline with a tiny random transformer; text arrives as embeddings, pictures leave as latents."""
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.0, scaling_factor=1.0,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, seed: int, steps: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.Generator().manual_seed(7)
    latents: Tensor = pipe(
        prompt_embeds=torch.randn(1, 5, 12, generator=text),
        pooled_prompt_embeds=torch.randn(1, 10, generator=text),
        negative_prompt_embeds=torch.randn(1, 5, 12, generator=text),
        negative_pooled_prompt_embeds=torch.randn(1, 10, generator=text),
        true_cfg_scale=2.0,
        height=16,
        width=16,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
    ).images
    return latents


def test_a_flux_pipeline_with_guidance(pipeline: Any) -> None:
    plain = pipeline.transformer
    expected = [generate(pipeline, seed) for seed in (1, 2)]
    pipeline.transformer = ditc.compile(plain, {"quantize": "int8", "lower": "eager"})
    try:
        for _ in range(2):
            for seed, want in zip((1, 2), expected, strict=True):
                got = generate(pipeline, seed)
                assert float((got - want).norm() / want.norm()) < 2e-2
        first, again = generate(pipeline, 1), generate(pipeline, 1)
        assert torch.equal(first, again), "a generation leaves nothing behind"
        assert ditc.stats(pipeline.transformer).calls == 6 * 3 * 2
    finally:
        pipeline.transformer = plain


def test_cache_context_names_our_branches(pipeline: Any) -> None:
    assert listen_to_diffusers()
    assert listen_to_diffusers(), "listening twice is listening once"
    program, shape = object.__new__(type("Program", (), {})), ((1,),)
    seen: dict[str, str | None] = {}
    slots: dict[str, Any] = {}
    for name in ("cond", "uncond"):
        with pipeline.transformer.cache_context(name):
            seen[name] = current_branch()
            slots[name] = find_slot(program, shape, 1.0)
    assert seen == {"cond": "cond", "uncond": "uncond"}
    assert current_branch() is None
    assert slots["cond"] is not slots["uncond"]
    pipeline.transformer._reset_stateful_cache()
    with pipeline.transformer.cache_context("cond"):
        assert find_slot(program, shape, 0.5) is not slots["cond"], "the end of a pipeline's run ends the generation"
    end_generation()


def test_threads_of_a_pipeline_do_not_meet(pipeline: Any) -> None:
    listen_to_diffusers()
    inside = threading.Barrier(2, timeout=20)
    seen: dict[str, str | None] = {}

    def work(name: str) -> None:
        with ditc.session(name), pipeline.transformer.cache_context(name):
            inside.wait()
            seen[name] = current_branch()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("cond", "uncond")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"cond": "cond", "uncond": "uncond"}
