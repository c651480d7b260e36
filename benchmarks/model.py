"""The model of the step benchmarks: a plain diffusion transformer (Peebles and Xie 2023, adaLN-Zero) on latents.

Weights are random, with every modulation and the head away from zero, so that no part of a block can be left out
unnoticed: a fresh DiT is the identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 4
PATCH = 2


@dataclass(frozen=True)
class Size:
    """Hidden width x depth, and the tokens of one image."""

    hidden: int
    depth: int
    tokens: int

    @property
    def heads(self) -> int:
        """Heads of 72 channels at 1152 (DiT-XL: 16 heads), of 128 from 2048 up, else of 64."""
        return self.hidden // (72 if self.hidden == 1152 else 128 if self.hidden >= 2048 else 64)

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width of the latent: the most square grid of patches with this number of tokens."""
        rows = max(r for r in range(1, math.isqrt(self.tokens) + 1) if self.tokens % r == 0)
        return PATCH * rows, PATCH * (self.tokens // rows)

    @property
    def linear_ops(self) -> int:
        """Integer operations (two per multiply-add) of the token-path linears of one step."""
        return 2 * self.tokens * 12 * self.hidden**2 * self.depth

    def __str__(self) -> str:
        return f"{self.hidden}x{self.depth}, {self.tokens} tokens"


class Attention(nn.Module):
    """Self-attention with separate projections, as diffusers keeps them."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x_BND: Tensor) -> Tensor:
        B, N, D = x_BND.shape
        q, k, v = (p(x_BND).view(B, N, self.heads, -1).transpose(1, 2) for p in (self.to_q, self.to_k, self.to_v))
        out: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        return out


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(hidden, heads)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        out: Tensor = x + gate2 * self.down(F.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2), approximate="tanh"))
        return out


class DiT(nn.Module):
    """Predicts noise ``[B, 4, H, W]`` from a latent of the same shape and a timestep ``[B]``."""

    position: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        hidden = size.hidden
        self.patch = nn.Conv2d(LATENT_CHANNELS, hidden, PATCH, stride=PATCH)
        self.time1, self.time2 = nn.Linear(256, hidden), nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(Block(hidden, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.head = nn.Linear(hidden, PATCH * PATCH * LATENT_CHANNELS)
        self.register_buffer("position", torch.randn(1, size.tokens, hidden) * 0.02)

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        B, _, H, W = latent.shape
        # in float32 whatever the model's type: bfloat16 cannot tell neighbouring timesteps apart
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, dtype=torch.float32, device=latent.device))
        angles = timestep.float()[:, None] * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(latent.dtype)
        c = self.time2(F.silu(self.time1(embedding)))
        x = self.patch(latent).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        y_BND = self.head(self.norm(x) * (1 + scale) + shift)
        y = y_BND.view(B, H // PATCH, W // PATCH, PATCH, PATCH, LATENT_CHANNELS)
        image: Tensor = y.permute(0, 5, 1, 3, 2, 4).reshape(B, LATENT_CHANNELS, H, W)
        return image


STEPS = 20
"""Steps of a generation: a benchmark walks through timesteps as a sampler does, and starts over."""


def build(size: Size, device: torch.device) -> tuple[DiT, Tensor, list[Tensor]]:
    """The model in float32, a latent, and the timestep ``[1]`` of each step; the same whatever ran before."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        model = DiT(size).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                # unit variance in, unit variance out; modulations and gates of about a third
                gain = 1.0 if module.out_features not in (6 * size.hidden, 2 * size.hidden) else 0.5
                nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
                nn.init.normal_(module.bias, std=0.1)
        latent = torch.randn(1, LATENT_CHANNELS, *size.latent)
    finally:
        torch.set_rng_state(generator_state)
    timesteps = [torch.tensor([1000.0 * (1 - step / STEPS)], device=device) for step in range(STEPS)]
    return model.to(device), latent.to(device), timesteps
