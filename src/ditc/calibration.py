"""``ditc.calibrate``: what a model's linears, attentions and blocks see along whole generations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ditc.kernels.formats import FORMATS, format_of
from ditc.passes.quantize.calibration import Calibration, CalibrationError
from ditc.passes.quantize.observe import Observer
from ditc.runtime.session import find_slot, listen_to_diffusers

from .explanation import _evaluating

__all__ = ["Calibration", "CalibrationError", "calibrate"]


def calibrate(
    model: torch.nn.Module, run: Callable[[torch.nn.Module], Any], *, formats: Sequence[str] | None = None
) -> Calibration:
    """Observes every linear, every attention and all blocks of ``model`` while ``run`` generates with it.

    Activations drift along the steps of a generation, so ``run`` performs whole ones, with the sampler, the number of
    steps and the guidance that will be used later::

        def run(transformer):
            pipeline.transformer = transformer
            pipeline(prompt, num_inference_steps=4)

        calibration = ditc.calibrate(pipeline.transformer, run)
        calibration.save("transformer.calibration.safetensors")

    Of an attention, errors are measured at steps 0, 1, 2, 4, 8 and so on, on at most two elements of the batch, two
    heads and 256 queries, with all of their keys: a sample that bounds time and memory.

    Of the blocks, TeaCache's polynomial and MagCache's ratios are fitted (:attr:`Calibration.cache`), which a plan's
    ``cache`` takes from the file that its ``calibration`` names. The polynomial takes several generations, or one of
    many steps; in generations of another number of steps, each has the ratio of the nearest part.

    The model runs in evaluation mode, without gradients and unquantised; it is left as it was. Steps are told apart as
    :func:`ditc.session` has them: by session and branch, or else by the timestep.

    Args:
        model: a diffusion transformer.
        run: takes a module to be called in place of ``model`` and performs generations. What it returns is ignored.
        formats: whose errors are measured, in linears and in recipes of attention that need no others; all when
            ``None``.

    Returns:
        A :class:`Calibration`: ``str()`` of it is a table, ``save`` and ``load`` keep it.

    Raises:
        CalibrationError: ``run`` never called its argument, nothing could be observed, or values were not finite.
        TypeError: ``model`` is no module.
        ValueError: an unknown format.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"ditc.calibrate takes a torch.nn.Module, got {type(model).__name__}")
    # of a compiled module, the one behind it
    model = getattr(model, "_orig_mod", model)
    wanted = tuple(FORMATS.values()) if formats is None else tuple(map(format_of, formats))
    observer = Observer(weakref.ref(model), find_slot, wanted)
    listen_to_diffusers()
    # a cache limit that the model's own compilations have used up must not silence us
    limits = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
    try:
        with _evaluating(model), torch.no_grad(), torch._dynamo.config.patch(limits):
            compiled = torch.compile(model, backend=observer)
            assert isinstance(compiled, torch.nn.Module)
            run(compiled)
    finally:
        observer.close()
    return observer.calibration()
