"""Chunks: what a sparse step computes and keeps, by an independent reference, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ditc
from ditc.passes.cache.chunks.decide import capacity, decide, settle
from ditc.passes.cache.chunks.grid import Grid
from ditc.passes.cache.chunks.guard import DenseWarning
from ditc.passes.cache.chunks.state import Chunked
from ditc.passes.errors import PlanError
from ditc.passes.plan import Plan

STEPS = 6
BOX = {"box": [2, 2], "warmup": 2, "reset": 0}
"""Chunks of two by two tokens: four of TinyDiT's latent of 8x8 pixels, whose patches are two wide."""


def compiled(model: nn.Module, chunks: dict[str, Any], **plan: Any) -> nn.Module:
    torch._dynamo.reset()
    options = {"chunks": BOX | chunks, "lower": "eager", "fuse": False, **plan}
    found: nn.Module = torch.compile(model, backend="ditc", options=options, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    return found


def latents(batch: int = 1, seed: int = 0) -> list[Tensor]:
    """A trajectory of which one corner moves faster than the rest, in each sample another one."""
    start, end = torch.randn(2, batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    pace = torch.full((batch, 1, 8, 8), 0.1)
    for i in range(batch):
        pace[i, :, 4 * (i // 2 % 2) :, 4 * (i % 2) :][:, :4, :4] = 6.0
    return [start + pace * i / STEPS * end for i in range(STEPS)]


def draw(model: Callable[..., Tensor], inputs: list[Tensor], **session: Any) -> list[Tensor]:
    with torch.no_grad(), ditc.session(steps=len(inputs), **session):
        return [model(x, torch.full((len(x),), 900.0 - 100 * i)) for i, x in enumerate(inputs)]


@pytest.fixture
def model(make_dit: Callable[..., nn.Module]) -> nn.Module:
    return make_dit(depth=2)


def test_nothing_left_out_changes_no_bit_and_one_session_s_threshold_compiles_nothing(model: nn.Module) -> None:
    inputs = latents(2)
    chunked = compiled(model, {"threshold": 0.0})
    assert all(map(torch.equal, draw(chunked, inputs), draw(model, inputs)))
    fewest = draw(chunked, inputs, cache={"threshold": 1e9})
    assert not torch.equal(fewest[-1], model(inputs[-1], torch.full((2,), 400.0)))
    assert all(map(torch.equal, draw(chunked, inputs), draw(model, inputs))), "generations share nothing"
    (program,) = ditc.stats(chunked).programs
    assert program.chunks is not None
    parts = [step.computed_part for step in program.chunks.steps]
    assert parts == [1.0] * STEPS + [1.0] * 2 + [0.25] * (STEPS - 2) + [1.0] * STEPS


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sparse_step_of_all_chunks_is_a_dense_one(
    model: nn.Module, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chunked, "capacities", property(lambda self: [self.grid.chunks]))
    inputs = latents(batch)
    for sparse, dense in zip(draw(compiled(model, {}), inputs), draw(model, inputs), strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


class Reference:
    """TinyDiT computed chunk by chunk, written without the compiler: keys, values and what blocks add are kept."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.added = torch.empty(0)

    def __call__(self, x: Tensor, timestep: Tensor, rows: Tensor) -> Tensor:
        """One sample; ``rows`` are the tokens that are computed."""
        model = self.model
        half = model.width // 2
        angles = timestep[:, None] * torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(half) / half)
        embedding = torch.cat([angles.cos(), angles.sin()], -1)
        conditioning = model.time_out(F.silu(model.time_in(embedding)))
        entry = model.patch(x).flatten(2).transpose(1, 2)
        h = entry[:, rows]
        for i, block in enumerate(model.blocks):
            h = self.block(i, block, h, conditioning, rows, entry.shape[1])
        if not self.added.numel():
            self.added = torch.zeros_like(entry)
        self.added = self.added.clone()
        self.added[:, rows] = h - entry[:, rows]
        y = model.head(F.layer_norm(entry + self.added, (model.width,)))
        return y.reshape(1, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(1, 4, 8, 8)

    def block(self, i: int, block: Any, x: Tensor, conditioning: Tensor, rows: Tensor, tokens: int) -> Tensor:
        a, b, c, d, e, f = block.modulation(F.silu(conditioning)).unsqueeze(1).chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + b) + a
        q, k, v = (to(h).unflatten(-1, (block.heads, -1)) for to in (block.to_q, block.to_k, block.to_v))
        for kept, fresh in ((self.keys, k), (self.values, v)):
            full = kept.get(i, torch.zeros(1, tokens, *fresh.shape[2:])).clone()
            full[:, rows] = fresh
            kept[i] = full
        scores = torch.einsum("bqhd,bkhd->bhqk", q, self.keys[i]) / q.shape[-1] ** 0.5
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), self.values[i]).flatten(2)
        x = x + c * block.to_out(attended)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + e) + d
        return x + f * block.down(F.silu(block.gate(h)) * block.up(h))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sparse_step_is_the_reference_s(model: nn.Module, batch: int) -> None:
    inputs = latents(batch)
    chunked = compiled(model, {"threshold": 1e9})
    outputs = draw(chunked, inputs)
    stats = ditc.stats(chunked).programs[0].chunks
    assert stats is not None and stats.sparse == STEPS - 2
    grid = torch.arange(16).reshape(4, 4)
    with torch.no_grad():
        for sample in range(batch):
            reference = Reference(model)
            for i, (x, step) in enumerate(zip(inputs, stats.steps, strict=True)):
                wide = step.computed[sample].repeat_interleave(2, 0).repeat_interleave(2, 1)
                assert int(wide.sum()) == (16 if i < 2 else 4)
                found = reference(x[sample : sample + 1], torch.tensor([900.0 - 100 * i]), grid[wide])
                torch.testing.assert_close(outputs[i][sample : sample + 1], found, rtol=1e-4, atol=1e-5)


def test_the_chunks_that_move_are_computed_first(model: nn.Module) -> None:
    chunked = compiled(model, {"threshold": 1e9, "age": 0.0})
    draw(chunked, latents(4))
    stats = ditc.stats(chunked).programs[0].chunks
    assert stats is not None
    first = stats.steps[2]
    assert [int(first.computed[i].flatten().float().argmax()) for i in range(4)] == [0, 1, 2, 3]
    assert first.active_part == (0.0,) * 4 and first.computed_part == 0.25 and not first.dense
    assert stats.warnings == (
        "no chunk is ever active in a sparse step: the threshold is above every change that was seen",
    )


def controls(**changes: float) -> dict[str, Tensor]:
    values = {"threshold": 0.5, "age": 0.0, "warmup": 2.0, "reset": 0.0, "last": 0.0, "steps": 0.0} | changes
    return {name: torch.tensor(value) for name, value in values.items()}


def decided(change: list[list[float]], step: float = 5.0, finite: bool = True, **changes: float) -> dict[str, Tensor]:
    found = torch.tensor(change)
    waited = torch.arange(found.shape[1]).float().expand_as(found)
    state = {"step": torch.full((len(found),), step), "change": found, "waited": waited, "score": found}
    return decide(state, controls(**changes), torch.tensor(finite), [1, 2, 3], found.shape[1])


def test_the_smallest_capacity_that_holds_the_most_active_sample_is_taken() -> None:
    none, one, two = ([[0.1] * 4], [[0.1, 0.9, 0.2, 0.1]], [[0.1, 0.9, 0.2, 0.6], [0.3, 0.1, 0.1, 0.1]])
    assert [decided(change)["computed"].sum(1).tolist() for change in (none, one, two)] == [[1], [1], [2, 2]]
    assert decided(two)["computed"].tolist() == [[False, True, False, True], [True, False, True, False]] or (
        decided(two)["computed"][1, 0] and decided(two)["active"].sum(1).tolist() == [2, 0]
    )
    everything = decided([[0.9] * 4])
    assert everything["dense"] and everything["computed"].all()
    assert decided([[0.3, 0.3, 0.3, 0.3]], age=0.3)["active"].tolist() == [[False, False, True, True]]


@pytest.mark.parametrize(
    "dense",
    [{"step": 1.0}, {"finite": False}, {"reset": 5.0}, {"warmup": 6.0}, {"last": 3.0, "steps": 8.0}],
    ids=["start", "not finite", "reset", "warm-up", "last"],
)
def test_dense_steps(dense: dict[str, Any]) -> None:
    assert not decided([[0.1, 0.2, 0.1, 0.1]])["dense"]
    assert decided([[0.1, 0.2, 0.1, 0.1]], **dense)["dense"]
    assert decided([[0.1, float("nan"), 0.1, 0.1]])["computed"].all()


def test_a_change_is_one_a_step() -> None:
    grid = Grid((2, 2), (1, 2))
    old = torch.ones(1, 4, 3)
    new = torch.cat([2 * old[:, :2], old[:, 2:]], 1)
    state = {"step": torch.zeros(1), "change": torch.zeros(1, 2), "waited": torch.tensor([[1.0, 1.0]])}
    found = settle(state, torch.tensor([[True, False]]), torch.zeros(1, 2), grid, new, old)
    torch.testing.assert_close(found["change"], torch.tensor([[0.5 / 1.5, 0.0]]))
    assert found["waited"].tolist() == [[0.0, 2.0]] and found["step"].tolist() == [1.0]
    assert grid.members(torch.device("cpu")).tolist() == [[0, 1], [2, 3]]
    assert Grid((2, 4), (2, 2)).members(torch.device("cpu")).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [capacity(part, 10) for part in (0.25, 0.3, 0.99)] == [3, 3, 10]


def test_nan_ends_sparse_steps(model: nn.Module) -> None:
    inputs = latents()
    chunked = compiled(model, {"threshold": 1e9})
    inputs[3] = inputs[3].clone()
    inputs[3][0, 0, 0, 0] = float("nan")
    outputs = draw(chunked, inputs)
    stats = ditc.stats(chunked).programs[0].chunks
    assert stats is not None and [step.dense for step in stats.steps] == [True, True, False, True, True, True]
    assert outputs[5].isfinite().all()


class Mixer(nn.Module):
    """A block between attentions lets tokens meet in a linear."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.mix = nn.ModuleList(nn.Linear(16, 16) for _ in inner.blocks)  # type: ignore[arg-type]
        for block, mix in zip(inner.blocks, self.mix, strict=True):  # type: ignore[arg-type]
            block.register_forward_hook(lambda module, args, x, mix=mix: x + mix(x.transpose(1, 2)).transpose(1, 2))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        found: Tensor = self.inner(hidden_states, timestep)
        return found


def test_what_lets_tokens_meet_is_named_and_stays_dense(model: nn.Module) -> None:
    mixer = Mixer(model).eval()
    inputs = latents()
    with pytest.warns(DenseWarning, match=r"linear.*it works along the tokens"):
        outputs = draw(chunked := compiled(mixer, {"threshold": 1e9}), inputs)
    assert all(map(torch.equal, outputs, draw(mixer, inputs)))
    (program,) = ditc.stats(chunked).programs
    report = next(report for report in program.passes if report.name == "chunks")
    assert report.skipped[0].node.startswith("linear") and program.chunks is None


def test_symbolic_sizes_stay_dense(model: nn.Module) -> None:
    torch._dynamo.reset()
    chunked = torch.compile(model, backend="ditc", options={"chunks": BOX, "lower": "eager"}, dynamic=True)
    with pytest.warns(DenseWarning, match="symbolic: compile with dynamic=False"):
        draw(chunked, latents(2)[:1])


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ({"box": [2]}, "two sizes"),
        ({"box": [2, 2], "grid": [3, 4]}, "3 can be cut by 1, 3"),
        ({"box": [2, 2], "grid": [2, 4, 4]}, "has 3 axes"),
        ({"box": [2, 2], "capacities": [0.5, 0.25]}, "rising"),
        ({"box": [2, 2], "capacities": [1.0]}, "less than 1"),
        ({"box": [2, 2], "warmup": 1}, "greater than or equal to 2"),
        ({"box": [2, 2], "boxes": 3}, "boxes"),
    ],
)
def test_impossible_options_are_refused(chunks: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(chunks=chunks)


def test_a_box_that_does_not_fit_the_model_is_refused(model: nn.Module) -> None:
    for box, message in (([3, 2], "4 can be cut by 1, 2, 4"), ([1, 2, 2], "has 2 axes")):
        with pytest.raises(Exception, match=message):
            draw(compiled(model, {"box": box}), latents())
    with pytest.raises(Exception, match="leave it out"):
        draw(compiled(model, {"grid": [2, 8]}), latents())


def test_chunks_and_cache_exclude_each_other() -> None:
    with pytest.raises(PlanError, match="drop one of them"):
        Plan(chunks={"box": [2, 2]}, cache={"policy": "fixed"})
    plan = Plan(chunks={"box": [1, 2, 2], "capacities": [0.5]})
    assert Plan.from_toml(plan.to_toml()) == plan


def test_quantised_rows_are_rows(model: nn.Module, portable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chunked, "capacities", property(lambda self: [self.grid.chunks]))
    inputs = latents(2)
    plain = torch.compile(model, backend="ditc", options={"lower": "eager", "quantize": "int8"})
    exact = draw(plain, inputs)
    found = draw(compiled(model, {}, quantize="int8", fuse=True), inputs)
    for sparse, dense in zip(found, exact, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-3, atol=1e-3)
