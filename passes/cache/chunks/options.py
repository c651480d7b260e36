"""``plan.chunks``: how the latent is cut into chunks, and when a chunk is computed."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_tuple(value: Any) -> Any:
    # TOML and torch.compile's options have lists
    return tuple(value) if isinstance(value, list) else value


Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_as_tuple)]
Parts = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], BeforeValidator(_as_tuple)]


class ChunkOptions(BaseModel):
    """When chunks of tokens are computed, and when they keep what they had.

    ``threshold``, ``age``, ``warmup``, ``reset`` and ``last`` are inputs of the program:
    ``ditc.session(cache={...})`` changes them for one generation without compiling anything.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    box: Sizes = Field(
        description="size of a chunk in tokens along frames, height and width, or along height and width of an image"
    )
    grid: Sizes = Field(
        (), description="the tokens' grid, like box, of models whose tokens arrive packed: the graph does not show it"
    )
    threshold: float = Field(
        0.05, ge=0, description="a chunk is computed whose blocks' result last changed by more than this part a step"
    )
    age: float = Field(
        0.25, ge=0, description="a chunk's change counts exp(age) times more for every step that it was not computed"
    )
    warmup: int = Field(4, ge=2, description="steps at the start in which all is computed; a change takes two")
    reset: int = Field(10, ge=0, description="every how many steps all is computed; 0 for never")
    last: int = Field(0, ge=0, description="steps at the end in which all is computed; needs ditc.session(steps=...)")
    capacities: Parts = Field(
        (0.25, 0.5, 0.75), description="parts of all chunks that there is a program for, besides the whole"
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("box", "grid"):
            sizes = getattr(self, name)
            if len(sizes) not in (2, 3) and (name == "box" or sizes):
                raise ValueError(f"{name}={list(sizes)}: two sizes (height, width) or three (frames, height, width)")
        if self.grid:
            check_box(self.grid, self.box)
        if not self.capacities or any(a >= b for a, b in itertools.pairwise(self.capacities)):
            raise ValueError(f"capacities={list(self.capacities)}: at least one is wanted, in rising order, below 1")
        return self

    def controls(self) -> dict[str, float]:
        """The numbers that are inputs of the program, by name."""
        return {
            "threshold": self.threshold,
            "age": self.age,
            "warmup": float(self.warmup),
            "reset": float(self.reset),
            "last": float(self.last),
            "steps": 0.0,
        }


def check_box(grid: tuple[int, ...], box: tuple[int, ...]) -> None:
    """Refuses boxes that do not tile a grid.

    Raises:
        ValueError: names the sizes that would.
    """
    if len(grid) != len(box):
        raise ValueError(f"box={list(box)}: the grid of tokens has {len(grid)} axes, {list(grid)}")
    for size, part in zip(grid, box, strict=True):
        if size % part:
            fit = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ValueError(f"box={list(box)} does not divide the grid {list(grid)}: {size} can be cut by {fit}")
