"""Which tensor of a checkpoint goes where in a model, and the change of the model once everything has been read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ditc.kernels.errors import CheckpointError

from .files import Checkpoint, StoredTensor
from .module import QuantizedLinear
from .stored import CODES


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are made inside have their parameters on the ``meta`` device, and their buffers as they are.

    ``torch.device("meta")`` also takes the buffers that a model computes and does not save (position tables), which
    no checkpoint can bring back.
    """

    def onto_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    # torch's annotation forgets that a hook may return another parameter
    hook = register_module_parameter_registration_hook(cast(Callable[..., None], onto_meta))
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Fit:
    """What goes where by its name: ``plain`` tensors, keys left over, names that get nothing."""

    plain: Mapping[str, StoredTensor]
    unused: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass
class Staged:
    """What has been read and will be put into the model, if all of it can be read."""

    plain: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, QuantizedLinear] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the quantised layers' parts."""
        return sum(part.numel() * part.element_size() for layer in self.layers.values() for part in layer.parts)

    def bias_of(self, name: str, layer: nn.Linear) -> Tensor | None:
        """Takes the bias of a layer that is replaced; where the checkpoint has none, what the layer holds stays.

        Raises:
            CheckpointError: the layer's bias is on the ``meta`` device and nothing was read for it.
        """
        bias = self.plain.pop(f"{name}.bias", None)
        if bias is None and layer.bias is not None and layer.bias.is_meta:
            raise CheckpointError(f"{name}.bias is missing, and the layer cannot be made without it")
        return layer.bias if bias is None else bias

    def assign(self, model: nn.Module, device: torch.device | str | None) -> None:
        """Puts everything into the model; nothing here reads files or can be refused."""
        tied = _tied_names(model)
        for name, tensor in self.plain.items():
            owner, _, attribute = name.rpartition(".")
            old = getattr(model.get_submodule(owner), attribute)
            new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
            for same in tied.get(name, (name,)):
                if same == name or same not in self.plain:
                    _put(model, same, new)
        for name, layer in self.layers.items():
            layer.train(model.get_submodule(name).training)
            model.set_submodule(name, layer)
        if device is not None:
            model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name.

    Raises:
        CheckpointError: there is no such module, or it is none.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{name} is quantised in the checkpoint, and {type(model).__name__} has none") from error
    if not isinstance(module, nn.Linear) or not name:
        raise CheckpointError(
            f"{name or 'the model'} is a {type(module).__name__}; only linear layers can be quantised"
        )
    return module


def fit_plain(
    model: nn.Module, checkpoint: Checkpoint, quantized: Collection[str], taken: Collection[str], strict: bool
) -> Fit:
    """Fits what is not quantised to the model's parameters and persistent buffers; looks at headers only.

    Args:
        model: where it goes.
        checkpoint: where it comes from.
        quantized: linear layers whose weights come otherwise.
        taken: keys that are spoken for.
        strict: refuse what is left over or missing.

    Raises:
        CheckpointError: a wrong shape or type; with ``strict``, a key or a name without its counterpart; a buffer on
            the ``meta`` device that no checkpoint holds.
    """
    wanted = model.state_dict()
    for module in quantized:
        wanted.pop(f"{module}.weight", None)
    plain = {name: tensor for name, tensor in checkpoint.tensors.items() if name in wanted and name not in taken}
    for name, tensor in plain.items():
        _check_plain(tensor, wanted[name])
    unused = sorted(checkpoint.tensors.keys() - wanted.keys() - set(taken))
    given = {same for name, group in _tied_names(model).items() if name in plain for same in group}
    missing = sorted(wanted.keys() - plain.keys() - given)
    if strict and unused:
        raise CheckpointError(f"no module takes {len(unused)} tensors of the checkpoint: {_some(unused)}")
    if strict and missing:
        raise CheckpointError(f"the checkpoint holds nothing for {len(missing)} tensors of the model: {_some(missing)}")
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in wanted]
    if lost:
        raise CheckpointError(
            f"the model has buffers on the meta device that no checkpoint holds: {_some(lost)}; make it within "
            "parameters_on_meta() instead of torch.device('meta')"
        )
    return Fit(plain, tuple(unused), tuple(missing))


def read_plain(model: nn.Module, checkpoint: Checkpoint, fit: Fit, device: torch.device | str | None) -> Staged:
    """Reads what is not quantised, one tensor after the other, in the model's types."""
    wanted, staged = model.state_dict(), Staged()
    for name, tensor in fit.plain.items():
        old = wanted[name]
        staged.plain[name] = checkpoint.read(tensor).to(target_device(old, device), old.dtype)
    return staged


def target_device(old: Tensor, device: torch.device | str | None) -> torch.device:
    """Where what replaces ``old`` goes: to ``device``, else where it is, else (``meta``) to the CPU."""
    if device is not None:
        return torch.device(device)
    return torch.device("cpu") if old.is_meta else old.device


def _check_plain(tensor: StoredTensor, old: Tensor) -> None:
    if tensor.shape != tuple(old.shape):
        raise CheckpointError(f"{tensor} does not fit the model's {list(old.shape)}")
    if tensor.dtype in CODES and old.dtype != tensor.dtype:
        raise CheckpointError(
            f"{tensor} looks quantised, and the model holds {old.dtype} there; its scales are missing"
        )
    if tensor.dtype.is_floating_point != old.dtype.is_floating_point:
        raise CheckpointError(f"{tensor} is no {old.dtype}, which the model holds there")


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter's name, all names of that parameter: tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)


def _some(names: Collection[str]) -> str:
    shown = list(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")
