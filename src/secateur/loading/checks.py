"""What must be right about a folder before its weights are read: its config, and the JSON files beside it."""

from __future__ import annotations

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

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_GENERATION, _TOKENIZER = "generation_config.json", "tokenizer_config.json"
# What transformers reads besides config.json; some of it, it leaves out without a word when it cannot be read.
_OBJECTS = (_GENERATION, _TOKENIZER, "special_tokens_map.json", "added_tokens.json")
# What must be numbers there, and is not looked at before it is used.
_NUMBERS = {
    _TOKENIZER: ("model_max_length",),
    _GENERATION: (
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "min_length", "num_beams"),
        *("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
    ),
}


def check_config(folder: Path, name: str, trust: bool) -> PreTrainedConfig:
    """The folder's configuration, if it is that of a causal language model; raises ModelError otherwise."""
    path = folder / "config.json"
    if not path.is_file():
        below = sorted(str(found.parent.relative_to(folder)) for found in folder.glob("*/config.json"))
        hint = f" Perhaps you mean a folder below it: {', '.join(below[:4])}." if below else ""
        raise ModelError(f"{name} has no config.json, so it is not a Hugging Face model folder.{hint}")
    raw = read_object(path)
    model_type = raw.get("model_type")
    if str(model_type) not in CONFIG_MAPPING and not trust:
        if raw.get("auto_map"):
            raise ModelError(
                f"{name} brings its own model code (auto_map in config.json), and transformers {transformers_version} "
                f"has none for {model_type!r}. If you trust its author, say so with --trust-remote-code "
                "(trust_remote_code=True); nothing from the folder was run."
            )
        raise ModelError(
            f"transformers {transformers_version} does not know the model type {model_type!r} of {name}. "
            "A newer transformers may."
        )
    if raw.get("quantization_config"):
        method = _mapping(raw, "quantization_config").get("quant_method", "some method")
        raise ModelError(
            f"{name} is quantised ({method}); rows and columns cannot be cut out. Give the unquantised model."
        )
    _check_types(raw, path)
    _check_causal(raw, name)
    with explained(f"The configuration of {name} is not valid", name):  # config classes raise whatever they like
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    vars(config).pop("quantization_config", None)  # empty, as seen above; transformers would look into it
    return cast(PreTrainedConfig, config)


def check_beside(folder: Path, name: str) -> None:
    """Raise ModelError for a file with settings of the tokenizer or of generation that is not what it should be."""
    contents = {file: read_object(folder / file) for file in _OBJECTS if (folder / file).is_file()}
    for file, keys in _NUMBERS.items():
        for key in keys:
            value = contents.get(file, {}).get(key)
            parts = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(part is None or _is_number(part) for part in parts):
                raise ModelError(
                    f"{folder / file}: {key} is {_short(value)}; it must be a number. Mend it or take it out."
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
        raise ModelError(f"{path}: model_type is {_short(kind)}; it must be the name of a type of model.")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(f"{path}: architectures is {_short(names)}; it must be a list of names of classes.")
    for key in ("dtype", "torch_dtype"):
        kind = raw.get(key)
        if kind not in (None, "auto") and not isinstance(
            getattr(torch, str(kind).removeprefix("torch."), None), torch.dtype
        ):
            raise ModelError(
                f"{path}: {key} is {_short(kind)}; it must be a type such as float32 or bfloat16, or null."
            )
    if raw.get("transformers_weights") is not None:
        raise ModelError(
            f"{path} says that its weights are elsewhere than usual (transformers_weights). Call the file "
            "model.safetensors and take the key out."
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:60]}…"


def _mapping(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What stands under ``key``; empty when that is null, missing, or no JSON object."""
    value = raw.get(key)
    return value if isinstance(value, dict) else {}


def _check_causal(raw: Mapping[str, Any], name: str) -> None:
    """Refuse encoders, encoder-decoders and models without a language-modelling head."""
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
