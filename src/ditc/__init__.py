"""ditc: a compiler for diffusion transformers.

``torch.compile(model, backend="ditc", options={"quantize": "int8"})`` needs no import of this package; what it offers
beside that is here: :func:`compile`, :func:`explain`, :func:`stats`, :func:`calibrate`, :func:`generate`,
:func:`optimize`, :func:`load_quantized`, :func:`load_and_quantize`, :func:`save_modelopt`, :func:`load_student`,
:class:`Plan`, :func:`session`, :func:`branch`. Names are imported when they are first used, so
that ``import ditc`` is cheap.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Stats, compile, stats
    from .calibration import Calibration, CalibrationError, calibrate
    from .explanation import Explanation, explain
    from .kernels.errors import CheckpointError, WeightError
    from .loading import load_and_quantize
    from .passes.errors import CaptureError, DitcError, PassError, PlanError, VerifyError
    from .passes.plan import Plan
    from .pipeline.optimize import OptimizedPipeline, optimize
    from .pipeline.scheduler import ManifestScheduler
    from .runtime.checkpoints import load_quantized, parameters_on_meta, save_modelopt
    from .runtime.generate import Guidance, generate
    from .runtime.samplers import Sampler, SamplerError, published
    from .runtime.session import Session, branch, session
    from .runtime.students import Student, load_student

__version__ = _version("ditc")

_HOMES = {
    "Stats": "api",
    "compile": "api",
    "stats": "api",
    "Calibration": "calibration",
    "CalibrationError": "calibration",
    "calibrate": "calibration",
    "Explanation": "explanation",
    "explain": "explanation",
    "load_and_quantize": "loading",
    "CheckpointError": "kernels.errors",
    "WeightError": "kernels.errors",
    "OptimizedPipeline": "pipeline.optimize",
    "optimize": "pipeline.optimize",
    "ManifestScheduler": "pipeline.scheduler",
    "Guidance": "runtime.generate",
    "generate": "runtime.generate",
    "Sampler": "runtime.samplers",
    "SamplerError": "runtime.samplers",
    "published": "runtime.samplers",
    "load_quantized": "runtime.checkpoints",
    "parameters_on_meta": "runtime.checkpoints",
    "save_modelopt": "runtime.checkpoints",
    "CaptureError": "passes.errors",
    "DitcError": "passes.errors",
    "PassError": "passes.errors",
    "PlanError": "passes.errors",
    "VerifyError": "passes.errors",
    "Plan": "passes.plan",
    "Session": "runtime.session",
    "Student": "runtime.students",
    "load_student": "runtime.students",
    "branch": "runtime.session",
    "session": "runtime.session",
}

__all__ = [
    "Calibration",
    "CalibrationError",
    "CaptureError",
    "CheckpointError",
    "DitcError",
    "Explanation",
    "Guidance",
    "ManifestScheduler",
    "OptimizedPipeline",
    "PassError",
    "Plan",
    "PlanError",
    "Sampler",
    "SamplerError",
    "Session",
    "Stats",
    "Student",
    "VerifyError",
    "WeightError",
    "__version__",
    "branch",
    "calibrate",
    "compile",
    "explain",
    "generate",
    "load_and_quantize",
    "load_quantized",
    "load_student",
    "optimize",
    "parameters_on_meta",
    "published",
    "save_modelopt",
    "session",
    "stats",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ditc' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
