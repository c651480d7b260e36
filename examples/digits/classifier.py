"""The independent judge: a small convolutional network that reads the digit in a single frame.

It is trained on its own part of the digits, drawn as in the clips but also rotated, sheared and scaled; the teacher's
images and the held-out ones are new to it. Its 32 features are the space in which Fréchet distances are taken.

    python -m ditc.examples.digits.classifier --out examples/digits/weights
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from ditc.distill.seeds import seeded
from ditc.examples.digits.data import CLASSES, SIZE, Split, load_digits, make_clips
from ditc.examples.digits.model import WEIGHTS, check_video
from ditc.runtime.quality import accuracy

FEATURES = 32
FILE = "classifier.safetensors"


class Classifier(nn.Module):
    """Frames (N, 1, 24, 24) in [-1, 1] -> logits (N, 10). It ends in a global maximum: position hardly matters."""

    def __init__(self) -> None:
        super().__init__()
        channels = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(n, m, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(m), nn.ReLU(inplace=True)
                )
                for n, m, stride in channels
            )
        )
        self.project = nn.Linear(64, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, frames: Tensor) -> Tensor:
        """(N, 1, 24, 24) -> (N, 32)."""
        if frames.ndim != 4 or tuple(frames.shape[1:]) != (1, SIZE, SIZE):
            raise ValueError(f"frames must have the shape (N, 1, {SIZE}, {SIZE}); got {tuple(frames.shape)}")
        pooled: Tensor = self.project(self.body(frames).amax((2, 3)))
        return pooled

    def forward(self, frames: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(frames).relu())
        return logits


@torch.no_grad()
def judge_clips(classifier: Classifier, video: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch of clips (B, 1, F, 24, 24) in [-1, 1] shows, on the classifier's device.

    Returns:
        The digit of each clip (B,) int64, by the mean probability over its frames, and the features (B * F, 32) fp32 of
        its frames.
    """
    check_video(video)
    frames = video.float().transpose(1, 2).flatten(0, 1)
    features = classifier.features(frames)
    probability = classifier.head(features.relu()).softmax(-1).unflatten(0, (len(video), -1)).mean(1)
    return probability.argmax(-1), features


def load_classifier(folder: Path = WEIGHTS) -> Classifier:
    """The trained classifier, in eval mode."""
    from safetensors.torch import load_file

    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"no classifier at {path}: train it with python -m ditc.examples.digits.classifier")
    classifier = Classifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


def _draw_warps(count: int, generator: torch.Generator) -> Tensor:
    def around(centre: float, spread: float) -> Tensor:
        return centre + spread * (2 * torch.rand(count, generator=generator) - 1)

    angle, shear = around(0, math.radians(14)), around(0, 0.15)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), -1).view(-1, 2, 2)
    stretch = torch.stack((around(1, 0.12), shear, torch.zeros(count), around(1, 0.12)), -1).view(-1, 2, 2)
    return rotation @ stretch


def train_classifier(steps: int, seed: int = 0, batch: int = 32) -> Classifier:
    """Train on the classifier's own split; two frames of each of `batch` clips a step."""
    if steps < 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1; got {steps} and {batch}")
    digits = load_digits("classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier().train()
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for step in track(range(steps), description="Training the classifier", console=Console(stderr=True)):
        generator = seeded(seed, step, 1)
        clips = make_clips(digits, batch, generator, warp=_draw_warps(batch, generator))
        frames = clips.video[:, :, [0, -1]].transpose(1, 2).flatten(0, 1)
        # generated frames are not noise-free: the judge must not stumble over a grain of it
        frames = frames + 0.1 * torch.rand(len(frames), 1, 1, 1, generator=generator) * torch.randn(
            frames.shape, generator=generator
        )
        labels = clips.labels.repeat_interleave(2)
        loss = F.cross_entropy(classifier(frames), labels, label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def measure_classifier(classifier: Classifier, split: Split, clips: int = 1000, seed: int = 1) -> dict[str, float]:
    """Share of frames, and of clips, of `split` whose digit is read correctly."""
    drawn = make_clips(load_digits(split), clips, seeded(seed), balanced=True)
    by_clip, features = judge_clips(classifier, drawn.video)
    by_frame = classifier.head(features.relu()).argmax(-1)
    return {
        "frames": accuracy(by_frame, drawn.labels.repeat_interleave(drawn.video.shape[2])),
        "clips": accuracy(by_clip, drawn.labels),
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder for classifier.safetensors and classifier.json")] = WEIGHTS,
    steps: Annotated[int, typer.Option(min=1)] = 1500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train the classifier that judges the demo's clips, and measure it on digits it has not seen."""
    from safetensors.torch import save_file

    began = time.monotonic()
    classifier = train_classifier(steps, seed)
    result = {
        "command": f"python -m ditc.examples.digits.classifier --steps {steps} --seed {seed}",
        "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
        "seconds": round(time.monotonic() - began, 1),
        "accuracy": {split: measure_classifier(classifier, split) for split in ("held-out", "teacher", "classifier")},
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), out / FILE)
    (out / "classifier.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    typer.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
