"""Converts a saved model to another form: equal layers, a GGUF file, or an ONNX graph. Writes are atomic."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InputError, VerificationError
from secateur.export.agreement import agreement, check_finite, sample_ids
from secateur.export.huggingface import check_output, check_room, save_folder
from secateur.export.weights import ExportSettings, source_of, written_bytes, written_dtype
from secateur.graph import trace
from secateur.progress import say
from secateur.whole import open_permissions, place_of, whole

Form = Literal["uniform", "gguf", "onnx"]
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference of logits that zeros may make in the type in memory, as a fraction of the largest."""


class FormInfo(NamedTuple):
    """One form: the check of its output path, and its writer."""

    check: Callable[[Path], Path]
    """Returns the absolute output path. Raises InputError for a path that cannot be written. Writes nothing."""
    write: Callable[[PreTrainedModel, PreTrainedTokenizerBase | None, Path, ExportSettings], str]
    """Writes the model, and returns what was checked."""


def _to_uniform(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, settings: ExportSettings
) -> str:
    from secateur.export.uniform import uniform_model

    check_finite(model, written_dtype(model, settings))
    even = uniform_model(model)
    ids = sample_ids(model.config).to(model.device)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        found = even(input_ids=ids, use_cache=False).logits
    difference, _, good = agreement(found, expected, _TOLERANCE[model.dtype])
    if not good:
        raise VerificationError(
            f"After padding with zeros, the model computes something else: logits differ by {difference:.3g}."
        )
    if source_of(model) is not None:
        even.source_folder = model.source_folder
    even.stored_dtype = written_dtype(model, settings)  # type: ignore[assignment]
    found = save_folder(even, tokenizer, folder, graph=trace(even), kept={}, settings=settings)
    return (
        f"AutoModelForCausalLM.from_pretrained opens it without secateur: {found.parameters:,} parameters. Logits "
        f"differ by at most {difference:.1e} from those of the unpadded model."
    )


def _to_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, file: Path, settings: ExportSettings
) -> str:
    if importlib.util.find_spec("gguf") is None:
        raise InputError(
            "gguf is not installed, and GGUF files need it. Install it with: pip install 'secateur[formats]'"
        )
    from secateur.export.gguf import write_gguf

    check_finite(model, written_dtype(model, settings))
    check_room(file, written_bytes(model, settings))
    with _scratch(file) as scratch:
        name = Path(model.config._name_or_path or model.config.model_type).name
        return write_gguf(model, tokenizer, scratch, written_dtype(model, settings), name)


def _to_onnx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, settings: ExportSettings
) -> str:
    from secateur.export.onnx import write_onnx

    check_finite(model)
    check_room(folder, sum(weight.numel() for weight in model.parameters()) * torch.float32.itemsize)
    with _scratch(folder) as scratch:
        scratch.mkdir(parents=True)
        said = write_onnx(model, scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return said


def _check_file(file: Path) -> Path:
    """Raise InputError early for a path that cannot become a new file."""
    path = place_of(file)
    if path.exists():
        raise InputError(f"{file} exists already. Name a new file.")
    if not path.parent.is_dir():
        raise InputError(
            f"{file} cannot be written: there is no folder {path.parent}. Name a file in an existing folder."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{file} cannot be written: no permission for {path.parent}. Name a file elsewhere.")
    return path


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """``whole``, with a message for a path that cannot be written."""
    say(f"Writing {target}")
    try:
        with whole(target) as scratch:
            yield scratch
            open_permissions(scratch)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}. Free some space, or name another path."
        ) from error


FORMS: Mapping[Form, FormInfo] = {
    "uniform": FormInfo(check_output, _to_uniform),
    "gguf": FormInfo(_check_file, _to_gguf),
    "onnx": FormInfo(check_output, _to_onnx),
}
