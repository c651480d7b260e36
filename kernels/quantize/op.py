"""Quantising ops: schemas and meanings in plain torch.

A quantised tensor is the list of parts that its format defines (:mod:`ditc.kernels.formats`): codes, the scales of
its blocks or rows, and for NVFP4 the outer scale. Every op that makes one takes the format by name and returns the
parts, so a graph shows at a glance what is quantised, to what, and behind which producer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Format, format_of
from ..operands import check_rows, check_static

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "none")
NORMS = ("layer", "rms")


def quantize_reference(x: Tensor, format: str, static: Tensor | None = None) -> list[Tensor]:
    """Quantises ``x`` along its last dimension with ranges taken from ``x`` itself.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.
        format: a name in :data:`ditc.kernels.formats.FORMATS`.
        static: float32 ``()``, a range from a calibration instead: the scale of int8 and fp8 (values beyond it
            saturate), the outer scale of nvfp4, whose block scales stay dynamic.

    Returns:
        The parts of the format, contiguous.

    Raises:
        TypeError: ``x`` is not one of the three float types.
        ValueError: an unknown format, a ``K`` that it does not admit, or a static range for an MX format.
    """
    return contiguous(_format_for(x, format, static).quantize(x, static=static))


def quantize_weight_reference(w: Tensor, format: str) -> list[Tensor]:
    """Quantises a linear layer's weight ``[N, K]``, each output channel (row) with ranges of its own.

    NVFP4's outer scale belongs to the whole tensor, as in checkpoints, and is repeated for each row, so that
    concatenated weights keep theirs.

    Raises:
        TypeError: ``w`` is not one of the three float types.
        ValueError: ``w`` is not a matrix, or its format does not admit ``K``.
    """
    if w.dim() != 2:
        raise ValueError(f"a linear layer's weight has 2 dimensions [N, K], got shape {tuple(w.shape)}")
    found = _format_for(w, format, None)
    return contiguous(found.quantize(w, granularity="tensor" if found.name == "nvfp4" else "row"))


def norm_quantize_reference(
    x: Tensor,
    norm: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    format: str,
    static: Tensor | None = None,
) -> list[Tensor]:
    """Normalises, modulates and quantises: ``quantize(norm(x) * weight + bias) * multiplier + shift)``.

    Args:
        x: ``[..., K]``.
        norm: ``layer`` or ``rms``, over the last dimension.
        eps: added to the variance or the mean square.
        weight, bias: ``[K]``, the norm's own.
        multiplier, shift: the modulation, ``1 + scale`` and ``shift`` of adaptive layer norm; they broadcast
            against ``x`` without widening it.
        format, static: as for :func:`quantize_reference`.
    """
    y = normalized(x, norm, eps, weight, bias)
    return quantize_reference(modulated(y, multiplier, shift), format, static)


def activation_quantize_reference(
    x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None
) -> list[Tensor]:
    """Applies an activation, multiplies and quantises: ``quantize(activation(x) * multiplier)``.

    Args:
        x: ``[..., K]``.
        activation: one of :data:`ACTIVATIONS`; ``gelu`` is the exact one.
        multiplier: like ``x``, the other half of a gated MLP.
        format, static: as for :func:`quantize_reference`.
    """
    y = activated(x, activation)
    return quantize_reference(y if multiplier is None else y * multiplier, format, static)


def dequantize_reference(parts: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    """The values ``[..., K]`` that quantised ``parts`` stand for, in ``dtype``."""
    return format_of(format).dequantize(list(parts), dtype).contiguous()


def normalized(x: Tensor, norm: str, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``norm(x) * weight + bias`` over the last dimension.

    Raises:
        ValueError: an unknown norm, or an RMS norm with a bias.
    """
    if norm == "layer":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if norm != "rms":
        raise ValueError(f"norm is one of {', '.join(NORMS)}; got {norm!r}")
    y = F.rms_norm(x, (x.shape[-1],), weight, eps)
    return y if bias is None else y + bias


def modulated(y: Tensor, multiplier: Tensor | None, shift: Tensor | None) -> Tensor:
    """``y * multiplier + shift``, each where there is one."""
    y = y if multiplier is None else y * multiplier
    return y if shift is None else y + shift


def activated(x: Tensor, activation: str) -> Tensor:
    """``activation(x)``.

    Raises:
        ValueError: an unknown activation.
    """
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "none":
            return x
    raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def contiguous(parts: Sequence[Tensor]) -> list[Tensor]:
    """The parts as contiguous tensors of their own, as an op must return them."""
    return [part.clone(memory_format=torch.contiguous_format) if _shared(part) else part for part in parts]


def _shared(part: Tensor) -> bool:
    return part._is_view() or not part.is_contiguous()


def _format_for(x: Tensor, format: str, static: Tensor | None) -> Format:
    check_rows(x, "x")
    check_static(static)
    found = format_of(format)
    reason = found.unsupported(x.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    return found


quantize = torch.library.custom_op(
    "ditc::quantize",
    quantize_reference,
    mutates_args=(),
    schema="(Tensor x, str format, Tensor? static=None) -> Tensor[]",
)
quantize_weight = torch.library.custom_op(
    "ditc::quantize_weight", quantize_weight_reference, mutates_args=(), schema="(Tensor w, str format) -> Tensor[]"
)
norm_quantize = torch.library.custom_op(
    "ditc::norm_quantize",
    norm_quantize_reference,
    mutates_args=(),
    schema="(Tensor x, str norm, float eps, Tensor? weight, Tensor? bias, Tensor? multiplier, Tensor? shift, "
    "str format, Tensor? static=None) -> Tensor[]",
)
activation_quantize = torch.library.custom_op(
    "ditc::activation_quantize",
    activation_quantize_reference,
    mutates_args=(),
    schema="(Tensor x, str activation, Tensor? multiplier, str format, Tensor? static=None) -> Tensor[]",
)
dequantize = torch.library.custom_op(
    "ditc::dequantize",
    dequantize_reference,
    mutates_args=(),
    schema="(Tensor[] parts, str format, ScalarType dtype) -> Tensor",
)


def _empty_parts(x: Tensor, format: str, static: Tensor | None = None) -> list[Tensor]:
    found = _format_for(x, format, static)
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in found.part_types(x.shape)]


@quantize.register_fake
def _(x: Tensor, format: str, static: Tensor | None = None) -> list[Tensor]:
    return _empty_parts(x, format, static)


@quantize_weight.register_fake
def _(w: Tensor, format: str) -> list[Tensor]:
    if w.dim() != 2:
        raise ValueError(f"a linear layer's weight has 2 dimensions [N, K], got shape {tuple(w.shape)}")
    return _empty_parts(w, format)


@norm_quantize.register_fake
def _(
    x: Tensor,
    norm: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    multiplier: Tensor | None,
    shift: Tensor | None,
    format: str,
    static: Tensor | None = None,
) -> list[Tensor]:
    return _empty_parts(x, format, static)


@activation_quantize.register_fake
def _(x: Tensor, activation: str, multiplier: Tensor | None, format: str, static: Tensor | None = None) -> list[Tensor]:
    if multiplier is not None and multiplier.shape != x.shape:
        raise ValueError(f"the multiplier has shape {tuple(multiplier.shape)}, expected {tuple(x.shape)}")
    return _empty_parts(x, format, static)


@dequantize.register_fake
def _(parts: Sequence[Tensor], format: str, dtype: torch.dtype) -> Tensor:
    return format_of(format).dequantize(list(parts), dtype).contiguous()
