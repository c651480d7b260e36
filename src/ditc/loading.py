"""``ditc.load_and_quantize``: a full-precision checkpoint, quantised layer by layer as a plan wants it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ditc.passes.errors import PlanError
from ditc.passes.plan import Plan
from ditc.passes.quantize.linears import QuantizeLinears
from ditc.runtime.checkpoints import LoadReport
from ditc.runtime.checkpoints import load_and_quantize as load_layers

from .explanation import explain

_SUFFIX = ".weight"


def formats_for(
    model: torch.nn.Module,
    plan: Plan | Mapping[str, Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The format of each linear layer that a plan quantises, by the path of its module.

    The model is only looked at: its parameters may be on the ``meta`` device.

    Args:
        model, args, kwargs: as for :func:`ditc.explain`.
        plan: its ``quantize`` says what is wanted; ``fuse`` has no part in it, because layers are loaded one by one.

    Raises:
        PlanError: the plan quantises nothing of this model.
    """
    chosen = Plan.from_options(plan).model_copy(update={"fuse": False})
    looked_at = model
    if any(parameter.is_meta for parameter in model.parameters()):
        # buffers may be real: shapes are propagated on one device
        looked_at = copy.deepcopy(model).to("meta")
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (tuple(args), kwargs))
    report = explain(looked_at, args, kwargs, chosen)
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    for graph in report.graphs:
        for row in (row for item in graph.passes if item.name == QuantizeLinears.name for row in item.decisions):
            module = row["weight"].removesuffix(_SUFFIX)
            if row["format"] != "none" and isinstance(modules.get(module), torch.nn.Linear):
                found[module] = row["format"]
    if not found:
        why = "; ".join(report.notes) or "no linear of it was chosen"
        raise PlanError(f"the plan ({chosen}) quantises nothing of this {type(model).__name__}: {why}")
    return found


def load_and_quantize(
    model: torch.nn.Module,
    path: str | Path,
    plan: Plan | Mapping[str, Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
) -> LoadReport:
    """Reads a full-precision checkpoint and packs each layer that ``plan`` quantises as soon as it is read.

    With the model's parameters on ``meta`` (``with ditc.parameters_on_meta(): model = Class(**config)``) the
    full-precision copy never exists: memory peaks at the packed model and about two of its layers. Compile the loaded
    model with the same plan::

        ditc.load_and_quantize(model, folder, plan)
        compiled = ditc.compile(model, plan)

    Args:
        model: of the checkpoint's architecture.
        path: a folder in the layout of diffusers, or one safetensors file.
        plan: decides which layers are quantised, and to what.
        args, kwargs: inputs by which the structure is found, as for :func:`ditc.explain`; made up for models of
            diffusers.
        device: where to quantise and keep everything.

    Raises:
        CheckpointError: the checkpoint does not fit the model, or is damaged; the model is then as it was.
        PlanError: the plan quantises nothing of this model.
    """
    return load_layers(model, path, formats_for(model, plan, args, kwargs), device=device)
