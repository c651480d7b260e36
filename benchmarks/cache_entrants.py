"""Who takes part in the cache benchmark: no cache, ditc's policies, the caches of diffusers and cache-dit.

An entrant is one way of skipping with a row of settings, from careful to bold. Peers run compiled or eagerly, whichever
is faster: a cache that changes modules while they run makes torch.compile start anew, or gives it less to compile.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ditc
from ditc.examples.digits.evaluate import denoiser_of
from ditc.passes.cache.policy import Fixed, Seen
from ditc.runtime.generate import Denoiser
from ditc.runtime.session import current_branch

Setting = Mapping[str, Any]

INTERVALS: Mapping[str, Setting] = {f"every {value}": {"interval": value} for value in (2, 3, 4, 6, 8)}
GROWING: Mapping[str, Setting] = {
    f"{first} growing by {growth:g}": {"interval": first, "growth": growth}
    for first, growth in ((1, 1.2), (1, 1.25), (1, 1.3), (2, 1.25), (2, 1.4), (2, 1.6))
}
"""Intervals between computed steps, equal and growing."""


@dataclass(frozen=True)
class Run:
    """What draws with one setting: ``denoiser`` inside of ``around()``; ``stats`` afterwards tells the hit rate."""

    denoiser: Denoiser
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    module: nn.Module | None = None


@dataclass(frozen=True)
class Entrant:
    """A cache.

    Attributes:
        name: for tables.
        peer: whether somebody else wrote it.
        settings: from careful to bold, by label.
        prepare: makes what draws with one setting, from a copy of the model and the number of steps.
    """

    name: str
    peer: bool
    settings: Mapping[str, Setting]
    prepare: Callable[[nn.Module, Setting, int], Run]
    plan: Mapping[str, Any] = field(default_factory=dict)


def baselines(more: Mapping[str, Any]) -> list[Entrant]:
    """Without any cache: what speed-ups are measured against."""

    def inductor(model: nn.Module, setting: Setting, steps: int) -> Run:
        return Run(denoiser_of(torch.compile(model)))  # type: ignore[arg-type]

    return [Entrant("inductor, no cache", True, {"": {}}, inductor), _ditc("ditc, no cache", more, {"": {}})]


def ours(calibration: str, more: Mapping[str, Any], steps: int) -> list[Entrant]:
    """ditc's policies, each at the thresholds that span its curve.

    Args:
        calibration: file with MagCache's ratios and TeaCache's polynomial for this model.
        more: further options of the plan, such as ``quantize``.
        steps: of a generation: a chunk changes the more from step to step, the fewer there are.
    """

    def thresholds(*values: float) -> dict[str, Setting]:
        return {f"{value:g}": {"threshold": value} for value in values}

    paper = {"its paper's": {}}
    first, fixed = {"policy": "first-block"}, {"policy": "fixed", "warmup": 3}
    mag = {"policy": "magcache", "warmup": 10}
    fitted, raw = {"policy": "teacache"}, {"policy": "teacache", "polynomial": (1.0, 0.0)}
    policies: list[tuple[str, dict[str, Any], Mapping[str, Setting]]] = [
        ("first-block", first, thresholds(0.05, 0.1, 0.2, 0.3)),
        ("first-block, Taylor 1", {**first, "order": 1}, thresholds(0.05, 0.1, 0.2)),
        ("teacache", raw, thresholds(0.05, 0.1, 0.2, 0.3, 0.5)),
        ("teacache, fitted", fitted, thresholds(0.02, 0.05, 0.1, 0.2, 0.3)),
        ("magcache", mag, thresholds(0.01, 0.03, 0.06, 0.12, 0.3)),
        ("easycache", {"policy": "easycache", "warmup": 5}, thresholds(0.01, 0.02, 0.05, 0.1, 0.2)),
        ("easycache, Taylor 1", {"policy": "easycache", "warmup": 5, "order": 1}, thresholds(0.02, 0.05, 0.1, 0.2)),
        ("easycache, Taylor 2", {"policy": "easycache", "warmup": 5, "order": 2}, thresholds(0.02, 0.05, 0.1, 0.2)),
        ("teacache, Taylor 1", {**raw, "order": 1}, thresholds(0.1, 0.2, 0.3, 0.5)),
        ("magcache, model, Taylor 1", {**mag, "scope": "model", "order": 1}, thresholds(0.06, 0.12, 0.3)),
        ("bwcache", {"policy": "bwcache"}, thresholds(0.03, 0.06, 0.1, 0.15)),
        ("adacache", {"policy": "adacache"}, paper),
        ("fixed", fixed, INTERVALS),
        ("fixed, Taylor 1", {**fixed, "order": 1}, INTERVALS),
        ("fixed, Taylor 2", {**fixed, "order": 2}, INTERVALS),
        ("growing, model, Taylor 1", {**fixed, "scope": "model", "order": 1}, GROWING),
        ("growing, model, Taylor 2", {**fixed, "scope": "model", "order": 2}, GROWING),
    ]
    plan = {**more, "calibration": calibration}
    entrants = [_ditc(f"ditc {name}", {**plan, "cache": cache}, settings) for name, cache, settings in policies]
    few = max(1.0, 50 / steps)
    chunks = {"box": [2, 2, 2], "warmup": 2 if few > 4 else 4, "reset": 0 if few > 4 else 10, "capacities": [0.3, 0.5]}
    maps = thresholds(*(round(few**0.8 * value, 3) for value in (0.04, 0.06, 0.08)))
    return [*entrants, _ditc("ditc chunks", {**more, "chunks": chunks}, maps)]


def _ditc(name: str, plan: Mapping[str, Any], settings: Mapping[str, Setting]) -> Entrant:
    compiled: dict[int, nn.Module] = {}

    def prepare(model: nn.Module, setting: Setting, steps: int) -> Run:
        # thresholds are inputs of the program: all settings share one
        if not compiled:
            compiled[0] = ditc.compile(model, plan)
        module = compiled[0]
        return Run(denoiser_of(module), lambda: ditc.session(name, cache=dict(setting) or None), module)

    return Entrant(name, False, settings, prepare, plan)


def peers(ratios: Sequence[float]) -> list[Entrant]:
    """Caches of diffusers and of cache-dit, for a transformer by itself.

    Those of diffusers that have no state for each branch of guidance (pyramid attention broadcast, FasterCache) or want
    to be told of sigmas by a pipeline (SeaCache) cannot take part.

    Args:
        ratios: MagCache's, of the generations that ditc was calibrated with.
    """
    thresholds = {f"{value:g}": {"threshold": value} for value in (0.05, 0.1, 0.2, 0.3)}
    masks: dict[str, Setting] = {name: {"mask": name} for name in ("slow", "medium", "fast", "ultra")}
    budgets = {f"{value:g}": {"threshold": value, "ratios": tuple(ratios)} for value in (0.03, 0.06, 0.12, 0.3)}
    return [
        Entrant("diffusers FirstBlockCache, compiled", True, thresholds, _diffusers_first_block),
        Entrant("diffusers TaylorSeer 1, compiled", True, INTERVALS, _diffusers_taylor(1, lite=False)),
        Entrant("diffusers TaylorSeer 1, lite, compiled", True, INTERVALS, _diffusers_taylor(1, lite=True)),
        Entrant("diffusers TaylorSeer 2, lite, compiled", True, INTERVALS, _diffusers_taylor(2, lite=True)),
        Entrant("diffusers MagCache, compiled", True, budgets, _diffusers_mag),
        # eagerly it was slower
        Entrant("cache-dit DBCache F1B0, compiled", True, thresholds, _cache_dit(0)),
        Entrant("cache-dit DBCache F1B0 + Taylor 1, compiled", True, thresholds, _cache_dit(1)),
        Entrant("cache-dit static steps + Taylor 1, compiled", True, {**INTERVALS, **masks, **GROWING}, _cache_dit(1)),
    ]


def _in_branches(model: Any) -> Denoiser:
    """Tells diffusers' caches which branch of guidance a call is of."""

    def denoise(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        with model.cache_context(current_branch()):
            velocity: Tensor = model(x, timestep, condition, return_dict=False)[0]
        return velocity

    return denoise


class _Reset:
    """Forgets the last generation, which these caches would go on with."""

    def __init__(self, forget: Callable[[], object]) -> None:
        self._forget = forget

    def __enter__(self) -> None:
        self._forget()

    def __exit__(self, *_: object) -> None:
        return None


def _with_cache(model: Any, config: Any, compiled: str) -> Run:
    """A model with one of diffusers' caches, whose hooks go around parts that are compiled each on its own: around a
    compiled model, or inside of one, they make it compile again and again."""
    for name, part in model.named_modules():
        if re.fullmatch(compiled, name):
            part.forward = torch.compile(part.forward)
    model.enable_cache(config)
    return Run(_in_branches(model), lambda: _Reset(model._reset_stateful_cache))


def _diffusers_first_block(model: Any, setting: Setting, steps: int) -> Run:
    from diffusers.hooks import FirstBlockCacheConfig

    return _with_cache(model, FirstBlockCacheConfig(threshold=setting["threshold"]), _BLOCKS)


# its own default is for modules called "attn", and caches nothing of a transformer whose are "attn1" and "attn2"
_SUBLAYERS = r"blocks\.\d+\.(attn1|attn2|ffn)"
_BLOCKS = r"blocks\.\d+"


def _diffusers_taylor(order: int, *, lite: bool) -> Callable[[nn.Module, Setting, int], Run]:
    """Forecasts what attentions and MLPs give, or in its lite mode what the model gives."""

    def prepare(model: Any, setting: Setting, steps: int) -> Run:
        from diffusers.hooks import TaylorSeerCacheConfig

        config = TaylorSeerCacheConfig(
            cache_interval=setting["interval"], disable_cache_before_step=3, max_order=order,
            taylor_factors_dtype=torch.float32, cache_identifiers=None if lite else [_SUBLAYERS], use_lite_mode=lite,
        )  # fmt: skip
        return _with_cache(model, config, _BLOCKS if lite else _SUBLAYERS)

    return prepare


def _diffusers_mag(model: Any, setting: Setting, steps: int) -> Run:
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(
        threshold=setting["threshold"], retention_ratio=0.2, num_inference_steps=steps,
        mag_ratios=list(setting["ratios"]),
    )  # fmt: skip
    return _with_cache(model, config, _BLOCKS)


def _cache_dit(order: int) -> Callable[[nn.Module, Setting, int], Run]:
    def prepare(model: Any, setting: Setting, steps: int) -> Run:
        import cache_dit

        adapter = cache_dit.BlockAdapter(
            transformer=model, blocks=model.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_2,
            has_separate_cfg=True,
        )  # fmt: skip
        forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        decides: dict[str, Any] = {"residual_diff_threshold": setting.get("threshold", 1.0)}
        if "threshold" not in setting:
            decides |= {"steps_computation_mask": _mask(setting, steps), "steps_computation_policy": "static"}
        options = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=3, num_inference_steps=steps,
            enable_separate_cfg=True, **decides,
        )  # fmt: skip
        cache_dit.enable_cache(adapter, cache_config=options, calibrator_config=forecast)
        # without it the second generation begins with what the first one left
        forget = _Reset(lambda: cache_dit.refresh_context(model, num_inference_steps=steps))
        return Run(denoiser_of(torch.compile(model)), lambda: forget)

    return prepare


def _mask(setting: Setting, steps: int) -> list[int]:
    """Which steps cache-dit computes (1): one of its own masks, or those that ditc's policy of the numbers would."""
    import cache_dit

    if "mask" in setting:
        found: list[int] = cache_dit.steps_mask(total_steps=steps, mask_policy=setting["mask"])
        return found
    numbers = {"interval": torch.tensor(setting["interval"]), "growth": torch.tensor(setting.get("growth", 1.0))}
    reuses, _, _ = Fixed().decide(Seen(True, torch.arange(steps)), {}, numbers, torch.zeros(0))
    return [int(step < 3 or not reuses[step]) for step in range(steps)]
