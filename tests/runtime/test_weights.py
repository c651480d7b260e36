"""Packed weights follow every edit of the module they came from."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ditc.runtime import sums
from ditc.runtime.artifact import Piece
from ditc.runtime.weights import WeightCache


def cache(watch: bool = True, count: int = 2) -> WeightCache:
    def run(*weights: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([w.reshape(-1).float() for w in weights])]

    return WeightCache([Piece(run, tuple(range(count)), (0,), "cat")], watch)


def linears() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(33, 17)), nn.Parameter(torch.randn(5))]


def expected(weights: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([w.detach().reshape(-1).float() for w in weights])


def _in_place(weights: list[nn.Parameter]) -> None:
    with torch.no_grad():
        weights[0][3, 4] = 7.0


def _load(weights: list[nn.Parameter]) -> None:
    holder = nn.ParameterList(weights)
    holder.load_state_dict({k: torch.randn_like(v) for k, v in holder.state_dict().items()})


def _data_add(weights: list[nn.Parameter]) -> None:
    # how LoRA adapters are fused; the version counter does not see it
    weights[0].data += 0.01 * torch.randn(33, 2) @ torch.randn(2, 17)


def _data_swap(weights: list[nn.Parameter]) -> None:
    weights[0].data = torch.randn(33, 17)


def _step(weights: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(weights, lr=0.1)
    sum(w.square().sum() for w in weights).backward()  # type: ignore[union-attr]
    optimizer.step()


@pytest.mark.parametrize("edit", [_in_place, _load, _data_add, _data_swap, _step])
def test_an_edit_is_noticed_at_the_next_call(edit: Callable[[list[nn.Parameter]], None]) -> None:
    weights, packed = linears(), cache()
    assert torch.equal(packed.get(weights, thorough=False)[0], expected(weights))
    edit(weights)
    assert torch.equal(packed.get(weights, thorough=False)[0], expected(weights))
    assert packed.packs == 2


def test_one_element_through_data_is_noticed_by_the_checksum() -> None:
    weights, packed = linears(), cache()
    packed.get(weights, thorough=False)
    bits = sums.bits_of(weights[0])
    place = next(i for i in range(len(bits)) if i % sums.sample(bits).stride(0))
    weights[0].data.view(-1)[place] += 1
    assert not torch.equal(packed.get(weights, thorough=False)[0], expected(weights)), "no sample sees it"
    assert torch.equal(packed.get(weights, thorough=True)[0], expected(weights))


def test_checksums_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    real = sums.checksum
    monkeypatch.setattr(sums, "checksum", lambda bits: counted.append(1) or real(bits))
    weights, packed = linears(), cache()
    packed.get(weights, thorough=True)
    entry = next(iter(packed._entries.values()))
    entry.checksum_due = 0.0
    packed.get(weights, thorough=True)
    assert len(counted) == 2, "one when packed, one when due"
    entry.checksum_due = float("inf")
    packed.get(weights, thorough=True)
    assert len(counted) == 2, "none before it is due again"


def test_nothing_is_packed_twice_without_an_edit() -> None:
    weights, packed = linears(), cache()
    weights[0].data[0, 0] = float("nan")  # NaN differs from itself, which is no edit
    first = packed.get(weights, thorough=True)
    for thorough in (False, True):
        assert packed.get(weights, thorough)[0] is first[0]
    assert packed.packs == 1


def test_several_sets_of_weights_live_side_by_side() -> None:
    a, b, packed = linears(), linears(), cache()
    with torch.no_grad():
        b[0].mul_(2)
    for _ in range(3):
        assert torch.equal(packed.get(a, False)[0], expected(a))
        assert torch.equal(packed.get(b, False)[0], expected(b))
    assert packed.packs == 2
    assert packed.memory().packed == 2 * (33 * 17 + 5) * 4
    del b
    packed.get(linears(), False)
    assert len(packed._entries) == 2


def test_frozen_weights_are_not_looked_at_again() -> None:
    weights, packed = linears(), cache(watch=False)
    before = packed.get(weights, True)[0].clone()
    _in_place(weights)
    assert torch.equal(packed.get(weights, True)[0], before)
    other = linears()
    with torch.no_grad():
        other[0].zero_()
    assert torch.equal(packed.get(other, False)[0], expected(other)), "another module is another set of weights"


def test_inference_tensors_and_views_are_followed() -> None:
    with torch.inference_mode():
        weight = torch.randn(8, 6)
        strided = torch.randn(6, 8).t()
        packed = cache()
        packed.get([weight, strided], False)
        for edited in (weight, strided):
            edited.add_(1.0)
            got = packed.get([weight, strided], False)[0]
            assert torch.equal(got, torch.cat([weight.reshape(-1), strided.reshape(-1)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_any_dtype(dtype: torch.dtype) -> None:
    weight = torch.ones(4, 4).to(dtype)
    packed = cache(count=1)
    packed.get([weight], True)
    weight.data[1, 1] = 0
    assert packed.get([weight], True)[0][5] == 0


def test_empty_weight() -> None:
    packed = cache(count=1)
    weight = torch.empty(0, 4)
    assert packed.get([weight], True)[0].numel() == 0
    assert packed.get([weight], True)[0].numel() == 0
    assert packed.packs == 1
