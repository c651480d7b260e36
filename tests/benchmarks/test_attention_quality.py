"""The suite attention-quality: what stands in the model is what the table says, and its figures are what they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pytest import approx, raises
from torch import Tensor, nn

from benchmarks import attention_quality
from benchmarks.attention_quality import Site, Variant, fidelity, shares, variants
from ditc.kernels.attention import RECIPES


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def site(q: Tensor, k: Tensor, v: Tensor) -> Site:
    return Site(q, k, v, q.shape[-1] ** -0.5, q.shape[2] == k.shape[2])


class Attends(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.2) + 1


def test_every_recipe_and_each_of_its_parts_takes_part() -> None:
    found = variants()
    assert set(RECIPES) <= set(found)
    assert next(iter(found)) == attention_quality.REFERENCE and found[attention_quality.REFERENCE].recipe is None
    assert {v.exact_sum for v in found.values()} == {False, True}
    assert any(v.threshold is not None for v in found.values()) and any(v.linears for v in found.values())
    assert len(set(found.values())) == len(found)


def test_a_variant_stands_in_the_place_of_attention() -> None:
    q, k, v = (normal(1, 2, 70, 16, seed=i) for i in range(3))
    exact = Attends()(q, k, v)
    assert torch.equal(attention_quality._Replaced(Attends(), Variant(None))(q, k, v), exact)
    for name, recipe in RECIPES.items():
        variant = Variant(recipe)
        y = attention_quality._Replaced(Attends(), variant)(q, k, v)
        assert not torch.equal(y, exact) and torch.equal(y, variant(q, k, v, 0.2) + 1), name
    with raises(NotImplementedError):
        attention_quality._Replaced(Attends(), Variant(None))(q, k, v, torch.ones(70, 70, dtype=torch.bool))


def test_blocks_that_are_skipped_are_not_seen() -> None:
    q = torch.cat((normal(1, 1, 1, 16).expand(-1, -1, 64, -1), normal(1, 1, 1, 16, seed=1).expand(-1, -1, 64, -1)), -2)
    q, v = 20 * q, normal(1, 1, 128, 16, seed=2)
    found = fidelity(Variant(None, threshold=0.5), [site(q, q, v)])
    assert found.kept == 0.5 and found.sqnr > 60
    far = fidelity(Variant(None, threshold=0.5), [site(q * 1e-3, q, v)])
    assert far.kept == 1.0 and far.sqnr > 100


def test_fidelity_is_of_all_sites_together() -> None:
    class Halved(Variant):
        def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return 0.5 * super().__call__(q, k, v, scale)

    sites = [site(*(normal(1, 2, 9, 16, seed=s + i) for i in range(3))) for s in (0, 3)]
    found = fidelity(Halved(None), sites)
    assert found.magnitude == approx(0.5, abs=1e-5) and found.sqnr == approx(6.0206, abs=1e-3) and found.kept is None


def test_shares_are_of_the_energy() -> None:
    k = torch.ones(1, 1, 200, 4)
    q = torch.cat((k[:, :, :128], -k[:, :, :72]), -2)
    assert shares([site(q, k, k)]) == {"keys": approx(1.0), "queries": approx(1.0)}
    q = q * torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0).unsqueeze(-1)
    assert shares([site(q, k, k)]) == {"keys": approx(1.0), "queries": approx(0.0)}


def test_linears_run_on_int8() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn1, self.norm = nn.ModuleDict({"to_q": nn.Linear(16, 8)}), nn.Linear(16, 8)

    model = nn.Module()
    model.blocks = nn.ModuleList([Block()])
    block = model.blocks[0]
    x = normal(3, 16)
    wanted = block.attn1["to_q"](x).detach()
    attention_quality._quantize_linears(model)
    y = block.attn1["to_q"](x).detach()
    assert type(block.norm) is nn.Linear
    assert 0 < float((y - wanted).norm() / wanted.norm()) < 0.03
