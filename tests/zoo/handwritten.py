"""Diffusion transformers by hand, each in another style: name → a function that returns (model, args, kwargs)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import einops
import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
B = 2
D = 24
HEADS = 2


def sinusoid(t: torch.Tensor, width: int = 16) -> torch.Tensor:
    """(…,) -> (…, width)."""
    frequencies = torch.exp(-math.log(1e4) * torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedder(nn.Module):
    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return self.net(sinusoid(t))


def split_heads(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    return einops.rearrange(x, "b n (h d) -> b h n d", h=heads)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    return einops.rearrange(x, "b h n d -> b n (h d)")


class Attention(nn.Module):
    """One packed projection and one SDPA."""

    def __init__(self, width: int = D, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)))


class Mlp(nn.Module):
    def __init__(self, width: int = D, ratio: int = 3) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class AdaBlock(nn.Module):
    """Attention and MLP, each with shift, scale and gate from the conditioning."""

    def __init__(self, attention: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(D, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = attention or Attention(), mlp or Mlp()
        self.ada = nn.Linear(D, 6 * D)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        parts = self.ada(F.silu(c))
        if parts.dim() == 2:
            parts = parts.unsqueeze(1)
        s1, b1, g1, s2, b2, g2 = parts.chunk(6, dim=-1)
        x = x + g1 * self.attn(self.norm1(x) * (1 + s1) + b1)
        return x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)


class EinopsDiT(nn.Module):
    """A plain DiT: patches by ``rearrange``, adaLN, class label."""

    def __init__(self, depth: int = 3, block: Callable[[], nn.Module] = AdaBlock) -> None:
        super().__init__()
        self.patch = nn.Linear(4 * 2 * 2, D)
        self.pos = nn.Parameter(torch.randn(1, 12, D) * 0.02)
        self.time, self.label = TimeEmbedder(), nn.Embedding(10, D)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.norm, self.ada, self.head = nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.Linear(D, 16)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        x = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        x = self.patch(x) + self.pos
        c = self.time(t) + self.label(y)
        for block in self.blocks:
            x = block(x, c)
        scale, shift = self.ada(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        return einops.rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=2, q=2)


def image_inputs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(B, 4, 6, 8), torch.tensor([0.2, 0.9]), torch.tensor([1, 3])), {}


def _image(model: nn.Module) -> Built:
    return model, *image_inputs()


def einops_dit() -> Built:
    return _image(EinopsDiT())


class TorchAttention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.weights = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=self.weights)[0]


def mha_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(TorchAttention(False))))


def mha_weights_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(TorchAttention(True))))


class ExplicitAttention(nn.Module):
    """Softmax by hand: RMS norms and RoPE in front, an additive bias, grouped keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.q_scale, self.k_scale = nn.Parameter(torch.ones(D // HEADS)), nn.Parameter(torch.ones(D // HEADS))
        self.bias = nn.Parameter(torch.zeros(HEADS, 12, 12))

    @staticmethod
    def rms(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * scale

    @staticmethod
    def rope(x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(x.shape[-2]).float(), 1.0 / 10 ** torch.arange(x.shape[-1] // 2).float())
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        a, b = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-b, a], dim=-1) * sin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = split_heads(self.q(x))
        k, v = (part.unsqueeze(1).repeat(1, HEADS, 1, 1) for part in self.kv(x).chunk(2, dim=-1))
        q, k = self.rope(self.rms(q, self.q_scale)), self.rope(self.rms(k, self.k_scale))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + self.bias
        return self.o(join_heads(torch.softmax(scores, dim=-1) @ v))


def explicit_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(ExplicitAttention())))


class EinsumAttention(nn.Module):
    """Heads stay where the projection leaves them; masked with ``masked_fill``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(D, HEADS, D // HEADS) * 0.1) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, D // HEADS, D) * 0.1)
        self.register_buffer("mask", torch.eye(12).bool(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (torch.einsum("bnc,chd->bnhd", x, w) for w in (self.q, self.k, self.v))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(self.mask, -1e9).softmax(dim=-1)
        return torch.einsum("bnhd,hdc->bnc", torch.einsum("bhnm,bmhd->bnhd", weights, v), self.o)


def einsum_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(EinsumAttention())))


class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.Linear(D, 2 * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PackedGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(D, 4 * D), nn.Linear(2 * D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.wi(x).chunk(2, dim=-1)
        return self.wo(value * F.gelu(gate))


class GatedAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (split_heads(part) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(join_heads(F.scaled_dot_product_attention(q, k, v)) * self.gate(x).sigmoid())


def swiglu_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(GatedAttention(), SwiGlu())))


def geglu_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(mlp=PackedGlu())))


class ParallelBlock(nn.Module):
    """One linear makes query, key, value and the MLP's input; one closes both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ada = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, 3 * D)
        self.into, self.out = nn.Linear(D, 3 * D + 2 * D), nn.Linear(D + 2 * D, D)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift, gate = self.ada(F.silu(c)).unsqueeze(1).chunk(3, dim=-1)
        q, k, v, hidden = self.into(self.norm(x) * (1 + scale) + shift).split([D, D, D, 2 * D], dim=-1)
        a = join_heads(F.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v)))
        return x + gate * self.out(torch.cat([a, F.gelu(hidden)], dim=-1))


def parallel_dit() -> Built:
    return _image(EinopsDiT(block=ParallelBlock))


class Recurrent(EinopsDiT):
    """One block, called four times."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.block = AdaBlock()

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        x, c = self.patch(x) + self.pos, self.time(t) + self.label(y)
        for _ in range(4):
            x = self.block(x, c)
        return self.head(self.norm(x))


def recurrent_dit() -> Built:
    return _image(Recurrent())


class Functional(nn.Module):
    """No submodules: parameters by kind, one list each; a learned Fourier embedding of the timestep."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()

        def weights(*shape: int, count: int = depth) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.randn(*shape) * 0.1) for _ in range(count))

        self.patch, self.out = nn.Parameter(torch.randn(16, D) * 0.1), nn.Parameter(torch.randn(D, 16) * 0.1)
        self.frequencies = nn.Parameter(torch.randn(8))
        self.t1, self.t2 = nn.Parameter(torch.randn(16, D) * 0.1), nn.Parameter(torch.randn(D, D) * 0.1)
        self.qkv, self.proj, self.ada = weights(D, 3 * D), weights(D, D), weights(D, 6 * D)
        self.up, self.down, self.bias = weights(D, 3 * D), weights(3 * D, D), weights(3 * D)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2) @ self.patch
        angles = 2 * math.pi * t[:, None] * self.frequencies
        c = F.silu(torch.cat([angles.sin(), angles.cos()], dim=-1) @ self.t1) @ self.t2
        for qkv, proj, ada, up, down, bias in zip(
            self.qkv, self.proj, self.ada, self.up, self.down, self.bias, strict=True
        ):
            s1, b1, g1, s2, b2, g2 = (F.silu(c) @ ada)[:, None].chunk(6, dim=-1)
            q, k, v = (split_heads(p) for p in ((F.layer_norm(x, (D,)) * (1 + s1) + b1) @ qkv).chunk(3, dim=-1))
            x = x + g1 * (join_heads(F.scaled_dot_product_attention(q, k, v)) @ proj)
            hidden = torch.addmm(bias, (F.layer_norm(x, (D,)) * (1 + s2) + b2).flatten(0, 1), up)
            x = x + g2 * (F.relu(hidden) @ down).view_as(x)
        return x @ self.out


def functional_dit() -> Built:
    return Functional(), (torch.randn(B, 4, 6, 8), torch.tensor([0.2, 0.9])), {}


class PerToken(nn.Module):
    """A timestep for each token: the conditioning has a token axis."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.time, self.head = nn.Linear(5, D), TimeEmbedder(), nn.Linear(D, 5)
        self.blocks = nn.ModuleList(AdaBlock() for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x, c = self.into(x), self.time(timestep)
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


def per_token() -> Built:
    return PerToken(), (torch.randn(B, 12, 5), torch.rand(B, 12)), {}


class Broken(EinopsDiT):
    """Breaks the graph between its blocks."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        x, c = self.patch(x) + self.pos, self.time(t) + self.label(y)
        for i, block in enumerate(self.blocks):
            x = block(x, c)
            if i == 1:
                torch._dynamo.graph_break()
        return self.head(self.norm(x))


def broken() -> Built:
    return _image(Broken(depth=4))


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.ada = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, 2 * D)
        self.tokens = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.channels = Mlp()

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        scale, shift = self.ada(c).unsqueeze(1).chunk(2, dim=-1)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x) * (1 + scale) + shift)


def mixer() -> Built:
    return _image(EinopsDiT(block=MixerBlock))


class ConvNet(nn.Module):
    """No transformer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = x + F.relu(conv(x))
        return x


def convnet() -> Built:
    return ConvNet(), (torch.randn(B, 4, 8, 8),), {}


class NoNumbers(EinopsDiT):
    """Blocks in attributes of their own instead of a list; registers beside the tokens."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.first, self.second, self.third = AdaBlock(), AdaBlock(), AdaBlock()
        self.registers = nn.Parameter(torch.randn(1, 3, D))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = einops.rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        x, c = self.patch(x) + self.pos, self.time(t) + self.label(y)
        x = torch.cat([self.registers.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.third(self.second(self.first(x, c), c), c)
        return self.head(self.norm(x))[:, 3:]


def no_numbers() -> Built:
    return _image(NoNumbers())


class RawTime(EinopsDiT):
    """The timestep goes through a small MLP as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return super().forward(x, t[:, None], y)


def raw_time() -> Built:
    return _image(RawTime())


class TableTime(EinopsDiT):
    """Discrete timesteps index a table."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, D)


def table_time() -> Built:
    model, (x, _, y), kwargs = _image(TableTime())
    return model, (x, torch.tensor([3, 700]), y), kwargs


class LowRank(nn.Module):
    """A linear with an adapter beside it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base, self.a, self.b = (
            nn.Linear(width, out),
            nn.Linear(width, 4, bias=False),
            nn.Linear(4, out, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.5


def lora_dit() -> Built:
    model = EinopsDiT()
    for block in model.blocks:
        block.attn.qkv, block.mlp.fc1 = LowRank(D, 3 * D), LowRank(D, 3 * D)
        block.attn.proj, block.mlp.fc2 = LowRank(D, D), LowRank(3 * D, D)
    return _image(model)


class WindowAttention(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = einops.rearrange(x, "b (w n) d -> (b w) n d", w=3)
        return einops.rearrange(super().forward(x), "(b w) n d -> b (w n) d", w=3)


def window_dit() -> Built:
    return _image(EinopsDiT(block=lambda: AdaBlock(WindowAttention())))


MODELS: dict[str, Callable[[], Built]] = {
    f.__name__: f
    for f in (
        einops_dit, mha_dit, mha_weights_dit, explicit_dit, einsum_dit, swiglu_dit, geglu_dit, parallel_dit,
        recurrent_dit, functional_dit, per_token, broken,
        mixer, convnet, no_numbers, raw_time, table_time, lora_dit, window_dit,
    )
}  # fmt: skip
