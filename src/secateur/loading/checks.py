"""Checks of a folder before its weights are read: its config, and the JSON files beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from secateur.errors import ModelError
from secateur.loading.library import explained
from secateur.loading.weights import read_object
from secateur.reading import brief

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_ENDINGS = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Names of the files of a model."""
_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"
# files that transformers reads besides config.json; it silently ignores some of them when they cannot be read
_OBJECTS = (_GENERATION, _TOKENIZER, "special_tokens_map.json", "added_tokens.json")
# keys there that must be numbers, and that transformers does not check before use
_NUMBERS = {
    _TOKENIZER: ("model_max_length",),
    _GENERATION: (
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "min_length", "num_beams"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
    ),
}
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Sizes in config.json that must be at least 1."""
_KINDS: Mapping[str, Mapping[type, tuple[str, ...]]] = {
    "config.json": {
        dict: ("auto_map", "text_config", "id2label", "label2id"),
        list: ("layer_types",),
        bool: ("output_attentions", "output_hidden_states", "return_dict", "use_cache"),
    },
    _TOKENIZER: {
        dict: ("added_tokens_decoder",),
        list: ("model_input_names",),
        str: ("tokenizer_class", "processor_class", "padding_side", "truncation_side"),
    },
}
"""Keys with a required type. For other types, errors of libraries do not name the key."""
_WORDS = {dict: "an object", list: "a list", bool: "true or false", str: "a text"}


def check_config(folder: Path, name: str, trust: bool) -> PreTrainedConfig:
    """The folder's configuration. Raises ModelError unless it is that of a causal language model."""
    path = folder / "config.json"
    if not path.is_file():
        below = sorted(str(found.parent.relative_to(folder)) for found in folder.glob("*/config.json"))
        hint = f" Perhaps you mean a folder below it: {', '.join(below[:4])}." if below else ""
        raise ModelError(f"{name} has no config.json, and is not a Hugging Face model folder.{hint}")
    raw = read_object(path)
    _check_types(raw, path)
    model_type = raw.get("model_type")
    if str(model_type) not in CONFIG_MAPPING and not trust:
        if raw.get("auto_map"):
            raise ModelError(
                f"{name} has its own model code (auto_map in config.json), and transformers {transformers_version} has "
                f"none for {model_type!r}. If you trust its author, add --trust-remote-code (trust_remote_code=True). "
                "Nothing from the folder was run."
            )
        raise ModelError(
            f"transformers {transformers_version} does not know the model type {model_type!r} in {path}. Try a newer "
            "version of transformers."
        )
    if raw.get("quantization_config"):
        method = _mapping(raw, "quantization_config").get("quant_method", "some method")
        raise ModelError(
            f"{name} is quantised ({method}); rows and columns cannot be removed. Give the unquantised model."
        )
    _check_causal(raw, name)
    with explained(f"{path} is not valid", name):  # config classes raise many errors
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    vars(config).pop("quantization_config", None)  # empty, as checked above; transformers would read it
    return cast(PreTrainedConfig, config)


def check_beside(folder: Path, name: str) -> None:
    """Raise ModelError for a file that cannot be read, and for invalid settings of the tokenizer or of generation."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() and (not path.is_dir() or path.suffix in _ENDINGS):
            raise ModelError(f"{path} is no ordinary file, or a broken link. Download the model again.")
        if path.suffix in _ENDINGS and not os.access(path, os.R_OK):
            raise ModelError(f"{path} cannot be read (permission). Change its permissions.")
    contents = {file: read_object(folder / file) for file in _OBJECTS if (folder / file).is_file()}
    for file, content in contents.items():
        _check_kinds(content, folder / file)
    for file, keys in _NUMBERS.items():
        for key in keys:
            value = contents.get(file, {}).get(key)
            parts = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(part is None or _is_number(part) for part in parts):
                raise ModelError(
                    f"{folder / file}: {key} is {brief(value)}; it must be a number. Correct or remove it."
                )
    if _GENERATION in contents:
        with explained(f"{folder / _GENERATION} is not valid", name):
            GenerationConfig.from_pretrained(folder, local_files_only=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_types(raw: Mapping[str, Any], path: Path) -> None:
    """Raise ModelError for keys of config.json whose values are of another type than transformers expects."""
    names, kind = raw.get("architectures"), raw.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ModelError(f"{path}: model_type is {brief(kind)}; it must be the name of a type of model.")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{path}: architectures is {brief(names)}; it must be a list of names of classes.")
    for key in ("dtype", "torch_dtype"):
        kind = raw.get(key)
        if kind not in (None, "auto") and not isinstance(
            getattr(torch, str(kind).removeprefix("torch."), None), torch.dtype
        ):
            raise ModelError(f"{path}: {key} is {brief(kind)}; it must be a type such as float32 or bfloat16, or null.")
    for part in (raw, _mapping(raw, "text_config")):
        for key in _SIZES if part.get("use_sliding_window") is False else (*_SIZES, "sliding_window"):
            if isinstance(part.get(key), int) and part[key] < 1:
                raise ModelError(f"{path}: {key} is {brief(part[key])}; it must be 1 or more. Correct it.")
    _check_kinds(raw, path)
    for key, value in raw.items():
        if re.search("dropout|pdrop", key) and _is_number(value) and not 0 <= value <= 1:
            raise ModelError(f"{path}: {key} is {brief(value)}; it must be a probability, from 0 to 1. Correct it.")
    if raw.get("return_dict") is False:
        raise ModelError(f"{path}: return_dict is false, and secateur reads outputs by name. Remove this key.")
    if raw.get("transformers_weights") is not None:
        raise ModelError(
            f"{path} names another weight file than usual (transformers_weights). Rename that file to "
            "model.safetensors and remove the key."
        )


def _check_kinds(content: Mapping[str, Any], path: Path) -> None:
    for form, keys in _KINDS.get(path.name, {}).items():
        for key in keys:
            if content.get(key) is not None and not isinstance(content[key], form):
                raise ModelError(f"{path}: {key} is {brief(content[key])}; it must be {_WORDS[form]}. Correct it.")


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The object under ``key``; empty when it is null, missing, or no JSON object."""
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _check_causal(raw: Mapping[str, Any], name: str) -> None:
    """Raise ModelError for encoders, encoder-decoders and models without a language-modelling head."""
    model_type, architectures = raw.get("model_type"), raw.get("architectures") or []
    what = architectures[0] if architectures else model_type
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{name} is an encoder-decoder ({what}). secateur prunes decoder-only causal language models.")
    if "AutoModelForCausalLM" in _mapping(raw, "auto_map"):
        return
    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update([names] if isinstance(names, str) else names)
    encoder = model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not raw.get("is_decoder")
    without_head = bool(architectures) and not known & set(architectures)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or without_head:
        raise ModelError(
            f"{name} is not a causal language model ({what}). secateur prunes models that transformers opens with "
            "AutoModelForCausalLM."
        )
