"""A diffusion transformer small enough to be read: what the tests of the compiler's passes compile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Adaptive layer norm, attention with separate Q, K and V, a gated MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        width = x.shape[-1]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.modulation(F.silu(conditioning)).unsqueeze(1).chunk(6, dim=-1)
        )
        h = F.layer_norm(x, (width,)) * (1 + scale_a) + shift_a
        q, k, v = (
            linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate_a * self.dropout(self.to_out(attended))
        h = F.layer_norm(x, (width,)) * (1 + scale_m) + shift_m
        return x + gate_m * self.down(F.silu(self.gate(h)) * self.up(h))


class TinyDiT(nn.Module):
    """Latent (B, 4, H, W) and timestep (B,) to velocity (B, 4, H, W)."""

    def __init__(self, depth: int = 2, width: int = 24, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.patch = nn.Conv2d(4, width, 2, stride=2)
        self.time_in, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.head = nn.Linear(width, 16)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        batch, _, height, width = hidden_states.shape
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=timestep.device) / half)
        angles = timestep[:, None].float() * frequencies
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1).to(hidden_states.dtype)
        conditioning = self.time_out(F.silu(self.time_in(embedding)))
        x = self.patch(hidden_states).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, conditioning)
        x = self.head(F.layer_norm(x, (self.width,)))
        x = x.reshape(batch, height // 2, width // 2, 2, 2, 4).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, 4, height, width)


@pytest.fixture
def make_dit() -> Callable[..., TinyDiT]:
    """Builds a seeded :class:`TinyDiT` in evaluation mode."""

    def make(seed: int = 0, **options: float) -> TinyDiT:
        torch.manual_seed(seed)
        return TinyDiT(**options).eval()  # type: ignore[arg-type]

    return make


@pytest.fixture
def dit_inputs() -> Callable[..., tuple[Tensor, Tensor]]:
    """Builds seeded inputs of :class:`TinyDiT`."""

    def make(
        batch: int = 2, size: int = 8, time: float = 500.0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch * 1000 + size)
        latent = torch.randn(batch, 4, size, size, generator=generator).to(dtype)
        return latent, torch.full((batch,), time)

    return make


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewrites as on a CPU without special instructions, so that graphs are the same on every machine."""
    monkeypatch.setattr("ditc.passes.quantize.vnni.vnni_reason", lambda: "not in this test")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Each test compiles anew: what one test compiled must not serve, or limit, another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
