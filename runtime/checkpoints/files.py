"""Checkpoints on disk: which files make one, what their headers promise, and its tensors one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditc.kernels.errors import CheckpointError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""How a safetensors header names the types that torch has."""

Rename = Callable[[str], str]
"""Gives a name in a file the name that it has in the model."""

_LARGEST_HEADER = 100_000_000  # what the safetensors library itself accepts


@dataclass(frozen=True)
class StoredTensor:
    """What a header says about one tensor; ``key`` is its name in the file."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    def __str__(self) -> str:
        return f"{self.key} ({str(self.dtype).removeprefix('torch.')} {list(self.shape)})"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers have been read and whose tensors have not.

    Attributes:
        path: what the user named.
        tensors: what is stored, by the name that it has in the model.
        metadata: the free text of each file's header.
        config: ``config.json``, or empty where there is none.
        rename: what a name in the file is in the model.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: tuple[Mapping[str, str], ...]
    config: Mapping[str, Any]
    rename: Rename | None = None

    def name(self, key: str) -> str:
        """What a tensor or a module of the file is called in the model."""
        return key if self.rename is None else self.rename(key)

    def read(self, stored: StoredTensor) -> Tensor:
        """One tensor, in memory of its own.

        The file is opened for this tensor alone: what it maps into memory goes when the copy is made, so the pages
        of a large file do not pile up in the process.

        Raises:
            CheckpointError: the file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(stored.file, framework="pt", device="cpu") as opened:
                tensor: Tensor = opened.get_tensor(stored.key)
                return tensor.clone()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored} cannot be read from {stored.file}: {error}") from error


def open_checkpoint(path: str | Path, rename: Rename | None = None) -> Checkpoint:
    """Reads the headers of a checkpoint, and its ``config.json``.

    Args:
        path: a safetensors file, or a folder of a model (``config.json`` beside one safetensors file, or beside the
            shards that an ``…index.json`` lists), or of a pipeline with such a folder ``transformer``.
        rename: what a name in the files is in the model, where the two differ.

    Raises:
        CheckpointError: files that are missing, truncated or not safetensors, or that contradict their index; two
            names that become one.
    """
    found = _found(Path(path))
    if rename is None:
        return found
    tensors: dict[str, StoredTensor] = {}
    for key, tensor in found.tensors.items():
        name = rename(key)
        if name in tensors:
            raise CheckpointError(f"{tensors[name].key} and {key} are both renamed to {name}")
        tensors[name] = tensor
    return replace(found, tensors=tensors, rename=rename)


def _found(path: Path) -> Checkpoint:
    if path.is_file():
        return _opened(path, [path], {}, None)
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a safetensors file nor a folder")
    folder = path / "transformer" if (path / "transformer" / "config.json").is_file() else path
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder} holds several indices ({_names(indices)}): name one safetensors file")
    if indices:
        return _from_index(path, indices[0], config)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        what = f"several safetensors files and no index ({_names(files)})" if files else "no safetensors file"
        raise CheckpointError(f"{folder} holds {what}")
    return _opened(path, files, config, None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, an object is wanted")
    return values


def _from_index(path: Path, index: Path, config: Mapping[str, Any]) -> Checkpoint:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index} has no weight_map from keys to files")
    files = [index.parent / name for name in sorted(set(places.values()))]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{index} lists {_names(absent)}, missing beside it")
    return _opened(path, files, config, places)


def _opened(path: Path, files: list[Path], config: Mapping[str, Any], places: Mapping[str, str] | None) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    metadata = []
    for file in files:
        stored, text = read_header(file)
        metadata.append(text)
        for tensor in stored:
            if tensor.key in tensors:
                raise CheckpointError(f"{tensor.key} is stored twice: in {tensors[tensor.key].file} and in {file}")
            tensors[tensor.key] = tensor
    if places is not None:
        found = {key: tensor.file.name for key, tensor in tensors.items()}
        wrong = sorted(key for key in found.keys() | places.keys() if found.get(key) != places.get(key))
        if wrong:
            key = wrong[0]
            raise CheckpointError(
                f"the index and the shards of {path} disagree about {len(wrong)} tensors: {key} should be in "
                f"{places.get(key, 'no file')} and is in {found.get(key, 'no file')}"
            )
    return Checkpoint(path, tensors, tuple(metadata), config)


def read_header(file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors that a safetensors file holds, and the free text of its header.

    Raises:
        CheckpointError: the file cannot be read, is shorter or longer than its header says, or names a type that
            torch does not have.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{file} is truncated, or no safetensors file: {size} bytes")
            header = json.loads(opened.read(length))
            text = {str(k): str(v) for k, v in header.pop("__metadata__", {}).items()}
            tensors = [_entry(file, key, entry) for key, entry in header.items()]
            end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the header of {file} cannot be read: {error}") from error
    if size != 8 + length + end:
        kind = "truncated" if size < 8 + length + end else "longer than its header says"
        raise CheckpointError(f"{file} is {kind}: {size} bytes, its header promises {8 + length + end}")
    return tensors, text


def _entry(file: Path, key: str, entry: Mapping[str, Any]) -> StoredTensor:
    kind, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    if kind not in DTYPES:
        raise CheckpointError(
            f"{key} in {file} has the type {kind}, which torch cannot read; it reads {', '.join(DTYPES)}"
        )
    start, end = (int(n) for n in entry["data_offsets"])
    if end - start != math.prod(shape) * DTYPES[kind].itemsize:
        raise CheckpointError(f"{key} in {file} has {end - start} bytes, which is not {kind} {list(shape)}")
    return StoredTensor(key, DTYPES[kind], shape, file)


def _names(files: list[Path]) -> str:
    return ", ".join(file.name for file in files)
