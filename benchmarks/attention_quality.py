"""Suite: the trained demo model with every recipe of low-precision attention, at equal seeds: what each costs, and what
each of its parts brings.

A recipe stands in the model in the place of ``scaled_dot_product_attention``, as its meaning in plain torch (the CPU's
INT8 op as its kernel where there is one): numbers of quality, none of speed. PSNR and SSIM are against eager fp32. SQNR
and magnitude are of the attention's output alone, on queries, keys and values that eager fp32 meets at a few steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ditc.examples.digits.demo import DemoResult, Row, run_demo
from ditc.examples.digits.evaluate import GUIDANCE, STEPS, denoiser_of, draw_clips
from ditc.examples.digits.model import load_transformer
from ditc.examples.digits.stages import Candidate
from ditc.kernels.attention import RECIPES, Recipe, attend, attention_blocks, attention_int8, quantize_operands
from ditc.kernels.linear import quantized_linear
from ditc.kernels.quantize import quantize, quantize_weight

from .environment import describe
from .formats import is_block_linear
from .report import markdown, preamble, write

SUITE = "attention-quality"
REFERENCE = "eager fp32"
RECORDED_STEPS = (5, 25, 45)
"""Of the sampler's steps, those at which queries, keys and values are recorded."""

_DIGITS = 10


@dataclass(frozen=True)
class Variant:
    """One way to compute an attention.

    Attributes:
        recipe: of the product; ``None`` for exact attention, ``"cpu"`` for the CPU's INT8 op.
        exact_sum: divides by the sum of the weights before they are rounded, as published kernels do.
        threshold: of the block map; ``None`` looks at all blocks.
        linears: whether the linears of the blocks run on INT8.
    """

    recipe: Recipe | str | None
    exact_sum: bool = False
    threshold: float | None = None
    linears: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of ``[B, H, L, D]`` without a mask."""
        blocks = None if self.threshold is None else attention_blocks(q, k, scale, self.threshold)
        if self.recipe is None:
            mask = None if blocks is None else _element_mask(blocks, q.shape[2], k.shape[2])
            with torch._C.DisableTorchFunction():
                return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        if isinstance(self.recipe, str):
            return attention_int8(q, k, v, scale)
        parts = quantize_operands(q, k, v, self.recipe)
        return attend(
            parts.q, parts.k, parts.v, self.recipe, scale, q.dtype, parts.bias, None, False, blocks, -1,
            exact_sum=self.exact_sum,
        )  # fmt: skip


def variants() -> dict[str, Variant]:
    """Every entrant by name, exact attention first."""
    found = {REFERENCE: Variant(None)}
    found |= {name: Variant(recipe) for name, recipe in RECIPES.items()}
    found["int8 (the CPU's op)"] = Variant("cpu")
    for name in ("nvfp4", "fp8", "int8_fp8"):
        recipe = RECIPES[name]
        found[f"{name}, no key smoothing"] = Variant(dataclasses.replace(recipe, smooth_keys=False))
        if recipe.smooth_queries:
            found[f"{name}, no query smoothing"] = Variant(dataclasses.replace(recipe, smooth_queries=False))
            plain = dataclasses.replace(recipe, smooth_keys=False, smooth_queries=False)
            found[f"{name}, no smoothing"] = Variant(plain)
        found[f"{name}, sum before rounding"] = Variant(recipe, exact_sum=True)
    for threshold in (0.03, 0.1, 0.3):
        found[f"fp32, blocks from {threshold:g}"] = Variant(None, threshold=threshold)
    found["int8_fp8, blocks from 0.03"] = Variant(RECIPES["int8_fp8"], threshold=0.03)
    found["linears int8"] = Variant(None, linears=True)
    for name in ("int8_fp8", "nvfp4"):
        found[f"{name}, linears int8"] = Variant(RECIPES[name], linears=True)
    return found


class _Instead(TorchFunctionMode):
    """Calls ``attention(q, k, v, scale)`` wherever a model asks for scaled dot-product attention."""

    def __init__(self, attention: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
        self.attention = attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._replace(*args, **(kwargs or {}))

    def _replace(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if attn_mask is not None or dropout_p or is_causal or enable_gqa:
            raise NotImplementedError("the demo's model attends without mask, dropout and groups")
        return self.attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


class _Int8Linear(nn.Module):
    """A linear layer on INT8, one scale for each token and each output channel, as ditc's plans quantise it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: list[Tensor] = quantize_weight(linear.weight.detach(), "int8")
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = quantized_linear(quantize(x, "int8"), self.weight, self.bias, None, None, "int8", x.dtype)
        return y


def _quantize_linears(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_block_linear(module, name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _Int8Linear(module))


class _Replaced(nn.Module):
    """A model whose attention is another one."""

    def __init__(self, model: nn.Module, variant: Variant) -> None:
        super().__init__()
        self.model, self.variant = model, variant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Instead(self.variant):
            return self.model(*args, **kwargs)


def _element_mask(blocks: Tensor, Lq: int, Lk: int) -> Tensor:
    return blocks.repeat_interleave(64, -1).repeat_interleave(64, -2)[..., :Lq, :Lk]


class Site(NamedTuple):
    """What one attention met: operands ``[B, H, L, D]``, and whether its keys are tokens of the clip."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    self_attention: bool


def record(steps: int = STEPS, at: Sequence[int] = RECORDED_STEPS) -> list[Site]:
    """Operands of every attention of the model at some steps of one clip of each digit, with guidance."""
    sites: list[Site] = []
    step = 0

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if step in at:
            sites.append(Site(q.clone(), k.clone(), v.clone(), scale, q.shape[2] == k.shape[2]))
        return Variant(None)(q, k, v, scale)

    def count(done: int, _total: int) -> None:
        nonlocal step
        step = done

    model = load_transformer()

    def denoise(*args: Any) -> Tensor:
        with _Instead(attention):
            return denoiser_of(model)(*args)

    draw_clips(denoise, torch.arange(_DIGITS), range(_DIGITS), steps=steps, guidance=GUIDANCE, progress=count)
    if not sites:
        raise RuntimeError("the model called no attention at the steps to be recorded")
    return sites


@dataclass(frozen=True)
class Fidelity:
    """Of the outputs of several sites together: SQNR in dB, ``(y . w) / (w . w)``, and the blocks kept."""

    sqnr: float
    magnitude: float
    kept: float | None


def fidelity(variant: Variant, sites: Sequence[Site]) -> Fidelity:
    """How near a variant comes to exact attention in float64; infinite SQNR for exact attention itself is not met."""
    signal = noise = both = 0.0
    kept = []
    for q, k, v, scale, _ in sites:
        exact = (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()
        y = variant(q, k, v, scale).double()
        signal += float(exact.square().sum())
        noise += float((y - exact).square().sum())
        both += float((y * exact).sum())
        if variant.threshold is not None:
            kept.append(float(attention_blocks(q, k, scale, variant.threshold).float().mean()))
    sqnr = 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10())
    return Fidelity(sqnr, both / signal, sum(kept) / len(kept) if kept else None)


def shares(sites: Sequence[Site]) -> dict[str, float]:
    """Which part of the energy of keys lies in their mean over tokens, and of queries in the mean of each 128."""
    k_all = k_mean = q_all = q_mean = 0.0
    for q, k, *_ in sites:
        k_all += float(k.square().sum())
        k_mean += float(k.mean(-2, keepdim=True).square().sum()) * k.shape[-2]
        for block in q.split(128, dim=-2):
            q_all += float(block.square().sum())
            q_mean += float(block.mean(-2, keepdim=True).square().sum()) * block.shape[-2]
    return {"keys": k_mean / k_all, "queries": q_mean / q_all}


def run(*, clips_per_digit: int, only: Sequence[str] = (), save: bool = True) -> dict[str, Any]:
    """Measures every variant on the CPU and prints the table.

    Args:
        clips_per_digit: clips of each digit, by each variant.
        only: parts of names of variants; all when empty.
        save: write the files into ``benchmarks/results``.
    """
    found = {
        name: variant
        for name, variant in variants().items()
        if name == REFERENCE or not only or any(part in name for part in only)
    }
    sites = record()
    kinds = {"self": [s for s in sites if s.self_attention], "cross": [s for s in sites if not s.self_attention]}
    near = {
        name: {kind: fidelity(variant, group) for kind, group in kinds.items()}
        for name, variant in found.items()
        if not variant.linears and (variant.recipe is not None or variant.threshold is not None)
    }
    entrants = [Candidate(name, _prepare(variant)) for name, variant in found.items()]
    result = run_demo(clips_per_digit=clips_per_digit, entrants=entrants)
    smoothed = {kind: shares(group) for kind, group in kinds.items()}
    document, text = _report(result, near, smoothed, clips_per_digit)
    print(text)
    if save:
        print(f"written: {', '.join(str(path) for path in write(SUITE, document, text))}")
    return document


def _prepare(variant: Variant) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        if variant.linears:
            _quantize_linears(model)
        return _Replaced(model, variant)

    return prepare


def _report(
    result: DemoResult,
    near: Mapping[str, Mapping[str, Fidelity]],
    smoothed: Mapping[str, Mapping[str, float]],
    clips_per_digit: int,
) -> tuple[dict[str, Any], str]:
    clips = _DIGITS * clips_per_digit
    document: dict[str, Any] = {**describe(torch.device("cpu")), "clips": clips, "steps": STEPS}
    document |= {"recorded_steps": RECORDED_STEPS, "energy_in_means": smoothed}
    document["entrants"] = [_data(row, near.get(row.name, {})) for row in result.rows]
    header = (
        "", "PSNR dB", "SSIM", "accuracy %", "Fréchet", "self: SQNR dB", "magnitude", "blocks %", "cross: SQNR dB",
        "magnitude",
    )  # fmt: skip
    body = [_cells(row, near.get(row.name, {})) for row in result.rows]
    held_out = result.held_out
    body.append(
        ("held-out data", "", "", f"{100 * held_out.accuracy:.0f}", f"{held_out.frechet:.2f}", "", "", "", "", "")
    )
    text = "; ".join(
        f"{kind} attention, {100 * part['keys']:.0f} % of the keys' energy and {100 * part['queries']:.0f} % of the "
        "queries'"
        for kind, part in smoothed.items()
    )
    lines = [
        preamble(SUITE, document),
        f"Demo model (heads of 64, 144 tokens), {STEPS} steps, guidance {GUIDANCE:g}, {clips} clips at equal seeds; "
        f"linears stay fp32 where nothing else is said. SQNR and magnitude, (y . w) / (w . w): the output y of all "
        f"attentions at steps {', '.join(map(str, RECORDED_STEPS))} against exact attention w on the same operands.",
        f"In the means that smoothing subtracts lie: {text}.",
        "",
        markdown(header, body),
    ]
    return document, "\n".join(lines)


def _data(row: Row, near: Mapping[str, Fidelity]) -> dict[str, Any]:
    return {
        "name": row.name, "psnr": row.psnr, "ssim": row.ssim, "accuracy": row.quality.accuracy,
        "frechet": row.quality.frechet, **{kind: dataclasses.asdict(found) for kind, found in near.items()},
    }  # fmt: skip


def _cells(row: Row, near: Mapping[str, Fidelity]) -> tuple[str, ...]:
    def pair(kind: str) -> tuple[str, str]:
        found = near.get(kind)
        return ("", "") if found is None else (f"{found.sqnr:.1f}", f"{found.magnitude:.4f}")

    kept = near["self"].kept if "self" in near else None
    return (
        row.name,
        "" if row.psnr is None else f"{row.psnr:.1f}",
        "" if row.ssim is None else f"{row.ssim:.4f}",
        f"{100 * row.quality.accuracy:.0f}",
        f"{row.quality.frechet:.2f}",
        *pair("self"),
        "" if kept is None else f"{100 * kept:.0f}",
        *pair("cross"),
    )
