"""Tiny random configurations of image transformers of diffusers on which the analysis was not written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
B = 2


def _latents(*sizes: int) -> torch.Tensor:
    return torch.randn(B, *sizes)


def _grid(*sizes: int, width: int = 3) -> torch.Tensor:
    grids = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    columns = [torch.zeros_like(grids[0])] * (width - len(sizes)) + list(grids)
    return torch.stack([column.flatten() for column in columns], dim=-1).float()


def _rope(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(tokens).float(), torch.arange(1, width + 1).float())
    return angles.cos(), angles.sin()


def sana() -> Built:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=20,
        sample_size=8,
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([4.5, 4.5]),
    }
    return model, (), kwargs


def auraflow() -> Built:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pos_embed_max_size=64,
    )
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([0.3, 0.7]),
    }
    return model, (), kwargs


def chroma() -> Built:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=24,
        approximator_layers=2,
    )
    kwargs = {
        "hidden_states": _latents(16, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _latents(7, 20),
        "img_ids": _grid(4, 4),
        "txt_ids": torch.zeros(7, 3),
        "attention_mask": torch.ones(B, 23).bool(),
    }
    return model, (), kwargs


def hunyuan_dit() -> Built:
    from diffusers import HunyuanDiT2DModel

    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=24,
        num_layers=4,
        cross_attention_dim=20,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=7,
        text_len_t5=5,
    )
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": _latents(7, 20),
        "text_embedding_mask": torch.ones(B, 7),
        "encoder_hidden_states_t5": _latents(5, 16),
        "text_embedding_mask_t5": torch.ones(B, 5),
        "image_meta_size": torch.ones(B, 6),
        "style": torch.zeros(B, dtype=torch.long),
        "image_rotary_emb": _rope(16, 12),
        "return_dict": False,
    }
    return model, (), kwargs


def bria() -> Built:
    from diffusers.models.transformers.transformer_bria import BriaTransformer2DModel

    model = BriaTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=[4, 6, 6],
    )
    kwargs = {
        "hidden_states": _latents(16, 8),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": _latents(7, 20),
        "img_ids": _grid(4, 4),
        "txt_ids": torch.zeros(7, 3),
    }
    return model, (), kwargs


def cogview4() -> Built:
    from diffusers import CogView4Transformer2DModel

    model = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        text_embed_dim=20,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(6, 6),
    )
    sizes = torch.tensor([[8.0, 8.0]] * B)
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([3, 7]),
        "original_size": sizes.clone(),
        "target_size": sizes,
        "crop_coords": torch.zeros(B, 2),
    }
    return model, (), kwargs


def lumina2() -> Built:
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 16, 16),
        cap_feat_dim=20,
    )
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _latents(7, 20),
        "encoder_attention_mask": torch.ones(B, 7).bool(),
    }
    return model, (), kwargs


def omnigen() -> Built:
    from diffusers import OmniGenTransformer2DModel

    model = OmniGenTransformer2DModel(
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_layers=3,
        pad_token_id=0,
        vocab_size=50,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pos_embed_max_size=8,
        time_step_dim=16,
        rope_scaling={"short_factor": [1.0] * 6, "long_factor": [1.0] * 6, "type": "su"},
    )
    total = 5 + 1 + 16
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "input_ids": torch.randint(1, 50, (B, 5)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(B, total, total),
        "position_ids": torch.arange(total).repeat(B, 1),
    }
    return model, (), kwargs


def lumina_next() -> Built:
    from diffusers import LuminaNextDiT2DModel

    model = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=3,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=20,
    )
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _latents(7, 20),
        "encoder_mask": torch.ones(B, 7),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(12, 8, 8),
        "cross_attention_kwargs": {},
    }
    return model, (), kwargs


def hunyuan_image() -> Built:
    from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageTransformer2DModel

    model = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=2,
        text_embed_dim=20,
        rope_axes_dim=(8, 8),
    )
    kwargs = {
        "hidden_states": _latents(4, 4, 4),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": _latents(7, 20),
        "encoder_attention_mask": torch.ones(B, 7),
    }
    return model, (), kwargs


def prx() -> Built:
    from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

    model = PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=20,
        hidden_size=24,
        mlp_ratio=2.0,
        num_heads=2,
        depth=3,
        axes_dim=[6, 6],
    )
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _latents(7, 20),
        "attention_mask": torch.ones(B, 7).bool(),
    }
    return model, (), kwargs


def z_image() -> Built:
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=20,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )
    return model, ([torch.randn(4, 1, 8, 8)], torch.tensor([0.3]), [torch.randn(32, 20)]), {}


def hidream() -> Built:
    from diffusers import HiDreamImageTransformer2DModel

    model = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[20, 18],
        text_emb_dim=14,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1, 1],
        force_inference_output=True,
    )
    kwargs = {
        "hidden_states": _latents(4, 8, 8),
        "timesteps": torch.tensor([3, 7]),
        "encoder_hidden_states_t5": _latents(7, 20),
        "encoder_hidden_states_llama3": torch.randn(2, B, 7, 18),
        "pooled_embeds": _latents(14),
    }
    return model, (), kwargs


MODELS: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        sana,
        auraflow,
        chroma,
        hunyuan_dit,
        bria,
        cogview4,
        lumina2,
        omnigen,
        lumina_next,
        hunyuan_image,
        prx,
        z_image,
        hidream,
    )
}
