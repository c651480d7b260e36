"""The compiler's small diffusion transformer, for tests of what its programs do at run time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "tiny_dit_fixtures", Path(__file__).parent.parent / "passes" / "conftest.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module
_spec.loader.exec_module(_module)

make_dit = _module.make_dit
dit_inputs = _module.dit_inputs
