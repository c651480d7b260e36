"""`ditc.optimize`: diffusers' pipelines, with tiny random weights, driven as they are and by a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditc

diffusers = pytest.importorskip("diffusers")
QUANTISED = {"quantize": "int8", "lower": "eager"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    # one class is compiled again and again here, and torch.compile gives up after a few times
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def autoencoder(channels: int, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), use_quant_conv=False,
        use_post_quant_conv=False, **more,
    )  # fmt: skip


def embeddings(count: int, *shape: int) -> Tensor:
    # the same text for every picture, so that a batch differs by its seeds alone
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(7)).expand(count, *shape)


def flux() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), transformer=transformer.eval(),
        vae=autoencoder(4, shift_factor=0.0, scaling_factor=1.0), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip

    def arguments(count: int) -> dict[str, Any]:
        text = {"prompt_embeds": embeddings(count, 5, 12), "pooled_prompt_embeds": embeddings(count, 10)}
        return {**text, "height": 16, "width": 16, "output_type": "latent"}

    return pipe, arguments


def sd3() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder(4),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip

    def arguments(count: int) -> dict[str, Any]:
        text = {"prompt_embeds": embeddings(count, 5, 12), "pooled_prompt_embeds": embeddings(count, 10)}
        nothing = {f"negative_{name}": torch.zeros_like(value) for name, value in text.items()}
        return {**text, **nothing, "height": 8, "width": 8, "output_type": "latent"}

    return pipe, arguments


def pixart() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=transformer.eval(), scheduler=diffusers.DDIMScheduler(), vae=autoencoder(4), text_encoder=None,
        tokenizer=None,
    )  # fmt: skip

    def arguments(count: int) -> dict[str, Any]:
        text, mask = embeddings(count, 5, 12), torch.ones(count, 5)
        nothing = {"negative_prompt_embeds": torch.zeros_like(text), "negative_prompt_attention_mask": mask}
        given = {"prompt_embeds": text, "prompt_attention_mask": mask, "negative_prompt": None, **nothing}
        return {**given, "height": 8, "width": 8, "output_type": "latent", "use_resolution_binning": False}

    return pipe, arguments


def wan() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     temperal_downsample=[False, True, True])  # fmt: skip
    pipe = diffusers.WanPipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=None, tokenizer=None,
    )  # fmt: skip

    def arguments(count: int) -> dict[str, Any]:
        text = embeddings(count, 5, 12)
        given = {"prompt_embeds": text, "negative_prompt_embeds": torch.zeros_like(text)}
        return {**given, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}

    return pipe, arguments


def ltx() -> tuple[Any, Callable[[int], dict[str, Any]]]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=12,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    )  # fmt: skip
    pipe = diffusers.LTXPipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae,
        text_encoder=None, tokenizer=None,
    )  # fmt: skip

    def arguments(count: int) -> dict[str, Any]:
        text, mask = embeddings(count, 5, 12), torch.ones(count, 5, dtype=torch.bool)
        nothing = {"negative_prompt_embeds": torch.zeros_like(text), "negative_prompt_attention_mask": mask}
        given = {"prompt_embeds": text, "prompt_attention_mask": mask, **nothing}
        return {**given, "height": 32, "width": 32, "num_frames": 9, "output_type": "latent"}

    return pipe, arguments


PIPELINES = {"flux": flux, "sd3": sd3, "pixart": pixart, "wan": wan, "ltx": ltx}


def make(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    torch.manual_seed(0)
    pipe, arguments = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments


def draw(pipe: Any, arguments: dict[str, Any], seeds: list[int], **more: Any) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = pipe(**arguments, generator=generators, return_dict=False, **more)[0]
    return torch.as_tensor(found)


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_draw_what_they_drew(name: str) -> None:
    pipe, arguments = make(name)
    expected = draw(pipe, arguments(1), [3], num_inference_steps=3)
    original = pipe.transformer
    fast = ditc.optimize(pipe, QUANTISED)
    got = draw(fast, arguments(1), [3], num_inference_steps=3)
    assert float((got - expected).norm() / expected.norm()) < 3e-2
    assert torch.equal(draw(fast, arguments(1), [3], num_inference_steps=3), got), "generation 2 equals generation 1"
    (compiled,) = fast.transformers.values()
    assert sum(program.packs > 0 for program in ditc.stats(compiled).programs) >= 1
    assert fast.vae is pipe.vae, "attributes are those of the pipeline"
    assert fast.restore() is pipe and pipe.transformer is original


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "ltx"])
def test_a_manifest_drives_the_pipeline(name: str, tmp_path: Path) -> None:
    pipe, arguments = make(name)
    student = ditc.published("flux-1-schnell")
    given = {"guidance_scale": 1.0} if name != "flux" else {}
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.scheduler = euler
    expected = draw(pipe, arguments(1), [3], num_inference_steps=4, **given)
    fast = ditc.optimize(pipe, {"lower": "eager", "fuse": False}, sampler=student)
    got = draw(fast, arguments(1), [3])
    # the scheduler of diffusers walks linspace(1, 1/1000) where it makes its own grid; ours ends at the manifest's
    exact = name == "flux"
    torch.testing.assert_close(got, expected, rtol=1e-4 if exact else 0.2, atol=1e-4 if exact else 0.5)
    with pytest.raises(ditc.SamplerError, match="4 steps, not 20"):
        draw(fast, arguments(1), [3], num_inference_steps=20)
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    with pytest.raises(ditc.SamplerError, match="guidance distilled into it"):
        draw(fast, arguments(1), [3], **{scale: 4.0})
    fast.scheduler.save_pretrained(tmp_path)
    assert ditc.ManifestScheduler.from_pretrained(tmp_path).sampler == student
    assert fast.restore().scheduler is euler


def test_fresh_noise_belongs_to_the_seed_of_a_picture() -> None:
    pipe, arguments = make("flux")
    student = ditc.published("self-forcing")
    fast = ditc.optimize(pipe, {"lower": "eager", "fuse": False}, sampler=student)
    both = draw(fast, arguments(2), [3, 4])
    torch.testing.assert_close(both[:1], draw(fast, arguments(1), [3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1:], draw(fast, arguments(1), [4]), rtol=1e-4, atol=1e-5)
    other = draw(fast, arguments(2), [3, 5])
    assert not torch.allclose(both[1], other[1])


def test_an_interrupted_run_leaves_nothing() -> None:
    pipe, arguments = make("wan")
    fast = ditc.optimize(pipe, {"lower": "eager", "cache": {"policy": "first-block", "threshold": 0.5, "last": 1}})
    want = draw(fast, arguments(1), [3], num_inference_steps=5)

    def stop(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise RuntimeError("enough")
        return {}

    with pytest.raises(RuntimeError, match="enough"):
        draw(fast, arguments(1), [8], num_inference_steps=5, callback_on_step_end=stop)
    assert torch.equal(draw(fast, arguments(1), [3], num_inference_steps=5), want)
    (compiled,) = fast.transformers.values()
    guard = ditc.stats(compiled).programs[-1].guard
    assert guard is not None and {step.branch for step in guard.steps} == {"cond", "uncond"}
    never = draw(fast, arguments(1), [3], num_inference_steps=5, cache={"threshold": 0.0})
    assert not torch.equal(never, want), "a run has thresholds of its own"


def test_a_transformer_that_stays_eager_is_told_of() -> None:
    pipe, arguments = make("flux")
    fast = ditc.optimize(pipe, QUANTISED)
    with torch.compiler.set_stance("force_eager"), pytest.warns(RuntimeWarning, match="no compiled program ran"):
        draw(fast, arguments(1), [3], num_inference_steps=1)


def test_what_cannot_be_is_refused() -> None:
    pipe, _ = make("flux")
    with pytest.raises(ditc.DitcError, match="no transformer"):
        ditc.optimize(diffusers.DDIMPipeline(unet=torch.nn.Linear(2, 2), scheduler=diffusers.DDIMScheduler()))
    with pytest.raises(ditc.SamplerError, match=r"draw with ditc\.generate"):
        ditc.optimize(pipe, sampler=ditc.published("sana-sprint-2step"))
    assert not hasattr(pipe.transformer, "_orig_mod"), "a refusal leaves the pipeline as it was"
    fast = ditc.optimize(pipe, QUANTISED)
    with pytest.raises(ditc.DitcError, match="optimised already"):
        ditc.optimize(fast)
