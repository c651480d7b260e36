"""``ditc.optimize``: a pipeline of diffusers whose transformer is compiled and whose runs are sessions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ditc.passes.errors import DitcError
from ditc.passes.plan import Plan
from ditc.runtime.samplers import Sampler, SamplerError
from ditc.runtime.session import end_generation, listen_to_diffusers, session

from ..api import compile as compile_module
from ..api import stats

_EAGER = (
    "no compiled program ran: torch.compile has given this transformer up and runs it eagerly, most likely because its "
    "class was compiled too often in this process; see TORCH_LOGS=recompiles and torch._dynamo.config.recompile_limit"
)


def optimize(
    pipe: Any,
    plan: Plan | Mapping[str, Any] | None = None,
    *,
    sampler: Sampler | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
) -> OptimizedPipeline:
    """Makes a pipeline of diffusers run on ditc.

    1. Its transformers (Wan 2.2 has two) are compiled with the plan; everything else stays as it is.
    2. Every run is a session of its own: what caches keep belongs to it alone, also where it is interrupted, and it
       knows the number of its steps.
    3. With a manifest, its scheduler becomes the manifest's, and guidance and steps are those of the manifest:
       arguments that contradict it are refused.

    Args:
        pipe: any ``DiffusionPipeline`` with a transformer. It is changed; :meth:`OptimizedPipeline.restore` undoes it.
        plan: as for :func:`ditc.compile`.
        sampler: of the checkpoint that the pipeline holds, such as :func:`ditc.published` gives.
        fullgraph, dynamic: as for :func:`torch.compile`.

    Returns:
        A callable with the pipeline's arguments and attributes.

    Raises:
        DitcError: there is no transformer, or the pipeline is optimised already.
        SamplerError: no pipeline can walk as the manifest says.
    """
    if isinstance(pipe, OptimizedPipeline):
        raise DitcError("this pipeline is optimised already: call its restore() first, to optimise it otherwise")
    found = {name: part for name, part in getattr(pipe, "components", {}).items() if _is_transformer(name, part)}
    if not found:
        raise DitcError(f"{type(pipe).__name__} has no transformer: ditc.optimize takes pipelines around a DiT")
    listen_to_diffusers()
    return OptimizedPipeline(pipe, found, Plan.from_options(plan), sampler, fullgraph, dynamic)


def _is_transformer(name: str, part: Any) -> bool:
    # diffusers' convention; text encoders and autoencoders have other names
    return name.startswith("transformer") and isinstance(part, torch.nn.Module)


class OptimizedPipeline:
    """A pipeline whose transformer runs on ditc; see :func:`optimize`. Attributes are those of the pipeline."""

    def __init__(
        self,
        pipe: Any,
        transformers: Mapping[str, torch.nn.Module],
        plan: Plan,
        sampler: Sampler | None,
        fullgraph: bool,
        dynamic: bool | None,
    ) -> None:
        self.pipe, self.plan, self.sampler = pipe, plan, sampler
        self._originals: dict[str, Any] = dict(transformers)
        self._arguments = inspect.signature(type(pipe).__call__).parameters
        scheduler = None
        if sampler is not None:
            from .scheduler import ManifestScheduler

            scheduler = ManifestScheduler.of(sampler)
            self._originals["scheduler"] = pipe.scheduler
        compiled = {
            name: compile_module(getattr(module, "_orig_mod", module), plan, fullgraph=fullgraph, dynamic=dynamic)
            for name, module in transformers.items()
        }
        for name, part in {**compiled, **({} if scheduler is None else {"scheduler": scheduler})}.items():
            setattr(pipe, name, part)

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":
            # not there yet: copying and unpickling ask before __init__ has run
            raise AttributeError(name)
        return getattr(self.pipe, name)

    @property
    def transformers(self) -> dict[str, torch.nn.Module]:
        """The compiled transformers, by name: what :func:`ditc.stats` takes."""
        return {name: getattr(self.pipe, name) for name in self._originals if name != "scheduler"}

    def restore(self) -> Any:
        """The pipeline as it was before."""
        for name, part in self._originals.items():
            setattr(self.pipe, name, part)
        return self.pipe

    def __call__(
        self, *args: Any, request: str | None = None, cache: Mapping[str, float] | None = None, **kwargs: Any
    ) -> Any:
        """Runs the pipeline in a session of its own.

        Args:
            request: a label for reports.
            cache: numbers of the cache guards for this run, as of :func:`ditc.session`.
            args, kwargs: the pipeline's.

        Raises:
            SamplerError: an argument contradicts the manifest.
        """
        given = inspect.Signature(list(self._arguments.values())[1:]).bind_partial(*args, **kwargs).arguments
        if self.sampler is not None:
            kwargs |= self._obey(self.sampler, given)
            self.pipe.scheduler.begin(given.get("generator"))
        before = self._calls()
        try:
            with session(request, steps=self._steps({**given, **kwargs}), cache=cache):
                found = self.pipe(*args, **kwargs)
            if self._calls() == before:
                warnings.warn(_EAGER, RuntimeWarning, stacklevel=2)
            return found
        finally:
            # what was called outside of branches and before an interruption is nobody's any more
            end_generation()

    def _calls(self) -> int:
        """Calls of compiled programs so far."""
        return sum(stats(module).calls for module in self.transformers.values())

    def _steps(self, given: Mapping[str, Any]) -> int | None:
        """Calls of the transformer in each branch, where the arguments say it."""
        if "strength" in self._arguments or getattr(self.pipe.scheduler, "order", 1) != 1:
            return None
        for name in ("timesteps", "sigmas"):
            if given.get(name) is not None:
                return len(given[name])
        if "num_inference_steps" not in self._arguments:
            return None
        steps = given.get("num_inference_steps", self._arguments["num_inference_steps"].default)
        return steps if isinstance(steps, int) else None

    def _obey(self, sampler: Sampler, given: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's arguments, for what was not given."""
        steps = given.get("num_inference_steps")
        sampler.check_request(steps=steps)
        found: dict[str, Any] = {"num_inference_steps": sampler.steps if steps is None else steps}
        rule = sampler.guidance
        embedded = any(getattr(part.config, "guidance_embeds", False) for part in self.transformers.values())
        # where guidance is embedded, or may be, two branches have a scale of their own
        two_branches = "true_cfg_scale" if "true_cfg_scale" in self._arguments else "guidance_scale"
        if rule.convention == "from_conditional":
            raise SamplerError(
                f"{sampler.label} means its guidance as cond + w (cond - uncond), and pipelines of diffusers as "
                "uncond + w (cond - uncond): give it a manifest with scale + 1 and from_unconditional"
            )
        if rule.convention == "embedded":
            if not embedded:
                raise SamplerError(
                    f"{sampler.label} takes the guidance scale as an input, and this transformer does not"
                )
            if "guidance_scale" not in given:
                found["guidance_scale"] = rule.scale
        elif rule.convention == "from_unconditional":
            if two_branches not in given:
                found[two_branches] = rule.scale
        elif two_branches in self._arguments:
            scale = given.get(two_branches, 1.0)
            if scale > 1:
                raise SamplerError(
                    f"{sampler.label} has its guidance distilled into it, or has none: {two_branches}={scale:g} would "
                    "guide it again; leave it away"
                )
            found[two_branches] = scale
        return found
