"""Where the C++ of this folder is, for the builder that it shares with the linear layers."""

from __future__ import annotations

import functools
from pathlib import Path

from ..linear.vnni.build import load_reason

_FOLDER = Path(__file__).parent
_SOURCES = (
    _FOLDER / "attention.cpp",
    _FOLDER / "packing.h",
    _FOLDER / "visible.h",
    _FOLDER.parent / "linear" / "vnni" / "kernel.h",
)


@functools.cache
def attention_reason() -> str | None:
    """Why the INT8 attention kernel cannot run here; ``None`` when it can, and then it is loaded."""
    return load_reason(_SOURCES)
