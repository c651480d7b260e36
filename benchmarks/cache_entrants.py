"""Who takes part in the cache benchmark: no cache, ditc's policies, the caches of diffusers and cache-dit.

An entrant is one way of skipping with a row of settings, from careful to bold. Peers run compiled or eagerly, whichever
is faster: a cache that changes modules while they run makes torch.compile start anew, or gives it less to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ditc
from ditc.examples.digits.evaluate import denoiser_of
from ditc.runtime.generate import Denoiser
from ditc.runtime.session import current_branch

Setting = Mapping[str, Any]


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

    intervals = {f"every {value}": {"interval": value} for value in (2, 3, 4, 6, 8)}
    paper = {"its paper's": {}}
    first, fixed = {"policy": "first-block"}, {"policy": "fixed", "warmup": 3}
    fitted, raw = {"policy": "teacache"}, {"policy": "teacache", "polynomial": (1.0, 0.0)}
    policies: list[tuple[str, dict[str, Any], Mapping[str, Setting]]] = [
        ("first-block", first, thresholds(0.05, 0.1, 0.2, 0.3)),
        ("first-block, Taylor 1", {**first, "order": 1}, thresholds(0.05, 0.1, 0.2)),
        ("teacache", raw, thresholds(0.05, 0.1, 0.2, 0.3, 0.5)),
        ("teacache, fitted", fitted, thresholds(0.02, 0.05, 0.1, 0.2, 0.3)),
        ("magcache", {"policy": "magcache", "warmup": 10}, thresholds(0.01, 0.03, 0.06, 0.12, 0.3)),
        ("easycache", {"policy": "easycache", "warmup": 5}, thresholds(0.01, 0.02, 0.05, 0.1, 0.2)),
        ("easycache, Taylor 1", {"policy": "easycache", "warmup": 5, "order": 1}, thresholds(0.02, 0.05, 0.1, 0.2)),
        ("bwcache", {"policy": "bwcache"}, thresholds(0.03, 0.06, 0.1, 0.15)),
        ("adacache", {"policy": "adacache"}, paper),
        ("fixed", fixed, intervals),
        ("fixed, Taylor 1", {**fixed, "order": 1}, intervals),
        ("fixed, Taylor 2", {**fixed, "order": 2}, intervals),
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


def peers() -> list[Entrant]:
    """Caches of diffusers and of cache-dit, for a transformer by itself."""
    thresholds = {f"{value:g}": {"threshold": value} for value in (0.05, 0.1, 0.2, 0.3)}
    intervals = {f"every {value}": {"interval": value} for value in (2, 3, 4, 6)}
    return [
        Entrant("diffusers FirstBlockCache", True, thresholds, _diffusers_first_block),
        Entrant("diffusers TaylorSeer 1", True, intervals, _diffusers_taylor),
        # eagerly it was slower
        Entrant("cache-dit DBCache F1B0, compiled", True, thresholds, _cache_dit(0)),
        Entrant("cache-dit DBCache F1B0 + Taylor 1, compiled", True, thresholds, _cache_dit(1)),
    ]


def _in_branches(model: Any, run: Callable[..., Any] | None = None) -> Denoiser:
    """Tells diffusers' caches which branch of guidance a call is of."""
    call = run if run is not None else model

    def denoise(x: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        with model.cache_context(current_branch()):
            velocity: Tensor = call(x, timestep, condition, return_dict=False)[0]
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


def _diffusers_first_block(model: Any, setting: Setting, steps: int) -> Run:
    from diffusers.hooks import FirstBlockCacheConfig

    # compiled blocks or a compiled model were measured slower: hooks make them compile again and again
    model.enable_cache(FirstBlockCacheConfig(threshold=setting["threshold"]))
    return Run(_in_branches(model), lambda: _Reset(model._reset_stateful_cache))


def _diffusers_taylor(model: Any, setting: Setting, steps: int) -> Run:
    from diffusers.hooks import TaylorSeerCacheConfig

    model.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=setting["interval"], disable_cache_before_step=3, taylor_factors_dtype=torch.float32
        )
    )
    return Run(_in_branches(model), lambda: _Reset(model._reset_stateful_cache))


def _cache_dit(order: int) -> Callable[[nn.Module, Setting, int], Run]:
    def prepare(model: Any, setting: Setting, steps: int) -> Run:
        import cache_dit

        adapter = cache_dit.BlockAdapter(
            transformer=model, blocks=model.blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_2,
            has_separate_cfg=True,
        )  # fmt: skip
        forecast = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
        options = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=setting["threshold"],
            max_warmup_steps=3, num_inference_steps=steps, enable_separate_cfg=True,
        )  # fmt: skip
        cache_dit.enable_cache(adapter, cache_config=options, calibrator_config=forecast)
        # without it the second generation begins with what the first one left
        forget = _Reset(lambda: cache_dit.refresh_context(model, num_inference_steps=steps))
        return Run(denoiser_of(torch.compile(model)), lambda: forget)

    return prepare
