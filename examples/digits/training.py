"""Flow-matching training of the demo's transformer: the recipe, an optimiser step, the state that survives a kill.

Every random draw of step k (clips, noise, times, dropped classes) comes from a generator seeded with (seed, k). So a
run that is killed and resumed equals, bit for bit on the same machine, one that was not: no generator state is stored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditc.distill.checkpoint import write_checkpoint
from ditc.distill.seeds import seeded
from ditc.examples.digits.data import Digits, make_clips
from ditc.examples.digits.model import NULL_CLASS, TIMESTEPS, build_transformer, check_video, class_tokens

Precision = Literal["bf16", "fp32"]
_FORMAT = 1
# the parts of a recipe that a resumed run may change: where it ends
_MAY_CHANGE = {"steps"}


@dataclass(frozen=True)
class Recipe:
    """What determines a training run.

    The learning rates rise over `warmup` steps, stay, and fall linearly to 0 over the last `decay` of all steps, so the
    run can be lengthened or cut short until that fall begins.
    """

    steps: int = 3200
    batch: int = 32
    learning_rate: float = 1e-3
    muon_learning_rate: float = 4e-3
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema: float = 0.999
    class_dropout: float = 0.1
    precision: Precision = "bf16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        for name in ("learning_rate", "muon_learning_rate"):
            if not 0 < getattr(self, name) <= 0.1:
                raise ValueError(f"{name} must be in (0, 0.1]; got {getattr(self, name)}")
        if not self.clip_norm > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"clip_norm must be positive and weight_decay not negative; got {self.clip_norm}, {self.weight_decay}"
            )
        for name in ("decay", "ema", "class_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision must be bf16 or fp32; got {self.precision!r}")

    def pace_at(self, step: int) -> float:
        """The share, in (0, 1], of the learning rates that step `step`, counted from 0, goes at."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.decay * self.steps
        fall = min(1.0, (self.steps - step) / falling) if falling else 1.0
        return min(rise, max(fall, 0.0))


@dataclass(frozen=True)
class StepResult:
    """The loss (mean squared error of the velocity) and the gradient's norm before clipping, of one step."""

    loss: float
    grad_norm: float


class Trainer:
    """A transformer in training: `model`, its moving average `ema`, the `optimisers`, and `step`, the steps done."""

    def __init__(self, digits: Digits, recipe: Recipe, device: str = "cpu", **changes: Any) -> None:
        self.digits = digits
        self.recipe = recipe
        self.device = torch.device(device)
        self.changes = changes
        self.step = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.model = build_transformer(**changes).to(self.device).train()
        self.ema = build_transformer(**changes).to(self.device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.model.state_dict())
        self.optimisers = _build_optimisers(self.model, recipe)

    def train_step(self) -> StepResult:
        """Take one optimiser step. Raises FloatingPointError, before weights change, where the loss is not finite."""
        loss = self.loss(self.step)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(f"loss is {float(loss.detach())} at step {self.step}: lower the learning rate")
        self.model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm, error_if_nonfinite=True)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["initial_lr"] * self.recipe.pace_at(self.step)
            optimiser.step()
        self.step += 1
        self._average()
        return StepResult(float(loss.detach()), float(norm))

    def loss(self, step: int) -> Tensor:
        """Flow-matching loss on the batch of `step`: logit-normal times (Esser et al. 2024), target eps - x0."""
        recipe = self.recipe
        generator = seeded(recipe.seed, step)
        clips = make_clips(self.digits, recipe.batch, generator)
        check_video(clips.video)
        noise = torch.randn(clips.video.shape, generator=generator)
        sigma = torch.randn(recipe.batch, generator=generator).sigmoid()
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.class_dropout
        labels = clips.labels.masked_fill(dropped, NULL_CLASS)
        mixing = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - mixing) * clips.video + mixing * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            velocity = self.model(
                noisy.to(self.device),
                TIMESTEPS * sigma.to(self.device),
                class_tokens(labels).to(self.device),
                return_dict=False,
            )[0]
        return F.mse_loss(velocity.float(), (noise - clips.video).to(self.device))

    def save(self, path: Path) -> None:
        """Write a checkpoint. It replaces the previous one only when it is complete."""
        state = {
            "format": _FORMAT,
            "recipe": asdict(self.recipe),
            "changes": self.changes,
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        write_checkpoint(path, state)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint. Raises ValueError where it belongs to another recipe or architecture."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if not isinstance(state, Mapping) or state.get("format") != _FORMAT:
            raise ValueError(f"{path} is not a checkpoint of this script (format {_FORMAT})")
        ours = asdict(self.recipe)
        differing = [key for key in ours if key not in _MAY_CHANGE and state["recipe"].get(key) != ours[key]]
        if differing or state["changes"] != self.changes:
            told = ", ".join(f"{key}: {state['recipe'].get(key)} there, {ours[key]} here" for key in differing)
            if state["changes"] != self.changes:
                told += f" model: {state['changes']} there, {self.changes} here"
            raise ValueError(
                f"{path} is of another configuration ({told.strip()}); "
                "give the same options, or another --out to start afresh"
            )
        if state["step"] > self.recipe.steps:
            raise ValueError(f"{path} is at step {state['step']}, beyond the {self.recipe.steps} asked for")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step = state["step"]

    @torch.no_grad()
    def _average(self) -> None:
        # a short memory at first, so that the initial weights are forgotten
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        for averaged, current in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)


def _build_optimisers(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(
        others, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["initial_lr"] = group["lr"]
    return muon, adam
