"""Example inputs for a diffusers transformer, made up from its configuration.

``ditc explain MODEL`` has a model and no pipeline around it. This file knows the vocabulary in which diffusers' models
name their arguments and configuration fields (never a model's name), proposes inputs, and keeps the first proposal
with which the model runs. The compiler itself knows nothing of this: analysis starts from the captured graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditc.passes.errors import CaptureError

_TEXT_TOKENS = 16
_BATCH = 2


@dataclass(frozen=True)
class _Maker:
    """What the makers of inputs need to know: the configuration and where tensors go."""

    config: Mapping[str, Any]
    latent: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def find(self, *names: str) -> int:
        for name in names:
            value = self.config.get(name)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        raise CaptureError(f"the configuration has none of {', '.join(names)}")

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    @property
    def tokens(self) -> int:
        return self.latent[1] if len(self.latent) == 3 else 1

    def text(self) -> torch.Tensor:
        names = ("caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim", "joint_attention_dim")
        return self.normal(_BATCH, _TEXT_TOKENS, self.find(*names, "cross_attention_input_dim", "cross_attention_dim"))

    def ids(self, tokens: int) -> torch.Tensor:
        axes = self.config.get("axes_dims_rope") or (0, 0, 0)
        ids = torch.zeros(tokens, len(axes), device=self.device)
        ids[:, -1] = torch.arange(tokens, device=self.device)
        return ids

    def timestep(self) -> torch.Tensor:
        integers = self.config.get("num_embeds_ada_norm") is not None
        return torch.full((_BATCH,), 1, device=self.device, dtype=torch.int64 if integers else self.dtype)

    def padding_mask(self) -> torch.Tensor:
        return self.ones(1, 1, *self.latent[-2:])


_TENSORS: dict[str, Callable[[_Maker], Any]] = {
    "hidden_states": lambda m: m.normal(*m.latent),
    "timestep": _Maker.timestep,
    "encoder_hidden_states": _Maker.text,
    "pooled_projections": lambda m: m.normal(_BATCH, m.find("pooled_projection_dim")),
    "class_labels": lambda m: torch.zeros(_BATCH, dtype=torch.int64, device=m.device),
    "guidance": lambda m: m.ones(_BATCH) if m.config.get("guidance_embeds") else None,
    "img_ids": lambda m: m.ids(m.tokens),
    "txt_ids": lambda m: m.ids(_TEXT_TOKENS),
    "encoder_attention_mask": lambda m: torch.ones(_BATCH, _TEXT_TOKENS, dtype=torch.int64, device=m.device),
    "encoder_hidden_states_mask": lambda m: torch.ones(_BATCH, _TEXT_TOKENS, dtype=torch.bool, device=m.device),
    "img_shapes": lambda m: [(1, 8, m.tokens // 8)] * _BATCH,
    "padding_mask": _Maker.padding_mask,
    "fps": lambda m: 24,
    "num_frames": lambda m: 2,
    "height": lambda m: 4,
    "width": lambda m: m.tokens // 8,
    "global_hidden_states": lambda m: m.normal(_BATCH, 1, m.find("global_states_input_dim")),
    "rotary_embedding": lambda m: tuple(m.ones(m.latent[-1] + 1, m.find("attention_head_dim") // 2) for _ in "cs"),
    "added_cond_kwargs": lambda m: {"resolution": m.ones(_BATCH, 2), "aspect_ratio": m.ones(_BATCH, 1)},
}
"""What an argument of this name holds, in diffusers' vocabulary."""

# arguments with a default that make no difference to the structure unless the model insists on them
_OPTIONAL = {"encoder_attention_mask", "padding_mask", "fps", "encoder_hidden_states_mask"}


def example_inputs(model: torch.nn.Module, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Keyword arguments with which ``model`` runs.

    Args:
        model: a transformer of diffusers; weights may be on the ``meta`` device.
        given: arguments that are known; the others are made up.

    Raises:
        CaptureError: the model is no diffusers model, or no proposal runs; the message holds the model's arguments
            and what went wrong with the most plausible proposal.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise CaptureError(
            f"no inputs were given and {type(model).__name__} has no diffusers configuration to make them up from: "
            "pass args or kwargs"
        )
    parameters = inspect.signature(model.forward).parameters
    device = next(iter(model.parameters())).device
    faults: list[str] = []
    for layout, latent in _latents(model, config):
        maker = _Maker(config, latent, device, _float_dtype(model))
        for optional in (False, True):
            proposal = _propose(parameters, maker, dict(given or {}), optional)
            fault = _try(model, proposal) if isinstance(proposal, dict) else proposal
            if fault is None:
                assert isinstance(proposal, dict)
                return proposal
            faults.append(f"  a latent of {layout}: {fault}")
    raise CaptureError(
        f"no inputs could be made up for {type(model).__name__}({', '.join(parameters)}). Tried:\n"
        + "\n".join(dict.fromkeys(faults))
        + "\nGive its inputs (ditc explain --input NAME=SHAPE), or real weights where shapes do not suffice."
    )


def _float_dtype(model: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _latents(model: torch.nn.Module, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Plausible shapes of the latent, the likeliest first."""
    channels = config.get("in_channels") or 4
    patch = config.get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
    size = config.get("sample_size")
    side = size if isinstance(size, int) else 8 * patch
    frames = 2 * (config.get("patch_size_t") or 1)
    volume = ("batch, channels, frames, height, width", (_BATCH, channels, frames, side, side))
    image = ("batch, channels, height, width", (_BATCH, channels, side, side))
    packed = ("batch, tokens, channels", (_BATCH, 64, channels))
    frames_first = ("batch, frames, channels, height, width", (_BATCH, frames, channels, side, side))
    audio = ("batch, channels, tokens", (_BATCH, channels, side))
    kinds = {type(module).__name__ for module in model.modules()}
    if "Conv3d" in kinds:
        yield from (volume, image, packed, frames_first, audio)
    elif "Conv2d" in kinds:
        yield from (image, volume, frames_first, packed, audio)
    else:
        yield from (packed, volume, image, audio, frames_first)


def _propose(
    parameters: Mapping[str, inspect.Parameter], maker: _Maker, given: dict[str, Any], optional: bool
) -> dict[str, Any] | str:
    values = dict(given)
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty
        if name in values or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name == "return_dict":
            values[name] = False
        elif name in _TENSORS and (required or optional or name not in _OPTIONAL):
            try:
                value = _TENSORS[name](maker)
            except CaptureError as error:
                if required:
                    return f"{name}: {error}"
                continue
            if value is not None or required:
                values[name] = value
        elif required:
            return f"nothing is known about the argument {name!r}"
    return values


def _try(model: torch.nn.Module, proposal: dict[str, Any]) -> str | None:
    """Why the model does not run with these inputs; it runs on shapes alone where that is possible."""
    from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedFakeTensorException

    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            model(**proposal)
    except (UnsupportedFakeTensorException, torch._subclasses.fake_tensor.DataDependentOutputException):
        return _try_for_real(model, proposal)
    except Exception as error:  # noqa: BLE001 - any error of the model's own means: not these inputs
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None


def _try_for_real(model: torch.nn.Module, proposal: dict[str, Any]) -> str | None:
    try:
        with torch.no_grad():
            model(**proposal)
    except Exception as error:  # noqa: BLE001 - as above
        return f"{type(error).__name__}: {error}".split("\n")[0]
    return None
