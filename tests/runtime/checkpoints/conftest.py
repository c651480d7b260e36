"""A small network, and checkpoints of it written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Net(nn.Module):
    """Two linear layers with a norm between them; K is divisible by what every format needs."""

    def __init__(self, hidden: int = 96) -> None:
        super().__init__()
        self.inner = nn.Linear(64, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.outer = nn.Linear(hidden, 48, bias=False)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("positions", torch.linspace(0, 1, 64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(self.norm(self.inner(x + self.positions)))) * self.table.sum()


@pytest.fixture(scope="session")
def net() -> Callable[..., nn.Module]:
    """``net(seed=0, hidden=96)``: a network with random weights."""

    def build(seed: int = 0, hidden: int = 96) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Net(hidden).eval()

    return build


@pytest.fixture(scope="session")
def swizzled() -> Callable[[Tensor], Tensor]:
    """Scales in rows as cuBLAS wants them: tiles of 128 x 4, element by element as its documentation numbers them."""

    def swizzle(scale: Tensor) -> Tensor:
        rows, columns = scale.shape
        tiles_down, tiles_across = -(-rows // 128), -(-columns // 4)
        flat = torch.zeros(tiles_down * tiles_across * 512, dtype=torch.uint8)
        bits = scale.view(torch.uint8)
        for r in range(rows):
            for c in range(columns):
                tile = (r // 128) * tiles_across + c // 4
                flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = bits[r, c]
        return flat.view(scale.dtype).reshape(tiles_down * 128, tiles_across * 4)

    return swizzle


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(tensors, config=None, metadata=None, name="model")``: a folder with one file; its path."""

    def written(
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        name: str = "model",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", metadata=text or None)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return written


@pytest.fixture(scope="session")
def pack() -> Callable[[Tensor], dict[str, Tensor]]:
    """NVFP4 by the definition, naively: ``pack(w)`` gives ``q``, ``scale``, ``outer`` and the ``values`` they mean."""
    levels = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def packed(w: Tensor) -> dict[str, Tensor]:
        blocks = w.float().reshape(w.shape[0], -1, 16)
        outer = w.float().abs().max() / (6 * 448)
        scale = (blocks.abs().amax(-1) / 6 / outer).clamp(2**-6, 448).to(torch.float8_e4m3fn)
        real = scale.float() * outer
        codes = (blocks.unsqueeze(-1) / real[..., None, None] - levels).abs().argmin(-1).flatten(1).to(torch.uint8)
        values = (levels[codes.long()].reshape_as(blocks) * real.unsqueeze(-1)).flatten(1)
        return {"q": codes[:, ::2] | codes[:, 1::2] << 4, "scale": scale, "outer": outer, "values": values}

    return packed


@pytest.fixture(scope="session")
def nvfp4_tensors(pack: Callable[[Tensor], dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """A network's tensors with both linear layers in NVFP4 under modelopt's names, scales in rows."""

    def tensors(model: nn.Module) -> dict[str, Tensor]:
        found = {k: t.clone() for k, t in model.state_dict().items()}
        for name in ("inner", "outer"):
            parts = pack(found[f"{name}.weight"])
            found |= {f"{name}.weight": parts["q"], f"{name}.weight_scale": parts["scale"]}
            found[f"{name}.weight_scale_2"] = parts["outer"]
        return found

    return tensors


@pytest.fixture(scope="session")
def modelopt_config() -> Callable[..., dict[str, Any]]:
    """``config.json`` as modelopt leaves it, reduced to what counts."""

    def config(algorithm: str, **more: Any) -> dict[str, Any]:
        return {
            "_class_name": "Net",
            "quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm, **more},
        }

    return config
