"""The base of every error that ditc raises on purpose; it stands in the lowest room so that all may use it."""

from __future__ import annotations


class DitcError(Exception):
    """Something that the caller asked for cannot be, and the message says what would be right."""


class WeightError(DitcError, ValueError):
    """A weight cannot be packed."""


class CheckpointError(DitcError, ValueError):
    """A checkpoint cannot be read, or would be read wrongly."""
