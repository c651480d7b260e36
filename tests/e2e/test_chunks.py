"""Chunks in models that nobody here wrote: with all chunks computed, a sparse step is a dense one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import ditc
from ditc.passes.cache.chunks.guard import DenseWarning
from ditc.passes.cache.chunks.state import Chunked

pytest.importorskip("diffusers")

STEPS = 4
CASES: list[tuple[str, dict[str, Any]]] = [
    # streams apart and joined, tokens that arrive packed
    ("flux", {"box": [2, 2], "grid": [4, 4]}),
    # joint attention that writes the rotated image into queries and keys
    ("cogvideox", {"box": [1, 2, 2]}),
]


def draw(model: Callable[..., Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad(), ditc.session(steps=STEPS):
        steps = [{**kwargs, "hidden_states": kwargs["hidden_states"] * (1 + 0.1 * i)} for i in range(STEPS)]
        return [model(**step, return_dict=False)[0] for step in steps]


@pytest.mark.parametrize(("name", "chunks"), CASES, ids=[case[0] for case in CASES])
def test_a_sparse_step_of_all_chunks_is_a_dense_one(
    name: str, chunks: dict[str, Any], zoo: Mapping[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Chunked, "capacities", property(lambda self: [self.grid.chunks]))
    model, _, kwargs = zoo[name]()
    exact = draw(model.eval(), kwargs)
    options = {"lower": "eager", "chunks": chunks | {"warmup": 2, "reset": 0}}
    chunked = torch.compile(model, backend="ditc", options=options, dynamic=False)
    found = draw(chunked, kwargs)
    program = next(p for p in ditc.stats(chunked).programs if p.chunks is not None)
    report = next(report for report in program.passes if report.name == "chunks")
    assert report.details and not report.skipped
    for sparse, dense in zip(found, exact, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)


def test_convolutions_between_attentions_stay_dense(zoo: Mapping[str, Callable[[], Any]]) -> None:
    model, args, kwargs = zoo["sana"]()
    options = {"lower": "eager", "chunks": {"box": [2, 2]}}
    compiled = torch.compile(model.eval(), backend="ditc", options=options, dynamic=False)
    with torch.no_grad(), pytest.warns(DenseWarning, match="no proof for this operator"):
        compiled(*args, **kwargs)
