"""The types in which the weights of a model are written: by default those of its source files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from safetensors import safe_open
from transformers import PreTrainedModel

from secateur.types import Settings

_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ExportSettings(Settings):
    """How the model is written."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the written weights. ``auto`` is the type of the source files, because a pruned checkpoint must not grow.
    For a model that was not opened from a folder, it is the type in memory."""
    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)? ?(KB|MB|GB|TB)$")
    """Largest weight file: a number above 0 with KB, MB, GB or TB (``5GB``, ``500MB``)."""

    @field_validator("max_shard_size")
    @classmethod
    def _holds_something(cls, value: str) -> str:
        if not float(value.rstrip("KMGTB ")) > 0:
            raise ValueError("a weight file cannot be empty: give a size above 0, such as 5GB")
        return value


def source_of(model: PreTrainedModel) -> Path | None:
    """The folder with the files of ``model``; None for a model built in Python, or when the folder no longer exists."""
    folder = getattr(model, "source_folder", None)
    return folder if folder is not None and (folder / "config.json").is_file() else None


def written_dtype(model: PreTrainedModel, settings: ExportSettings) -> torch.dtype:
    """The type of the written weights of ``model``."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    return getattr(model, "stored_dtype", None) or model.dtype


def written_types(model: PreTrainedModel, settings: ExportSettings) -> dict[str, torch.dtype]:
    """Type of each floating tensor of the state dict as it is written.

    A tensor that the source stores in another type than the rest keeps that type. Without a known source, tensors that
    a family keeps in float32 are written in float32.
    """
    main, patterns = written_dtype(model, settings), _kept_in_float32(model)
    stored = _stored_types(source_of(model)) if settings.dtype == "auto" else {}
    floating = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()}
    types = {}
    for name, tensor in floating.items():
        kept = any(part in patterns for part in name.split("."))
        types[name] = stored.get(name) or (tensor.dtype if kept else main)
    return types


def written_bytes(model: PreTrainedModel, settings: ExportSettings) -> int:
    """Bytes of all parameters as they are written; tied ones once."""
    types, main = written_types(model, settings), written_dtype(model, settings)
    return sum(parameter.numel() * types.get(name, main).itemsize for name, parameter in model.named_parameters())


def written_weights(
    model: PreTrainedModel, settings: ExportSettings
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state dict as it is written, and as it is after opening: all in one type, except tensors that a family keeps.

    Tied tensors remain one tensor.
    """
    types, patterns = written_types(model, settings), _kept_in_float32(model)
    main = written_dtype(model, settings)
    cast: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    written, computed = {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in cast:
            small = tensor.detach().to(types[name]) if name in types else tensor.detach()
            kept = name not in types or any(part in patterns for part in name.split("."))
            cast[id(tensor)] = small, small.to(tensor.dtype if kept else main)
        written[name], computed[name] = cast[id(tensor)]
    return written, computed


def _kept_in_float32(model: PreTrainedModel) -> set[str]:
    return {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}


def _stored_types(folder: Path | None) -> Mapping[str, torch.dtype]:
    """Name → type of the floating tensors in the weight files of ``folder``, from their headers."""
    types: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("model*.safetensors")) if folder is not None else ():
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                stored = _FLOATS.get(file.get_slice(name).get_dtype())
                if stored is not None:
                    types[name] = stored
    return types
