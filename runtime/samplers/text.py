"""Reading and writing manifests, and errors that say what would be right."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import SamplerError


def from_text(text: str) -> dict[str, Any]:
    """The table in a JSON or TOML text.

    Raises:
        SamplerError: neither of both, or without format and version.
    """
    try:
        # no TOML begins with a brace
        values: dict[str, Any] = json.loads(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except json.JSONDecodeError as error:
        raise SamplerError(f"the sampler manifest is not JSON: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise SamplerError(f"the sampler manifest is not TOML: {error}") from None
    for name in ("format", "version"):
        if name not in values:
            raise SamplerError(f"this is no sampler manifest: it has no {name!r}, which every one begins with")
    return values


def to_json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_toml(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    # a JSON string is a TOML basic string, but for the one control character that JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def check_origin(values: Mapping[str, Any], name: str, version: int) -> None:
    """Refuse another program's file, and one of a later version, before its fields are looked at.

    Raises:
        SamplerError
    """
    found = values.get("format", name)
    if found != name:
        raise SamplerError(f"this is no sampler manifest: its format is {found!r}, not {name!r}")
    number = values.get("version", version)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise SamplerError(f"version must be a whole number from 1 on; got {number!r}")
    if number > version:
        raise SamplerError(
            f"this sampler manifest is of version {number}, and this ditc reads up to {version}: use the ditc that "
            "wrote it, or a later one"
        )


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line from pydantic's report, with the nearest field for a key that there is none for."""
    return "; ".join(_explain(dict(fault), model) for fault in error.errors())


def _explain(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    where = [str(part) for part in fault["loc"]]
    name = ".".join(where)
    if fault["type"] == "extra_forbidden":
        known = _fields(model, where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
        return f"unknown field {name!r}: {hint}"
    if fault["type"] == "missing":
        return f"{name} is missing"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{name}: {message}" if name else message
    if fault["type"] == "literal_error":
        near = difflib.get_close_matches(str(fault["input"]), _choices(fault), n=1)
        message += f"; did you mean {near[0]!r}?" if near else ""
    return f"{name}={fault['input']!r}: {message}"


def _choices(fault: Mapping[str, Any]) -> list[str]:
    return [part.strip(" '") for part in fault["ctx"]["expected"].replace(" or ", ", ").split(",")]


def _fields(model: type[BaseModel], path: list[str]) -> list[str]:
    """The fields of the table at `path` within a model."""
    for name in path:
        field = model.model_fields.get(name)
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())] if field is not None else []
        model = next((part for part in inner if isinstance(part, type) and issubclass(part, BaseModel)), model)
    return list(model.model_fields)
