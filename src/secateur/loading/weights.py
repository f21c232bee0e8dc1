"""The weight files of a folder: their selection, their completeness, and their headers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import SafetensorError, safe_open

from secateur.errors import ModelError
from secateur.loading.library import explained
from secateur.progress import say
from secateur.reading import brief, path_of, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
"""Supported types of stored weights, by their names in safetensors."""
_TYPES = r"BOOL|C64|BF16|[UI](8|16|32|64)|F(16|32|64)|F[468](_\w+)?"
_FETCH = "Download or save the model again."


@dataclass(frozen=True)
class Stored:
    """A tensor, as described in the header of its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @property
    def bytes(self) -> int:
        """Size of a floating tensor."""
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model's folder; raises ModelError unless it contains an object."""
    content = read_json(path, error=ModelError, advice="Download the model again.")
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not contain a JSON object. Download the model again.")
    return content


def promises_weights(folder: Path) -> bool:
    """Whether ``folder`` has weights in any form, or an index of them."""
    forms = (".safetensors", INDEX, ".bin", ".pt", ".pth", ".ckpt", ".gguf")
    return any(path.name.endswith(forms) for path in folder.iterdir())


def stored_tensors(folder: Path, name: str) -> dict[str, Stored]:
    """Every tensor that opening ``folder`` reads, by its name in the files; only headers and lengths are read.

    Raises ModelError for files that are missing, damaged, or contradict each other.
    """
    files = _weight_files(folder, name)
    stored: dict[str, Stored] = {}
    for file in files:
        for key, tensor in read_header(file, name).items():
            if key in stored:
                raise ModelError(
                    f"{stored[key].file} and {file} both hold the tensor {key}. It is not clear which one to use. "
                    f"{_FETCH}"
                )
            stored[key] = tensor
    if not stored:
        raise ModelError(f"{files[0]} holds no tensors. {_FETCH}")
    return stored


def stored_dtype(stored: Iterable[Stored]) -> torch.dtype | None:
    """The type of most floating bytes in the files; None when there are none."""
    sizes = dict.fromkeys(FLOATS, 0)
    for tensor in stored:
        if tensor.is_float:
            sizes[tensor.dtype] += tensor.bytes
    most = max(sizes, key=lambda kind: sizes[kind])
    return FLOATS[most] if sizes[most] else None


def read_header(file: Path, name: str) -> dict[str, Stored]:
    """The tensors of a safetensors file; raises ModelError unless it is complete."""
    with explained(f"{file} is damaged or cut off. {_FETCH[:-1]}", name):
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {key: opened.get_slice(key) for key in sorted(opened.keys())}
                return {key: Stored(file, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        except SafetensorError:
            _refuse_unknown_type(file)
            raise


def _refuse_unknown_type(file: Path) -> None:
    """Raise ModelError when safetensors refuses a header because of an unknown type."""
    try:
        tensors = parse_local_safetensors_file_metadata(file).tensors
    except Exception:  # damaged in another way, which the caller reports
        return
    for key, tensor in sorted(tensors.items()):
        if not re.fullmatch(_TYPES, str(tensor.dtype)):
            raise ModelError(f"{file} gives the tensor {key} the type {tensor.dtype!r}, which does not exist. {_FETCH}")


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The files that transformers reads: model.safetensors, else those that the index names."""
    whole, index = folder / WEIGHTS, folder / INDEX
    shards = _shards(index) if index.is_file() else []
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if whole.is_file():
        if missing:
            say(f"{index} names files that do not exist ({missing[0]}). {WEIGHTS} beside it is read.")
        elif set(shards) - {WEIGHTS}:
            _refuse_two_sets(whole, [folder / shard for shard in shards], name)
        return [whole]
    if not index.is_file():
        refuse_weights(name, [path.name for path in folder.iterdir()])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} of {len(shards)} weight files ({missing[0]}). Download it again."
        )
    _refuse_bare(index)
    return [folder / shard for shard in shards]


def _shards(index: Path) -> list[str]:
    named = read_object(index).get("weight_map")
    shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
    if not shards:
        raise ModelError(f"{index} names no weight files (weight_map). {_FETCH}")
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{index} names {brief(shard)}, which is no safetensors file of this folder. {_FETCH}")
        path_of(index.with_name(shard), f"{index} names a file that cannot be:", ModelError)
    return shards


def _refuse_bare(index: Path) -> None:
    """Raise ModelError for an index without ``metadata``, which transformers reads from the one that it uses."""
    found = read_object(index).get("metadata")
    if not isinstance(found, dict):
        raise ModelError(
            f"{index}: metadata is {brief(found)}; it must be an object, such as {{}}. Correct it. {_FETCH}"
        )


def _refuse_two_sets(whole: Path, shards: list[Path], name: str) -> None:
    """Raise ModelError unless ``whole`` contains the same tensors as ``shards``, value by value."""
    alone = read_header(whole, name)
    parts = {key: tensor for shard in shards for key, tensor in read_header(shard, name).items()}
    differs = sorted(alone.keys() ^ parts.keys())
    for key in sorted(alone.keys() & parts.keys()):
        if differs:
            break
        one, other = alone[key], parts[key]
        if (one.dtype, one.shape) != (other.dtype, other.shape) or not same_numbers(one, key, other, key):
            differs = [key]
    if differs:
        raise ModelError(
            f"{name} holds two sets of weights that differ ({differs[0]}): {whole.name}, and {len(shards)} files that "
            f"{INDEX} names. It is not clear which one to use. Move one of the sets to another folder."
        )


def same_numbers(one: Stored, key: str, other: Stored, other_key: str) -> bool:
    """Whether two stored tensors have the same values, also in different types. It reads some rows at a time."""
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as first, safe_open(other.file, framework="pt") as second:
        if not one.shape:
            return torch.equal(first.get_tensor(key).double(), second.get_tensor(other_key).double())
        left, right = first.get_slice(key), second.get_slice(other_key)
        rows = max(1, 2**24 // max(1, math.prod(one.shape[1:])))
        return all(
            torch.equal(left[start : start + rows].double(), right[start : start + rows].double())
            for start in range(0, one.shape[0], rows)
        )


def refuse_weights(name: str, files: list[str]) -> None:
    """Raise ModelError with the reason why none of ``files`` can be opened as weights."""
    if any(file.endswith((".bin", ".pt", ".pth", ".ckpt")) for file in files):
        raise ModelError(
            f"{name} has its weights only as pickle, which can run code when it is opened. secateur reads safetensors "
            "only. If you trust the file, convert it once (load it with transformers, then save_pretrained)."
        )
    if any(file.endswith(".gguf") for file in files):
        raise ModelError(f"{name} has its weights as GGUF. Give the original folder with *.safetensors.")
    raise ModelError(f"{name} has a config.json but no weights (model.safetensors). Download or save it completely.")
