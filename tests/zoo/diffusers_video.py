"""Tiny random configurations of video and audio transformers of diffusers on which the analysis was not written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
B = 2


def _latents(*sizes: int) -> torch.Tensor:
    return torch.randn(B, *sizes)


def _rope(tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(torch.arange(tokens).float(), torch.arange(1, width + 1).float())
    return angles.cos(), angles.sin()


def cogvideox() -> Built:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=20,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    kwargs = {
        "hidden_states": _latents(3, 4, 8, 8),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([3, 7]),
        "image_rotary_emb": _rope(48, 12),
    }
    return model, (), kwargs


def mochi() -> Built:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=24,
        time_embed_dim=8,
        max_sequence_length=8,
    )
    kwargs = {
        "hidden_states": _latents(4, 3, 8, 8),
        "encoder_hidden_states": _latents(7, 24),
        "timestep": torch.tensor([3, 7]),
        "encoder_attention_mask": torch.ones(B, 7).bool(),
    }
    return model, (), kwargs


def allegro() -> Built:
    from diffusers import AllegroTransformer3DModel

    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=3,
        caption_channels=20,
    )
    positions = [torch.arange(48) % size for size in (3, 4, 4)]
    kwargs = {
        "hidden_states": _latents(4, 3, 8, 8),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([3, 7]),
        "attention_mask": torch.ones(B, 3, 8, 8),
        "encoder_attention_mask": torch.ones(B, 7),
        "image_rotary_emb": (tuple(_rope(4, 4) for _ in range(3)), tuple(p[None] for p in positions)),
    }
    return model, (), kwargs


def latte() -> Built:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=24,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=20,
        video_length=3,
        activation_fn="gelu-approximate",
    )
    kwargs = {
        "hidden_states": _latents(4, 3, 8, 8),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([3, 7]),
    }
    return model, (), kwargs


def kandinsky5() -> Built:
    from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel

    model = Kandinsky5Transformer3DModel(
        in_text_dim=20,
        in_text_dim2=14,
        time_dim=16,
        model_dim=32,
        ff_dim=48,
        num_text_blocks=2,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
    )
    kwargs = {
        "hidden_states": _latents(2, 8, 8, 4),
        "encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([300.0, 700.0]),
        "pooled_projections": _latents(14),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(7),
    }
    return model, (), kwargs


def stable_audio() -> Built:
    from diffusers import StableAudioDiTModel

    model = StableAudioDiTModel(
        sample_size=16,
        in_channels=6,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        out_channels=6,
        cross_attention_dim=16,
        time_proj_dim=12,
        global_states_input_dim=18,
        cross_attention_input_dim=20,
    )
    kwargs = {
        "hidden_states": _latents(6, 16),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _latents(7, 20),
        "global_hidden_states": _latents(1, 18),
        "rotary_embedding": _rope(17, 4),
    }
    return model, (), kwargs


def skyreels_v2() -> Built:
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2Transformer3DModel

    model = SkyReelsV2Transformer3DModel(
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
        "hidden_states": _latents(4, 3, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _latents(7, 20),
    }
    return model, (), kwargs


def wan_vace() -> Built:
    from diffusers import WanVACETransformer3DModel

    model = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=20,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
        vace_layers=[0, 2],
        vace_in_channels=6,
    )
    kwargs = {
        "hidden_states": _latents(4, 3, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _latents(7, 20),
        "control_hidden_states": _latents(6, 3, 8, 8),
    }
    return model, (), kwargs


def ltx2() -> Built:
    from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

    model = LTX2VideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=6,
        audio_out_channels=6,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=20,
    )
    kwargs = {
        "hidden_states": _latents(24, 8),
        "audio_hidden_states": _latents(5, 6),
        "encoder_hidden_states": _latents(7, 20),
        "audio_encoder_hidden_states": _latents(7, 20),
        "timestep": torch.tensor([3.0, 7.0])[:, None],
        "num_frames": 2,
        "height": 3,
        "width": 4,
        "audio_num_frames": 5,
    }
    return model, (), kwargs


def easyanimate() -> Built:
    from diffusers.models.transformers.transformer_easyanimate import EasyAnimateTransformer3DModel

    model = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=3,
        mmdit_layers=2,
        time_embed_dim=16,
        text_embed_dim=20,
        sample_width=8,
        sample_height=8,
        add_noise_in_inpaint_model=False,
    )
    kwargs = {
        "hidden_states": _latents(4, 3, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": _latents(7, 20),
    }
    return model, (), kwargs


MODELS: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (cogvideox, mochi, allegro, latte, kandinsky5, stable_audio, skyreels_v2, wan_vace, ltx2, easyanimate)
}
