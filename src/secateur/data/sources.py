"""Documents out of what a recipe names: a built-in source, a file of the user's, or a dataset on the hub."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.builtin import SOURCES, installed, read_builtin
from secateur.errors import DataError

OWN_TEXT = "self"
"""Name of the source that the dense model writes itself (see ``own_text.py``)."""
FILES = (".txt", ".jsonl", ".parquet")
_TEXT_KEYS = ("text", "content", "document")
_TXT_DOCUMENT_CHARACTERS = 1500


def check_source(name: str) -> None:
    """Raise DataError when ``name`` cannot be a source or is not installed; does not open anything."""
    if name in SOURCES:
        installed(name)
    if name in SOURCES or name == OWN_TEXT:
        return
    path = Path(name).expanduser()
    if path.suffix in FILES and not path.is_dir():
        if not path.is_file():
            raise DataError(f"There is no text file {name}. Check the path.")
        return
    if path.is_dir():
        raise DataError(f"{name} is a folder. Name the files in it ({', '.join(FILES)}).")
    if path.is_file():
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
        DataError: the source does not exist, cannot be read, or holds records without text.
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


def record_text(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text of one record; None when it has none of the known shapes.

    Known are a string under ``text`` (or ``content``, ``document``), ``messages`` as role and content, and
    ``instruction`` (with ``input``) and ``output``; the last two go through the tokenizer's chat template, if any.
    """
    for key in _TEXT_KEYS:
        if isinstance(record.get(key), str):
            return str(record[key])
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return render(messages, tokenizer)
    question, answer = record.get("instruction"), record.get("output")
    if isinstance(question, str) and isinstance(answer, str):
        more = record.get("input")
        question = f"{question}\n\n{more}" if isinstance(more, str) and more.strip() else question
        return render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)
    return None


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A conversation as text: by the chat template, or as ``Role: content`` paragraphs; None if it is malformed."""
    if not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages):
        return None
    if tokenizer.chat_template:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    return "\n\n".join(f"{message.get('role', 'user').capitalize()}: {message['content']}" for message in messages)


def _texts(records: Iterable[Mapping[str, Any]], name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        text = record_text(record, tokenizer)
        if text is None:
            raise DataError(
                f"Record {number} of {name} has no text; its keys are {', '.join(map(str, record)) or '(none)'}. "
                "Known are text, messages (role, content), or instruction, input and output."
            )
        yield text


def _read_txt(path: Path) -> Iterator[str]:
    """Paragraphs joined until they make a document of a useful size; cut at a blank line, late at any line end."""
    lines: list[str] = []
    length = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                lines.append(line.rstrip())
                length += len(lines[-1])
                enough = _TXT_DOCUMENT_CHARACTERS * (1 if not lines[-1] else 4)
                if length >= enough:
                    yield "\n".join(lines).strip()
                    lines, length = [], 0
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    if length:
        yield "\n".join(lines).strip()


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise DataError(f"Line {number} of {path} is not a JSON object.")
                yield record
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"Line {number} of {path} is not JSON ({error.msg}). A .jsonl file has one object a line."
        ) from error


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
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
        yield from datasets.load_dataset(repository, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises ValueError, DatasetNotFoundError, builder and network errors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"The dataset {name} cannot be read: {first}. Name it as id:config:split.") from error
