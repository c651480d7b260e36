"""The demo's diffusion transformer: a small `WanTransformer3DModel` on pixels, and how it is told which digit to draw.

The model predicts the velocity v = eps - x0 of a rectified flow x = (1 - sigma) x0 + sigma eps at timestep
1000 * sigma, as Wan does. A class takes the place of Wan's text: `TOKENS` one-hot tokens, so that the transformer's own
text projection is the class table and nothing else has to be shipped beside it.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditc.examples.digits.data import CLASSES, CLIP_SHAPE, SIZE

NULL_CLASS = CLASSES
TOKENS = 4
TEXT_DIM = 16
TIMESTEPS = 1000
WEIGHTS = Path(__file__).parent / "weights"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

CONFIG: dict[str, Any] = {
    "patch_size": (2, 4, 4),
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": TEXT_DIM,
    "freq_dim": 256,
    "ffn_dim": 576,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}


def build_transformer(**changes: Any) -> nn.Module:
    """A freshly initialised fp32 `WanTransformer3DModel` in the demo's configuration, with `changes` to its fields."""
    unknown = sorted(set(changes) - set(CONFIG))
    if unknown:
        raise ValueError(f"unknown configuration fields {unknown}; the demo sets {sorted(CONFIG)}")
    model: nn.Module = _wan_class()(**CONFIG | changes)
    # as in DiT (Peebles & Xie 2023): a velocity that starts at zero
    nn.init.zeros_(model.get_submodule("proj_out").weight)  # type: ignore[arg-type]
    nn.init.zeros_(model.get_submodule("proj_out").bias)  # type: ignore[arg-type]
    return model


def load_transformer(folder: Path = WEIGHTS) -> nn.Module:
    """The trained transformer in eval mode, fp32 (it is stored as fp16).

    `WanTransformer3DModel.from_pretrained(folder)` reads the same folder; it needs `accelerate`, this does not.

    Raises:
        FileNotFoundError: `folder` holds no transformer.
        RuntimeError: the weights are not those of the configuration beside them.
    """
    from safetensors.torch import load_file

    for name in ("config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}: train a transformer with ditc.examples.digits.train")
    wan = _wan_class()
    model: nn.Module = wan.from_config(wan.load_config(folder))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()})
    return model.eval()


def class_tokens(labels: Tensor) -> Tensor:
    """Conditioning (B, TOKENS, TEXT_DIM) fp32 for `labels` (B,) int64 in 0..10, where 10 asks for no class at all."""
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape (B,); got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) > NULL_CLASS:
        raise ValueError(f"labels must be digits 0..{CLASSES - 1}, or {NULL_CLASS} for no class")
    tokens = torch.zeros(len(labels), TOKENS, TEXT_DIM, device=labels.device)
    tokens[torch.arange(len(labels), device=labels.device), :, labels] = 1
    slot = torch.arange(TOKENS, device=labels.device)
    tokens[:, slot, NULL_CLASS + 1 + slot] = 1
    # unit variance over the embedding, which is what a linear layer's default initialisation expects
    return tokens * math.sqrt(TEXT_DIM / 2)


def check_video(video: Tensor) -> None:
    """Raise ValueError unless `video` is a batch of clips (B, 1, 8, 24, 24), floating point, finite, within [-1, 1]."""
    if video.ndim != 5 or len(video) == 0 or tuple(video.shape[1:]) != CLIP_SHAPE:
        raise ValueError(
            f"clips must have the shape (B, {', '.join(map(str, CLIP_SHAPE))}), B >= 1; got {tuple(video.shape)}"
        )
    if not video.is_floating_point() or not bool(torch.isfinite(video).all()):
        raise ValueError("clips must be finite floating point numbers: found NaN, infinity or integers")
    if float(video.abs().max()) > 1 + 1e-5:
        raise ValueError(f"clips must lie within [-1, 1]; got up to {float(video.abs().max()):.3g} at {SIZE} px")


def _wan_class() -> Any:
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise ImportError("the demo's transformer comes from diffusers: pip install 'ditc[demo]'") from error
    return WanTransformer3DModel
