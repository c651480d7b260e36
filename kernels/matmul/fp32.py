"""Sends float32 products on CPU to oneDNN instead of MKL, after proving that nothing is lost by it.

``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` *allows* oneDNN to round the operands to bfloat16. On CPUs
whose matrix units want bfloat16 (AMX) it does, and three digits remain; on others it keeps float32 and is merely the
faster library. Which of the two holds is measured, once per process, on products whose true value is known.

The flag is one per process, not per thread. Regions are counted under a lock: the first to enter sets the flag and
the last to leave puts the old value back, so overlapping regions of several threads never restore too early. What
other threads multiply meanwhile goes through oneDNN too, which the self-check has shown to be as accurate. If
somebody sets the flag to something else inside a region, theirs stays.

Inside a region ``torch.get_float32_matmul_precision()`` raises, because torch then sees a mix of its old and new
precision settings: enter around the compiled call, not around code that asks for the precision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from types import TracebackType

import torch
from torch import Tensor

ERROR_BOUND = 1e-5
"""Largest relative error (Frobenius norm, against float64) of a probe product that still counts as float32: float32
reaches 3e-7 to 6e-7, tf32 5e-4, bfloat16 3e-3."""

_FAST = "bf16"
# (M, K, N): one row, odd sizes, more rows than a register block, a long sum
_PROBES = ((1, 320, 96), (5, 33, 7), (67, 256, 129), (256, 384, 192), (16, 4608, 48))


class Fp32MatmulError(RuntimeError):
    """The fast path for float32 products cannot be used here; the message says why."""


_lock = threading.RLock()
_depth = 0
_saved = "none"


def _get() -> str:
    value: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return value


def _set(value: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = value  # type: ignore[attr-defined]


def _enter() -> None:
    global _depth, _saved
    with _lock:
        if _depth == 0:
            _saved = _get()
            if _saved != _FAST:
                _set(_FAST)
        _depth += 1


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth or _saved == _FAST or _get() != _FAST:
            return
        # the getter resolves what is inherited from wider settings: stay unset where unset means the same
        _set("none")
        if _get() != _saved:
            _set(_saved)


def _error_of(product: Callable[..., Tensor], *operands: Tensor) -> float:
    truth = product(*(operand.double() for operand in operands))
    return float((product(*operands).double() - truth).norm() / truth.norm())


def _attend(q: Tensor, k: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, k)


@cache
def fp32_matmul_error() -> float:
    """The largest relative error of the probe products through the fast path, measured once per process.

    The probes are ``linear`` with and without bias, a batched product and scaled dot-product attention, in sizes
    that take different kernels; they take some milliseconds.

    Raises:
        Fp32MatmulError: this build of torch has no oneDNN, or no such flag.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise Fp32MatmulError("this build of torch has no oneDNN")
    if not hasattr(torch.backends.mkldnn, "matmul"):
        raise Fp32MatmulError(f"torch {torch.__version__} has no torch.backends.mkldnn.matmul.fp32_precision")
    linear, generator = torch.nn.functional.linear, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    errors = []
    _enter()
    try:
        with torch.no_grad():
            for M, K, N in _PROBES:
                a, b, bias = normal(M, K), normal(N, K), normal(N)
                errors.append(_error_of(linear, a, b))
                errors.append(_error_of(linear, a, b, bias))
            errors.append(_error_of(torch.matmul, normal(3, 65, 72), normal(3, 72, 40)))
            errors.append(_error_of(_attend, normal(1, 3, 129, 72), normal(1, 3, 129, 72)))
    finally:
        _leave()
    return max(errors)


def fp32_matmul_reason() -> str | None:
    """Why the fast path must not be used in this process; ``None`` where it is as accurate as float32."""
    try:
        error = fp32_matmul_error()
    except Fp32MatmulError as refusal:
        return str(refusal)
    if not error <= ERROR_BOUND:
        return f"oneDNN rounds float32 products on this CPU: relative error {error:.1e}, allowed {ERROR_BOUND:.0e}"
    return None


class fp32_matmul:  # noqa: N801 - used as a function: `with fp32_matmul():`
    """A region in which float32 products on CPU (``mm``, ``addmm``, ``bmm``, ``linear``, attention) go to oneDNN.

    It acts when the product runs, also inside graphs compiled before; it costs about 6 µs. It may be nested, left by
    an exception, and entered by several threads at once. Other dtypes and devices are not affected.

    Raises:
        Fp32MatmulError: on entry, where :func:`fp32_matmul_reason` gives a reason against it.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        reason = fp32_matmul_reason()
        if reason is not None:
            raise Fp32MatmulError(reason)
        _enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _leave()
