"""Opening a model: a folder, a Hugging Face hub id, or a built-in name.

Nothing from a model folder is executed without ``trust_remote_code=True``, and nothing is ever unpickled: weights are
read from safetensors. Every fault of a folder is found before the weights are read.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.errors import InputError, ModelError
from secateur.loading import places
from secateur.loading.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    attach_adapter,
    check_adapter,
    is_adapter_folder,
    merge_adapter,
)
from secateur.loading.built_in import BUILT_IN, built_in_folder
from secateur.loading.checks import TOKENIZER_FILES, check_beside, check_config
from secateur.loading.hub import hub_folder
from secateur.loading.library import explained
from secateur.loading.ties import untie
from secateur.loading.weights import Stored, promises_weights, read_header, read_object, stored_dtype, stored_tensors
from secateur.progress import say
from secateur.reading import brief, path_of
from secateur.surgery.rebuild import is_uneven, pruned_class_of
from secateur.types import Settings

Dtype = Literal["float32", "bfloat16", "float16"]


class ModelSettings(Settings):
    """The model, and how it is opened."""

    name: str = "smollm2-135m"
    """A folder, a hub id, or a built-in name."""
    revision: str | None = None
    """Branch, tag or commit on the hub; only for hub ids."""
    device: str = "auto"
    """``auto`` (CUDA, else Apple's MPS, else the CPU) or a torch device such as ``cuda:1``."""
    dtype: Dtype = "float32"
    """Type of the master weights in memory. Training is most stable in float32."""
    trust_remote_code: bool = False
    """Allow code from the model folder to run. Only for folders that you trust."""
    drop_unexpected: bool = False
    """Leave out tensors of the files that have no place in the architecture, such as layers for multi-token prediction.
    Without it, such tensors are refused by name."""


def load(
    name: str = "smollm2-135m",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    drop_unexpected: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Open a causal language model and its tokenizer.

    Args:
        name: a folder, a hub id or a built-in name (``BUILT_IN``). A folder with a LoRA adapter is opened as its base
            model with the adapter merged.
        revision: branch, tag or commit, for hub ids only.
        device: ``auto`` or a torch device.
        dtype: ``float32`` (default), ``bfloat16`` or ``float16``.
        trust_remote_code: allow code from the model's folder to run.
        drop_unexpected: leave out tensors of the files that have no place in the architecture.

    Returns:
        The model in eval mode, and its tokenizer, or None when the folder has none. The model has two more attributes:
        ``stored_dtype``, the type of most floating bytes in its files, and ``source_folder``, the folder of these. For
        a merged adapter both are those of its base.

    Raises:
        InputError: unknown device or dtype, or a flag that is no bool.
        ModelError: there is no such model, it is not a causal LM, its files are damaged, unsafe or do not match its
            config, or there is too little memory.
    """
    _check_flags(trust_remote_code=trust_remote_code, drop_unexpected=drop_unexpected)
    place, precision = pick_device(device), _precision(dtype)
    folder = _find(str(name), revision, trust_remote_code)
    if is_adapter_folder(folder):
        options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        return _open_adapter(folder, str(name), options | {"drop_unexpected": drop_unexpected})
    source = _examine(folder, str(name), trust_remote_code, drop_unexpected)
    model = _read(source, precision, trust_remote_code)
    with explained(f"{name} cannot be put on {place}", str(name)):
        cast(torch.nn.Module, model).to(place).eval()
    return model, _open_tokenizer(folder, str(name), trust_remote_code)


def outline(
    name: str = "smollm2-135m",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    drop_unexpected: bool = False,
) -> PreTrainedModel:
    """The model that ``load`` would open, without its weights (meta device): enough to trace a model of any size.

    Raises ModelError as ``load`` does, except for faults in the values of the weights. A folder with a config and no
    weights is enough. For an adapter, it opens the base model.
    """
    _check_flags(trust_remote_code=trust_remote_code, drop_unexpected=drop_unexpected)
    folder = _find(str(name), revision, trust_remote_code)
    if not is_adapter_folder(folder):
        model = _examine(folder, str(name), trust_remote_code, drop_unexpected, needed=False).empty.eval()
        _open_tokenizer(folder, str(name), trust_remote_code)
        return model
    base, revision = _adapter_base(folder, str(name))
    try:
        model = outline(base, revision=revision, trust_remote_code=trust_remote_code, drop_unexpected=drop_unexpected)
    except ModelError as error:
        raise _without_base(str(name), base, error) from error
    _check_adapter_weights(folder, str(name))
    with explained(f"The adapter {name} does not fit its base model {base}", str(name)):
        attach_adapter(copy.deepcopy(model), folder, read_object(folder / ADAPTER_CONFIG))
    _open_tokenizer(folder, str(name), trust_remote_code)
    return model


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` means CUDA, else MPS, else the CPU. Raises InputError when the device does not exist."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type == "meta":
            raise NotImplementedError("it has shapes but no numbers")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"Device {brief(device)} cannot be used here ({first}). Use auto, cpu, cuda, cuda:N or mps."
        ) from error
    return place


def _check_flags(**flags: object) -> None:
    """Raise InputError for a value that is neither True nor False: the text "no" would count as true."""
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise InputError(f"{key} is {brief(value)}; it must be True or False.")


def _precision(dtype: str) -> torch.dtype:
    if dtype not in get_args(Dtype):
        raise InputError(f"Unknown dtype {dtype!r}; allowed are {', '.join(get_args(Dtype))}.")
    return cast(torch.dtype, getattr(torch, dtype))


def _find(name: str, revision: str | None, trust: bool) -> Path:
    """The model's folder, after downloading or converting it if needed."""
    path = path_of(name, "The model", ModelError)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file. Give the folder with config.json and *.safetensors.")
    if name in BUILT_IN:
        return built_in_folder(name)
    if name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise ModelError(f"There is no folder {name}. Give a model folder, a hub id or one of: {', '.join(BUILT_IN)}.")
    close = difflib.get_close_matches(name.lower(), BUILT_IN, cutoff=0.7)
    if close and "/" not in name:
        raise ModelError(f"There is no folder and no built-in model {name!r}. Did you mean {close[0]!r}?")
    return hub_folder(name, revision, trust)


@dataclass(frozen=True)
class _Source:
    """A checked folder, with everything for reading its weights."""

    folder: Path
    name: str
    config: PreTrainedConfig
    empty: PreTrainedModel
    """The model without its weights."""


def _examine(folder: Path, name: str, trust: bool, drop: bool, needed: bool = True) -> _Source:
    """Check a folder before its weights are read. Raises ModelError for every fault.

    ``needed``: whether there must be weights.
    """
    config = check_config(folder, name, trust)
    check_beside(folder, name)
    stored = stored_tensors(folder, name) if needed or promises_weights(folder) else {}
    if stored:
        places.check_layers(config, len(stored), name)
    empty = _without_weights(config, name, trust)
    if stored:
        config, empty = _settle(config, empty, stored, name, trust, drop)
    places.promise_nothing_absent(empty)
    for key, value in (("stored_dtype", stored_dtype(stored.values())), ("source_folder", folder)):
        setattr(empty, key, value)
    empty.config._name_or_path = (
        name  # the name in plans, cards and adapters; a path of the cache would mean nothing there
    )
    return _Source(folder, name, config, empty)


def _settle(
    config: PreTrainedConfig,
    empty: PreTrainedModel,
    stored: Mapping[str, Stored],
    name: str,
    trust: bool,
    drop: bool,
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Adjust config and model to the files where that is allowed; raises ModelError where it is not."""
    found = places.fit(empty, stored)
    places.check_types(empty, stored, found)
    places.check_places(empty, stored, found, name)
    if found.unplaced:
        say(places.leave_out(found.unplaced, config, name, drop))
    if pairs := places.contradicted_ties(empty, stored, found):
        untie(config)
        empty = _without_weights(config, name, trust)
        if getattr(empty, "all_tied_weights_keys", None):
            raise ModelError(
                f"config.json of {name} says that {' and '.join(pairs[0])} are one tensor; the files hold two that "
                "differ, and this kind of model supports only one. Save it again where it was trained."
            )
        say(
            f"config.json of {name} says that {' and '.join(pairs[0])} are one tensor (tie_word_embeddings); the files "
            "hold two that differ, and both are used."
        )
    return config, empty


def _without_weights(config: PreTrainedConfig, name: str, trust: bool) -> PreTrainedModel:
    """The model of a config on the meta device."""
    config = copy.deepcopy(config)
    with explained(f"No model can be built from the config.json of {name}", name), torch.device("meta"):
        if is_uneven(config):
            return pruned_class_of(config)(config)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=trust))


def _read(source: _Source, precision: torch.dtype, trust: bool) -> PreTrainedModel:
    """Read the weights; raises ModelError when the file and the architecture do not fit each other."""
    config, name = source.config, source.name
    opener: Any = pruned_class_of(config) if is_uneven(config) else AutoModelForCausalLM
    with explained(f"The weights of {name} do not fit its config.json", name):
        opened: Any = opener.from_pretrained(
            source.folder,
            config=config,
            dtype=precision,
            use_safetensors=True,
            trust_remote_code=trust,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
        )
    model, info = opened
    shapes = [f"{key}: {list(stored)} instead of {list(wanted)}" for key, stored, wanted in info["mismatched_keys"]]
    places.refuse_misfits(sorted(shapes) + sorted(info["missing_keys"]), name)
    places.promise_nothing_absent(model)
    known: Any = source.empty
    model.stored_dtype = known.stored_dtype or precision  # a pruned checkpoint is written in the type of its source
    model.source_folder = known.source_folder
    model.config._name_or_path = name
    return cast(PreTrainedModel, model)


def _open_tokenizer(folder: Path, name: str, trust: bool) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer, with a padding token; None when the folder has no tokenizer files."""
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return None
    with explained(f"The tokenizer of {name} cannot be opened, from tokenizer.json or the files beside it", name):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast(PreTrainedTokenizerBase, tokenizer)


def _open_adapter(
    folder: Path, name: str, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The base model that an adapter names, opened with ``options`` of ``load``, with the adapter merged into it."""
    base, revision = _adapter_base(folder, name)
    say(f"{name} is an adapter of {base}: opening the base model and merging it")
    try:
        model, tokenizer = load(base, revision=revision, **options)
    except ModelError as error:
        raise _without_base(name, base, error) from error
    _check_adapter_weights(folder, name)
    with explained(f"The adapter {name} does not fit its base model {base}", name):
        merged = merge_adapter(model, folder, read_object(folder / ADAPTER_CONFIG))
    merged.config._name_or_path = name
    return merged.eval(), _open_tokenizer(folder, name, options["trust_remote_code"]) or tokenizer


def _without_base(name: str, base: str, error: ModelError) -> ModelError:
    return ModelError(f"{name} is an adapter of {base}, which cannot be opened. {error}")


def _adapter_base(folder: Path, name: str, above: frozenset[Path] = frozenset()) -> tuple[str, str | None]:
    """Name and revision of the model that a LoRA adapter was trained on; ``above``: adapters that use this one."""
    raw = read_object(folder / ADAPTER_CONFIG)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    for key, value in (("base_model_name_or_path", base), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise ModelError(f"{folder / ADAPTER_CONFIG}: {key} is {value!r:.80}; it must be a text.")
    if not base:
        raise ModelError(
            f"{name} is an adapter that does not name its base model. Merge it first, then give the result."
        )
    check_adapter(folder, name, raw)
    below, above = path_of(base, f"The base model of {name},", ModelError), above | {folder.resolve()}
    if is_adapter_folder(below):
        if below.resolve() in above:
            raise ModelError(
                f"{name} is an adapter of {base}: adapters in a circle, without a base model. Put the name of the base "
                f"model into base_model_name_or_path in {ADAPTER_CONFIG}."
            )
        _adapter_base(below, base, above)
    return base, revision


def _check_adapter_weights(folder: Path, name: str) -> None:
    """Raise ModelError unless the file of the adapter's weights is complete and contains floating-point tensors."""
    for key, tensor in read_header(folder / ADAPTER_WEIGHTS, name).items():
        if not tensor.is_float:
            raise ModelError(
                f"{tensor.file} holds the weight {key} as {tensor.dtype}, which is no floating-point type. Save the "
                "adapter again where it was trained."
            )
