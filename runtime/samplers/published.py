"""Schedules of published distilled models, as manifests that ship with ditc."""

import difflib
from importlib.resources import files

from .errors import SamplerError
from .manifest import Sampler


def published_names() -> tuple[str, ...]:
    """The names that :func:`published` knows, sorted."""
    folder = files(__package__) / "schedules"
    return tuple(sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")))


def published(name: str) -> Sampler:
    """The sampler of a published model, such as "flux-1-schnell".

    Raises:
        SamplerError: there is none of that name.
    """
    known = published_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known ones: {', '.join(known)}"
        raise SamplerError(f"there is no published sampler {name!r}: {hint}")
    return Sampler.from_text((files(__package__) / "schedules" / f"{name}.toml").read_text(encoding="utf-8"))
