"""Everything of a model folder that is not weights or code: config, generation settings, tokenizer, processor, licence.

A result is the user's model, smaller, and otherwise the same. Therefore the source's files are copied unchanged. In its
config and generation settings, only keys that were changed since opening are changed: transformers would drop keys with
default values, add keys that the source does not have, and rename others.
"""

from __future__ import annotations

import copy
import fnmatch
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.errors import InputError, is_full
from secateur.export.weights import source_of
from secateur.loading import quiet_transformers
from secateur.loading.beside import LICENCE, PROCESSOR, TOKENIZER
from secateur.reading import parse_json, read_json
from secateur.surgery.rebuild import is_uneven

Words = dict[str, bytes]
"""Path in the folder → content."""

_NAMES_CODE = ("auto_map", "custom_pipelines")
"""Keys of JSON files that name code, which runs with ``trust_remote_code=True``."""
_KERNELS = "experts_implementation"
"""Key of a config with the kernels for stacked experts. Not all kernels support every width."""
_NOT_COMPARED = ("_name_or_path", "transformers_version")
_CONFIG, _GENERATION = "config.json", "generation_config.json"


def words_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
) -> Words:
    """The files beside the weights of ``model``.

    Args:
        model: has the generation settings, and the folder that it came from.
        tokenizer: None writes no tokenizer.
        model_class, config: of the standard form that is written; ``dtype`` of its weights.

    The files do not name code that the result does not contain. Raises InputError for generation settings that
    transformers does not write, and for a tokenizer that cannot be saved.
    """
    source = source_of(model)
    before = None if source is None else _config_of(source, type(config))
    with tempfile.TemporaryDirectory(prefix="secateur-words-") as folder, quiet_transformers():
        scratch = Path(folder)
        words = {_CONFIG: _config(model_class, config, dtype, source, before, scratch)}
        if model.can_generate():
            words |= _generation(model.generation_config, source, before, scratch)
        if tokenizer is not None:
            words |= _tokenizer(tokenizer, source, scratch)
    if source is not None:
        words |= carried(source, LICENCE)
        if before is None or before.get_text_config().vocab_size == config.get_text_config().vocab_size:
            words |= _without_code(carried(source, PROCESSOR))
    return words


def write_words(folder: Path, words: Words) -> None:
    """Write the files of ``words_of`` over those of transformers.

    A model with its own code has it in the new folder as well, under the names that transformers gave it.
    """
    written = folder / _CONFIG
    own = read_json(written).get("auto_map") if written.is_file() else None
    for name, text in words.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text)
    config = read_json(written)
    if "auto_map" in config and own is not None:
        present = {key: name for key, name in own.items() if (folder / f"{str(name).partition('.')[0]}.py").is_file()}
        written.write_bytes(_text(config | {"auto_map": present}))


def carried(folder: Path, patterns: Iterable[str]) -> Words:
    """Files of ``folder`` whose names, in lower case, match one of ``patterns``."""
    files = [path for path in sorted(folder.glob("*")) + sorted(folder.glob("*/*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {
        name: path.read_bytes()
        for name, path in names.items()
        if any(_fits(name.lower(), pattern) for pattern in patterns)
    }


def merged(source: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """``source`` with the changes from ``before`` to ``after``, two readings of it of which the second was changed."""
    result = dict(source)
    for key in before.keys() | after.keys():
        if key in before and key in after and before[key] == after[key]:
            continue
        if key not in after:
            result.pop(key, None)
        elif all(isinstance(there.get(key), dict) for there in (source, before, after)):
            result[key] = merged(source[key], before[key], after[key])
        else:
            result[key] = after[key]
    return result


def _config_of(source: Path, config_class: type[PreTrainedConfig]) -> PreTrainedConfig | None:
    """The source's config as it was opened; None when it is of another family than the written one."""
    try:
        found = config_class.from_pretrained(source, local_files_only=True)
    except Exception:  # config classes raise any error of their validators
        return None
    return found if read_json(source / _CONFIG).get("model_type") == found.model_type else None


def _config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    source: Path | None,
    before: PreTrainedConfig | None,
    scratch: Path,
) -> bytes:
    """config.json: the source's with the changes; without a source, as transformers writes it."""
    config = copy.deepcopy(config)
    kernels = vars(config).pop(_KERNELS, None)  # read back as something else than it is written
    chosen = {} if kernels is None else {_KERNELS: kernels}
    config.architectures = [model_class.__name__]
    config.dtype = dtype
    if not (is_uneven(config) or model_class.is_remote_code()):
        for key in _NAMES_CODE:
            vars(config).pop(key, None)
    config.save_pretrained(scratch)  # validates
    plain = read_json(scratch / _CONFIG)
    if source is None or before is None:
        return _text(_without_parts_code(plain) | chosen)
    before.architectures = before.architectures or config.architectures
    was, now = _compared(before, before.dtype), _compared(config, dtype)
    raw = read_json(source / _CONFIG)
    result = merged(raw, was, now)
    for name, other in config.attribute_map.items():  # the same under another name
        if name in result and was.get(other) != now.get(other):
            result.pop(name)
    if "torch_dtype" in raw and "dtype" in result:
        result["torch_dtype"] = result["dtype"] if "dtype" in raw else result.pop("dtype")
    result["transformers_version"] = plain["transformers_version"]
    result = _without_parts_code(result)
    (scratch / _CONFIG).write_bytes(_text(result))
    again = type(config).from_pretrained(scratch, local_files_only=True)
    return _text((result if _compared(again, dtype) == now else _without_parts_code(plain)) | chosen)


def _compared(config: PreTrainedConfig, dtype: torch.dtype | str | None) -> dict[str, Any]:
    """All keys of ``config``, its parts in the type of the whole: opening a model sets the type in each."""
    config = copy.deepcopy(config)
    for part in [config, *(getattr(config, name, None) for name in config.sub_configs)]:
        if isinstance(part, PreTrainedConfig):
            part.dtype = dtype
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in found.items() if key not in _NOT_COMPARED}


def _generation(
    settings: GenerationConfig, source: Path | None, before: PreTrainedConfig | None, scratch: Path
) -> Words:
    """generation_config.json: the source's own, or none when it has none, unless the settings were changed."""
    file = None if source is None else source / _GENERATION
    known = None
    if file is not None and file.is_file():
        known = GenerationConfig.from_pretrained(file.parent, local_files_only=True)
    elif before is not None:
        known = GenerationConfig.from_model_config(before)
    if file is not None and known is not None and settings == known:
        return {_GENERATION: file.read_bytes()} if file.is_file() else {}
    try:
        copy.deepcopy(settings).save_pretrained(scratch)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"The model's generation settings cannot be written: {reason[:300]} Change model.generation_config, or the "
            f"source's {_GENERATION}."
        ) from error
    plain = read_json(scratch / _GENERATION)
    if file is None or known is None or not file.is_file():
        return {_GENERATION: _text(plain)}
    was, now = (json.loads(each.to_json_string(use_diff=False, ignore_metadata=True)) for each in (known, settings))
    result = merged(read_json(file), was, now)
    return {_GENERATION: _text(result | {"transformers_version": plain["transformers_version"]})}


def _tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path | None, scratch: Path) -> Words:
    """The tokenizer files of its source folder, if ``tokenizer`` was not changed; or those that it writes itself."""
    written = _written(tokenizer, scratch / "given")
    named = Path(tokenizer.name_or_path or "")
    for folder in (named if named.is_absolute() else None, source):
        if folder is None:
            continue
        if _is_that_of(tokenizer, written, folder, scratch):
            return _without_code(carried(folder, TOKENIZER))
    return written if type(tokenizer)._auto_class is not None else _without_code(written)


def _is_that_of(tokenizer: PreTrainedTokenizerBase, written: Words, folder: Path, scratch: Path) -> bool:
    """Whether the folder's tokenizer would write the same, with the padding token that ``loading.load`` sets or not."""
    if type(tokenizer)._auto_class is not None or not carried(folder, TOKENIZER):
        return False
    try:
        fresh = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception:  # not a tokenizer's folder any more
        return False
    if _same(_written(fresh, scratch / "fresh"), written):
        return True
    if fresh.pad_token_id is None:
        fresh.pad_token = fresh.eos_token
    return _same(_written(fresh, scratch / "padded"), written)


def _same(ours: Words, theirs: Words) -> bool:
    """Whether two tokenizers are equal, except for the padding and truncation of the latest text."""
    if ours.keys() != theirs.keys():
        return False
    return all(ours[name] == theirs[name] or _parsed(name, ours) == _parsed(name, theirs) for name in ours)


def _parsed(name: str, words: Words) -> Any:
    if not name.endswith(".json"):
        return words[name]
    content = json.loads(words[name])
    passing = ("padding", "truncation") if name == "tokenizer.json" else ("name_or_path",)
    return {key: value for key, value in content.items() if key not in passing}


def _written(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Words:
    """The files of ``tokenizer.save_pretrained``; raises InputError when it fails."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizer classes raise many errors
        if is_full(error):
            raise
        raise InputError(
            f"The tokenizer cannot be saved ({type(error).__name__}: {error}). Give one that "
            "save_pretrained writes, or none."
        ) from error
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _without_code(words: Words) -> Words:
    """The same files; JSON files without the names of code that is not copied."""
    clean = dict(words)
    for name, text in words.items():
        if name.endswith("config.json") and any(key.encode() in text for key in _NAMES_CODE):
            content = parse_json(text.decode(), name)
            clean[name] = _text({key: value for key, value in content.items() if key not in _NAMES_CODE})
    return clean


def _without_parts_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` without names of code in its parts: only the whole config may name code."""
    parts = {key: value for key, value in config.items() if isinstance(value, dict) and key not in _NAMES_CODE}
    clean = {key: {k: v for k, v in part.items() if k not in _NAMES_CODE} for key, part in parts.items()}
    return {**config, **clean}


def _fits(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
