"""What makes NVFP4 queries and keys of projections, in plain torch: the same as its steps one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ditc.kernels.attention import RECIPES, quantize_operands
from ditc.kernels.smooth import partners

OPS = torch.ops.ditc
Normal = Callable[..., Tensor]


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-imaginary, real], -1).flatten(3) * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def signed(sin: Tensor, distance: int) -> Tensor:
    """The table of the partners: they come with a minus where they come later."""
    feature = torch.arange(sin.shape[-1])
    return torch.where(feature // distance % 2 == 0, -sin, sin)


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize(("rope", "distance"), [(None, 1), (pairs, 1), (halves, 20)])
def test_it_is_norm_rotation_and_quantisation(
    normal: Normal, norm: str, rope: Callable[..., Tensor] | None, distance: int
) -> None:
    D, texts, L = 40, 9, 140
    x = [normal(2, n, 4, D, seed=n, dtype=torch.bfloat16).transpose(1, 2) for n in (texts, L - texts)]
    k = [normal(2, 50, 2, D, seed=5, dtype=torch.bfloat16).transpose(1, 2) + 2]
    weight = [normal(D, seed=i) for i in (1, 2)] if norm != "none" else []
    bias = [normal(D, seed=i) for i in (3, 4)] if norm == "layer" else []
    cos, sin = (normal(1, 1, L, D, seed=i) for i in (6, 7))
    tables = [] if rope is None else [cos, signed(sin, distance)]

    def steps(pieces: list[Tensor]) -> Tensor:
        made = []
        for i, piece in enumerate(pieces):
            w, b = (own[i] if own else None for own in (weight, bias))
            piece = piece.float()
            if norm == "rms":
                piece = F.rms_norm(piece, (D,), w, 1e-6)
            elif norm == "layer":
                piece = F.layer_norm(piece, (D,), w, b, 1e-6)
            made.append(piece)
        y = torch.cat(made, 2)
        return y if rope is None else rope(y, cos[:, :, : y.shape[2]], sin[:, :, : y.shape[2]])

    *q, means = OPS.smooth_queries(x, norm, 1e-6, weight, bias, tables, distance)
    short = [table[:, :, :50] for table in tables]
    *keys, product = OPS.smooth_keys(k, norm, 1e-6, weight[:1], bias[:1], short, distance, means)
    y = steps(k)
    expected = quantize_operands(steps(x), y, y, RECIPES["nvfp4"])
    assert expected.bias is not None and means.shape == (2, 4, 2, D)
    for actual, wanted in zip([*q, *keys, product], [*expected.q, *expected.k, expected.bias], strict=True):
        # sums over other strides
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=1e-6, atol=1e-6)


def test_partners() -> None:
    assert partners(6, 1).tolist() == [1, 0, 3, 2, 5, 4]
    assert partners(6, 3).tolist() == [3, 4, 5, 0, 1, 2]
    assert partners(8, 2).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert partners(5, 1).tolist() == [1, 0, 3, 2, 4]
    assert partners(3, 7).tolist() == [0, 1, 2]


def arguments(normal: Normal, **changes: Any) -> list[Any]:
    x = [normal(1, 2, 3, 8), normal(1, 2, 4, 8)]
    vectors, tables = [torch.ones(8)] * 2, [torch.ones(1, 1, 7, 8)] * 2
    made = {"x": x, "norm": "layer", "eps": 1e-6, "weight": vectors, "bias": vectors, "tables": tables, "distance": 4}
    return list((made | changes).values())


BAD = {
    "x": ([], [torch.ones(1, 2, 3, 8)] * 3, [torch.ones(2, 3, 8)], [torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 4)]),
    "norm": ("batch", "none"),
    "weight": ([torch.ones(8)], [torch.ones(4)] * 2),
    "tables": ([torch.ones(1, 1, 7, 8)], [torch.ones(1, 1, 6, 8)] * 2, [torch.ones(1, 3, 7, 8)] * 2),
    "distance": (0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_what_does_not_fit_is_refused(normal: Normal, name: str, value: Any) -> None:
    for mode in (torch.device("cpu"), torch.device("meta")):
        given = arguments(normal, **{name: value})
        given = [[x.to(mode) for x in arg] if isinstance(arg, list) else arg for arg in given]
        with pytest.raises(ValueError):
            OPS.smooth_queries(*given)


def test_other_types_and_means_are_refused(normal: Normal) -> None:
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        OPS.smooth_queries(*arguments(normal, x=[torch.ones(1, 2, 7, 8, dtype=torch.float64)], weight=[], bias=[]))
    with pytest.raises(TypeError, match="tables are float32"):
        OPS.smooth_queries(*arguments(normal, tables=[torch.ones(1, 1, 7, 8).double()] * 2))
    for shape in ((1, 3, 1, 8), (1, 2, 1, 4), (2, 2, 1, 8)):
        with pytest.raises(ValueError, match="means are"):
            OPS.smooth_keys(*arguments(normal), torch.ones(shape))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_where_it_is_in_queries_and_spreads_in_keys(normal: Normal, bad: float) -> None:
    x = normal(1, 2, 7, 8)
    x[0, 1, 3, 2] = bad
    _, _, outer, means = OPS.smooth_queries([x], "none", 0.0, [], [], [], 1)
    assert outer.isnan().nonzero().tolist() == [[0, 1, 3, 0]] and means.isfinite().all()
    _, _, outer, product = OPS.smooth_keys([x], "none", 0.0, [], [], [], 1, means)
    assert outer[0, 1].isnan().all() and outer[0, 0].isfinite().all()
    assert not product[0, 1].isfinite().any() and product[0, 0].isfinite().all()


def test_traced_as_it_runs(normal: Normal) -> None:
    for op, more in ((OPS.smooth_queries.default, ()), (OPS.smooth_keys.default, (normal(1, 4, 3, 8),))):
        given = (*arguments(normal), *more)
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
