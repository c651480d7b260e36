"""What all tests share: golden files, the zoo of tiny models, and captures of it that are made once."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import register_random, settings

GOLDEN = Path(__file__).parent / "golden"
ZOO = Path(__file__).parent / "zoo"
Built = tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]
NUMBERS = pytest.StashKey["TorchNumbers"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write golden files instead of comparing with them")
    parser.addoption(
        "--explore",
        type=int,
        metavar="SEED",
        help="draw examples of properties anew, torch's numbers from SEED; without it they are the same in every run",
    )


class TorchNumbers:
    """torch's global generator as Hypothesis wants it: every example begins at the seed, so that it can be repeated."""

    def __init__(self, seed: int) -> None:
        self.own = seed

    def seed(self, value: int) -> None:
        torch.manual_seed(self.own + value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


def pytest_configure(config: pytest.Config) -> None:
    seed = config.getoption("--explore")
    config.stash[NUMBERS] = TorchNumbers(seed or 0)  # Hypothesis keeps a weak reference
    register_random(config.stash[NUMBERS])
    # what somebody changed is judged by this run, not whether an example of chance was kind
    settings.register_profile("ditc", derandomize=seed is None)
    settings.load_profile("ditc")
    if hasattr(config, "workerinput"):
        # one process for each core: more threads would only wait for each other
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_numbers(request: pytest.FixtureRequest) -> None:
    """Each test draws the same numbers, whichever tests its process ran before."""
    request.config.stash[NUMBERS].seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares with ``tests/golden/<name>``; ``pytest --accept`` writes the file instead."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        if request.config.getoption("--accept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        accept = f"pytest --accept '{request.node.nodeid}'"
        if not path.exists():
            pytest.fail(f"no golden file tests/golden/{name}; write it with: {accept}", pytrace=False)
        expected = path.read_text(encoding="utf-8")
        if text != expected:
            lines = difflib.unified_diff(expected.splitlines(), text.splitlines(), f"tests/golden/{name}", "now", "")
            pytest.fail("\n".join([*lines, "", f"accept with: {accept}"]), pytrace=False)

    return check


def load(path: Path) -> ModuleType:
    """A module of test helpers by its file: tests are no package."""
    spec = importlib.util.spec_from_file_location(f"zoo_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that one of them can import from another
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def zoo() -> Mapping[str, Callable[[], Built]]:
    """Builders by name: each returns a tiny model in evaluation mode and example inputs, always the same."""
    builders: dict[str, Callable[[], Built]] = {}
    for name in ("diffusers_models", "diffusers_images", "diffusers_video", "handwritten", "handwritten_streams"):
        builders |= load(ZOO / f"{name}.py").MODELS
    return {name: _seeded(build) for name, build in builders.items()}


def _seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    def built() -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, args, kwargs = build()
        return model.eval(), args, kwargs

    return built


@pytest.fixture(scope="session")
def handwritten() -> ModuleType:
    """The module of hand-written models with several streams, for tests that build them with sizes of their own."""
    load(ZOO / "handwritten.py")
    return load(ZOO / "handwritten_streams.py")


@pytest.fixture(scope="session")
def captured(zoo: Mapping[str, Callable[[], Built]]) -> Iterator[Callable[..., list[Any]]]:
    """``captured(name, route="dynamo", dynamic=False)``: the captures of a zoo model, kept for the session.

    Whoever rewrites a captured graph must copy it first.
    """
    kept: dict[tuple[str, str, bool], list[Any]] = {}

    def capture(name: str, route: str = "dynamo", dynamic: bool = False) -> list[Any]:
        key = (name, route, dynamic)
        if key not in kept:
            kept[key] = by_dynamo(*zoo[name](), dynamic=dynamic) if route == "dynamo" else by_export(*zoo[name]())
        return kept[key]

    yield capture
    kept.clear()


def by_dynamo(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool = False
) -> list[Any]:
    """Every graph that Dynamo makes of one call, in normal form."""
    from ditc.passes.capture import capture_dynamo

    captures: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captures.append(capture_dynamo(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        model(*args, **kwargs)  # some models fill caches on their first call, and break the graph there
        torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)
    torch._dynamo.reset()
    return captures


def by_export(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    from ditc.passes.capture import capture_export

    return [capture_export(model, args, kwargs, check=False)]
