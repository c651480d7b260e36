"""Options of methods and runs: frozen, strict, with errors that say what would be right."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import DistillError


class Options(BaseModel):
    """Base of everything that a configuration file fills.

    Raises:
        DistillError: an unknown option (with the nearest known one), a wrong type, a value out of range.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise DistillError("; ".join(self._explain(dict(fault)) for fault in error.errors())) from None

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, values: Any) -> Any:
        # YAML knows lists only
        if not isinstance(values, dict):
            return values
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    @classmethod
    def _explain(cls, fault: dict[str, Any]) -> str:
        name = ".".join(str(part) for part in fault["loc"])
        owner = cls.__name__
        if fault["type"] == "extra_forbidden":
            known = list(cls.model_fields)
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
            return f"{owner} has no option {name!r}: {hint}"
        if fault["type"] == "missing":
            return f"{owner} needs {name!r}"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "value_error":
            return f"{owner}: {message}"
        return f"{owner}: {name}={fault['input']!r}: {message}"
