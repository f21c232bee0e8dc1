"""Reads documents from a built-in source, a user's file, or a dataset on the hub."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.builtin import SOURCES, installed, read_builtin
from secateur.data.records import TEXT_KEYS, record_text, sound
from secateur.errors import DataError
from secateur.progress import say
from secateur.reading import open_text, parse_json, path_of

OWN_TEXT = "self"
"""Name of the source of text that the dense model writes itself (see ``own_text.py``)."""
FILES = (".txt", ".jsonl", ".parquet")
_TXT_DOCUMENT_CHARACTERS = 1500
_LONGEST_LINE = 200_000
"""Characters of a ``.txt`` line that are read at a time; each part of a longer line is a document."""


def check_source(name: str) -> None:
    """Raise DataError when ``name`` cannot be a source, or is not installed. Opens nothing."""
    if name in SOURCES:
        installed(name)
    if name in SOURCES or name == OWN_TEXT:
        return
    path = path_of(name, "The text", DataError)
    if sound(name) != name:
        raise DataError(
            f"The name of the text {name!r} is not UTF-8, and recipes, reports and JSON files need UTF-8. Rename the "
            "file or its folder, or give a link to it."
        )
    try:
        folder, file = path.is_dir(), path.is_file()
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}. Change its permissions, or name other text."
        ) from error
    if path.suffix in FILES and not folder:
        if not file:
            raise DataError(f"There is no text file {name}. Check the path.")
        return
    if folder:
        raise DataError(f"{name} is a folder. Name the files in it ({', '.join(FILES)}).")
    if file:
        raise DataError(f"{name} has the ending {path.suffix or '(none)'}; text files end in {', '.join(FILES)}.")
    close = difflib.get_close_matches(name.lower(), [*SOURCES, OWN_TEXT], n=1)
    if close and "/" not in name:
        raise DataError(f"There is no text source {name!r}. Did you mean {close[0]!r}?")
    if name.startswith((".", "/", "~")):
        raise DataError(f"There is no text file {name}. Check the path.")


def read_documents(name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents of a source, one by one and in a fixed order.

    Args:
        name: a built-in source, a file (``.txt``: paragraphs joined to 1,500 characters or more; ``.jsonl`` and
            ``.parquet``: see ``record_text``), or a hub dataset as ``id``, ``id:config`` or ``id:config:split``.
        tokenizer: renders conversations with its chat template.

    Raises:
        DataError: the source does not exist, cannot be read, or has records without text.
    """
    check_source(name)
    if name in SOURCES:
        return iter(read_builtin(name))
    path = Path(name).expanduser()
    if path.suffix == ".txt":
        return _read_txt(path)
    if path.suffix == ".jsonl":
        return _texts(_read_jsonl(path), name, tokenizer)
    if path.suffix == ".parquet":
        return _texts(_read_parquet(path), name, tokenizer)
    return _texts(_read_hub(name), name, tokenizer)


def _texts(records: Iterable[Mapping[str, Any]], name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        try:
            text = record_text(record, tokenizer)
        except DataError as error:
            raise DataError(f"Record {number} of {name} {error}") from error
        whole = sound(text)
        if whole != text:
            _mention_halves(name)
        yield whole


@functools.cache  # a source is read for several purposes
def _mention_halves(name: str) -> None:
    say(f"{name} contains halves of surrogate pairs, which are no characters. Each is read as U+FFFD.")


def _read_txt(path: Path) -> Iterator[str]:
    """Paragraphs joined to documents of a useful size; cut at a blank line, or late at any line end."""
    lines: list[str] = []
    length = 0
    with open_text(path, error=DataError) as file:
        while line := file.readline(_LONGEST_LINE):
            lines.append(line.rstrip())
            length += len(lines[-1])
            enough = _TXT_DOCUMENT_CHARACTERS * (1 if not lines[-1] else 4)
            if length >= enough:
                yield "\n".join(lines).strip()
                lines, length = [], 0
    if length:
        yield "\n".join(lines).strip()


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with open_text(path, error=DataError) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"Line {number} of {path}"
            record = parse_json(line, where, error=DataError, advice="A .jsonl file has one object in each line.")
            if not isinstance(record, dict):
                raise DataError(f"{where} is not a JSON object.")
            yield record


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows with the columns that can contain text: pictures are not read."""
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        for batch in table.iter_batches(batch_size=256, columns=[name for name in names if name in TEXT_KEYS] or None):
            yield from batch.to_pylist()
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:  # ValueError: no UTF-8, odd dates
        raise DataError(f"{path} cannot be read as Parquet ({error}).") from error


def _read_hub(name: str) -> Iterator[Mapping[str, Any]]:
    """Stream a hub dataset given as ``id[:config[:split]]``; the dataset's own code never runs."""
    import datasets
    from huggingface_hub import HfApi, constants

    repository, config, split = [*name.split(":"), "", ""][:3]
    try:
        HfApi().dataset_info(repository, timeout=10.0)
    except Exception as error:  # no network, no such dataset, gated: the client's classes change between versions
        raise DataError(
            f"There is no text source or file {name!r}, and no dataset of that name could be found on "
            f"{constants.ENDPOINT}. Built-in sources: {', '.join(SOURCES)}, {OWN_TEXT}; "
            f"files end in {', '.join(FILES)}."
        ) from error
    try:
        stream = datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
        if getattr(stream, "features", None):
            stream = stream.decode(False)  # pictures and sounds are not decoded
        yield from stream
    except Exception as error:  # datasets raises ValueError, DatasetNotFoundError, builder and network errors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"The dataset {name} cannot be read: {first}. Name it as id:config:split.") from error
