"""Batches are the same on every number of ranks, and wrong data are refused."""

import pytest
import torch
from torch import Tensor, nn

from ditc.distill.batch import Batch
from ditc.distill.errors import DistillError
from ditc.distill.seeds import seeded
from ditc.distill.subject import Draw

from .toys import SHAPE, draw, tiny_subject


def drawn(ranks: int) -> list[Tensor]:
    subject = tiny_subject()
    batches = [Batch(subject, 6, seeded(1, 2), rank=rank, ranks=ranks) for rank in range(ranks)]
    assert all(batch.size == 6 // ranks for batch in batches)
    parts = [
        [b.condition, b.null, b.data if b.data is not None else b.null, b.normal(), b.uniform(), b.integers(5)]
        for b in batches
    ]
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_rows_of_one_batch(ranks: int) -> None:
    for alone, shared in zip(drawn(1), drawn(ranks), strict=True):
        assert torch.equal(alone, shared)


def test_ranks_that_cannot_share_are_refused() -> None:
    with pytest.raises(DistillError, match="multiple of 4"):
        Batch(tiny_subject(), 6, seeded(0), ranks=4)


def spoiled(**changes: object) -> object:
    def wrong(count: int, generator: torch.Generator) -> Draw:
        good = draw(count, generator)
        fields = {"condition": good.condition, "null": good.null, "data": good.data}
        return Draw(**fields | {k: v(fields[k]) for k, v in changes.items()})  # type: ignore[operator, arg-type]

    return wrong


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": lambda x: x * float("nan")}, "NaN"),
        ({"data": lambda x: x[:0]}, "4 rows"),
        ({"data": lambda x: x[..., :2]}, r"\(B, 4, 6\)"),
        ({"data": lambda x: x.long()}, "floating"),
        ({"data": lambda x: None}, "gives none"),
        ({"condition": lambda x: x[:3]}, "4 rows"),
        ({"condition": lambda x: x / 0}, "NaN or infinity"),
        ({"null": lambda x: x[:, :1]}, "shape of conditions"),
    ],
)
def test_wrong_data_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(DistillError, match=told):
        Batch(tiny_subject(draw=spoiled(**changes)), 4, seeded(0), needs_data=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"process": "vp"}, "rectified flows"),
        ({"shape": ()}, "shape"),
        ({"timestep_scale": 0.0}, "timestep_scale"),
        ({"guidance": -1.0}, "guidance"),
        ({"teacher": nn.Identity()}, "no parameters"),
    ],
)
def test_a_subject_that_makes_no_sense_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(DistillError, match=told):
        tiny_subject(**changes)


def test_a_teacher_is_frozen() -> None:
    teacher = tiny_subject().teacher
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert tiny_subject().shape == SHAPE
