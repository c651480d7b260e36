"""Tiny random configurations of diffusers' transformers: name → a function that returns (model, args, kwargs)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
B = 2
"""Batch of every example input."""


def _ids(*sizes: int, width: int = 3) -> torch.Tensor:
    """Integer positions of a grid as (tokens, width), the first columns zero where the grid has fewer axes."""
    grids = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    columns = [torch.zeros_like(grids[0])] * (width - len(sizes)) + list(grids)
    return torch.stack([column.flatten() for column in columns], dim=-1).float()


def dit() -> Built:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    kwargs = {
        "hidden_states": torch.randn(B, 4, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "class_labels": torch.tensor([1, 4]),
    }
    return model, (), kwargs


def pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=24,
        caption_channels=20,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    kwargs = {
        "hidden_states": torch.randn(B, 4, 8, 8),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "encoder_attention_mask": torch.ones(B, 7),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, (), kwargs


def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=14,
        out_channels=4,
        pos_embed_max_size=8,
    )
    kwargs = {
        "hidden_states": torch.randn(B, 4, 8, 8),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "pooled_projections": torch.randn(B, 14),
    }
    return model, (), kwargs


def sd35() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=14,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    return model, (), sd3()[2]


def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=14,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": torch.randn(B, 16, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "pooled_projections": torch.randn(B, 14),
        "img_ids": _ids(4, 4),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    return model, (), kwargs


def flux2() -> Built:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    kwargs = {
        "hidden_states": torch.randn(B, 16, 8),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": _ids(4, 4, width=4),
        "txt_ids": torch.zeros(7, 4),
    }
    return model, (), kwargs


def qwenimage() -> Built:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": torch.randn(B, 16, 16),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "encoder_hidden_states_mask": torch.ones(B, 7).bool(),
        "img_shapes": [[(1, 4, 4)]] * B,
    }
    return model, (), kwargs


def wan() -> Built:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )
    kwargs = {
        "hidden_states": torch.randn(B, 4, 3, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
    }
    return model, (), kwargs


def wan_i2v() -> Built:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=18,
        added_kv_proj_dim=24,
    )
    kwargs = wan()[2] | {
        "encoder_hidden_states": torch.randn(B, 512, 20),
        "encoder_hidden_states_image": torch.randn(B, 5, 18),
    }
    return model, (), kwargs


def ltx() -> Built:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=20,
    )
    kwargs = {
        "hidden_states": torch.randn(B, 24, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "encoder_attention_mask": torch.ones(B, 7).bool(),
        "num_frames": 2,
        "height": 3,
        "width": 4,
    }
    return model, (), kwargs


def hunyuan_video() -> Built:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=2,
        patch_size=2,
        text_embed_dim=20,
        pooled_projection_dim=14,
        rope_axes_dim=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": torch.randn(B, 4, 3, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "encoder_attention_mask": torch.ones(B, 7),
        "pooled_projections": torch.randn(B, 14),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return model, (), kwargs


def cosmos() -> Built:
    from diffusers import CosmosTransformer3DModel

    model = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        concat_padding_mask=False,
    )
    kwargs = {
        "hidden_states": torch.randn(B, 4, 2, 8, 8),
        "timestep": torch.tensor([3.0, 7.0]),
        "encoder_hidden_states": torch.randn(B, 7, 20),
        "fps": 16,
    }
    return model, (), kwargs


MODELS: dict[str, Callable[[], Built]] = {
    f.__name__: f for f in (dit, pixart, sd3, sd35, flux, flux2, qwenimage, wan, wan_i2v, ltx, hunyuan_video, cosmos)
}
