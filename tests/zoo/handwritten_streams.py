"""Diffusion transformers by hand with several streams, several axes or long skips; read ``handwritten`` first."""

from __future__ import annotations

from collections.abc import Callable

import einops
import torch
from torch import nn
from torch.nn import functional as F
from zoo_handwritten import HEADS, AdaBlock, Attention, B, Built, D, Mlp, TimeEmbedder, join_heads, split_heads


class UViT(nn.Module):
    """Long skips from the first half of the blocks to the second; the timestep is a token."""

    def __init__(self, half: int = 2) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, D, 2, stride=2), TimeEmbedder()
        self.down, self.up = (nn.ModuleList(self._block() for _ in range(half)) for _ in range(2))
        self.middle, self.head = self._block(), nn.Linear(D, 16)
        self.skips = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(half))

    @staticmethod
    def _block() -> nn.Module:
        return nn.ModuleDict({"norm1": nn.LayerNorm(D), "attn": Attention(), "norm2": nn.LayerNorm(D), "mlp": Mlp()})

    @staticmethod
    def _run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x + block["attn"](block["norm1"](x))
        return x + block["mlp"](block["norm2"](x))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = torch.cat([self.time(t)[:, None], self.patch(x).flatten(2).transpose(1, 2)], dim=1)
        kept: list[torch.Tensor] = []
        for block in self.down:
            x = self._run(block, x)
            kept.append(x)
        x = self._run(self.middle, x)
        for skip, block in zip(self.skips, self.up, strict=True):
            x = self._run(block, skip(torch.cat([x, kept.pop()], dim=-1)))
        return self.head(x[:, 1:])


def uvit() -> Built:
    return UViT(), (torch.randn(B, 4, 6, 8), torch.tensor([0.2, 0.9])), {}


class SpatialTemporal(nn.Module):
    """A video model whose blocks attend over space, then over time."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv3d(4, D, (1, 2, 2), stride=(1, 2, 2)), TimeEmbedder()
        self.blocks = nn.ModuleList(nn.ModuleList([AdaBlock(), AdaBlock()]) for _ in range(depth))
        self.head = nn.Linear(D, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x, c = self.patch(x), self.time(t)
        frames, positions = x.shape[2], x.shape[3] * x.shape[4]
        x = einops.rearrange(x, "b d f h w -> (b f) (h w) d")
        for spatial, temporal in self.blocks:
            x = spatial(x, c.repeat_interleave(frames, dim=0))
            x = einops.rearrange(x, "(b f) n d -> (b n) f d", f=frames)
            x = temporal(x, c.repeat_interleave(positions, dim=0))
            x = einops.rearrange(x, "(b n) f d -> (b f) n d", n=positions)
        return self.head(einops.rearrange(x, "(b f) n d -> b (f n) d", f=frames))


def spatial_temporal() -> Built:
    return SpatialTemporal(), (torch.randn(B, 4, 3, 6, 8), torch.tensor([0.2, 0.9])), {}


class Interleaved(SpatialTemporal):
    """The same with two lists of blocks that one loop walks."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth=0)
        self.spatial, self.temporal = (nn.ModuleList(AdaBlock() for _ in range(depth)) for _ in range(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x, c = self.patch(x), self.time(t)
        frames, positions = x.shape[2], x.shape[3] * x.shape[4]
        x = einops.rearrange(x, "b d f h w -> (b f) (h w) d")
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            x = spatial(x, c.repeat_interleave(frames, dim=0))
            x = einops.rearrange(x, "(b f) n d -> (b n) f d", f=frames)
            x = temporal(x, c.repeat_interleave(positions, dim=0))
            x = einops.rearrange(x, "(b n) f d -> (b f) n d", n=positions)
        return self.head(einops.rearrange(x, "(b f) n d -> b (f n) d", f=frames))


def interleaved() -> Built:
    return Interleaved(), (torch.randn(B, 4, 3, 6, 8), torch.tensor([0.2, 0.9])), {}


class JointBlock(nn.Module):
    """Streams of several modalities with weights of their own and one attention over all of them."""

    def __init__(self, streams: int, width: int = D, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(streams))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(streams))
        self.mlp = nn.ModuleList(Mlp(width) for _ in range(streams))
        self.ada = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(streams))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, streams: list[torch.Tensor], c: torch.Tensor) -> list[torch.Tensor]:
        made = [ada(F.silu(c)).unsqueeze(1).chunk(4, dim=-1) for ada in self.ada]
        packed = [qkv(self.norm(x) * (1 + m[0])) for qkv, x, m in zip(self.qkv, streams, made, strict=True)]
        q, k, v = (split_heads(p, self.heads) for p in torch.cat(packed, dim=1).chunk(3, dim=-1))
        sizes = [x.shape[1] for x in streams]
        mixed = join_heads(F.scaled_dot_product_attention(q, k, v)).split(sizes, dim=1)
        streams = [x + m[1] * o(y) for x, m, o, y in zip(streams, made, self.out, mixed, strict=True)]
        return [x + m[3] * mlp(self.norm(x) * (1 + m[2])) for x, m, mlp in zip(streams, made, self.mlp, strict=True)]


class MMDiT(nn.Module):
    """``streams`` modalities, ``depth`` joint blocks; width, heads and depth are free for property tests."""

    def __init__(self, streams: int = 2, depth: int = 3, width: int = D, heads: int = HEADS) -> None:
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(5 + i, width) for i in range(streams))
        self.time = TimeEmbedder(width)
        self.layers = nn.ModuleList(JointBlock(streams, width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, latent: torch.Tensor, t: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        streams = [into(x) for into, x in zip(self.into, (latent, *others), strict=True)]
        c = self.time(t)
        for layer in self.layers:
            streams = layer(streams, c)
        return self.head(streams[0])


def mmdit_inputs(streams: int) -> tuple[torch.Tensor, ...]:
    others = [torch.randn(B, 5 + 2 * i, 5 + i) for i in range(1, streams)]
    return torch.randn(B, 12, 5), torch.tensor([0.2, 0.9]), *others


def mmdit() -> Built:
    return MMDiT(), mmdit_inputs(2), {}


def three_streams() -> Built:
    return MMDiT(streams=3), mmdit_inputs(3), {}


MODELS: dict[str, Callable[[], Built]] = {
    f.__name__: f for f in (uvit, spatial_temporal, interleaved, mmdit, three_streams)
}
