"""Folders with a LoRA adapter: what makes one usable, and merging it without losing any of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from secateur.errors import ModelError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_MERGED = {
    "alora_invocation_tokens": "it acts from certain tokens on (aLoRA)",
    "layer_replication": "it repeats layers of its base model",
}
"""Settings that merging cannot obey, because the result is no longer the base model with other weights."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter, with or without a config.json of its base model beside it."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_adapter(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Raise ModelError unless the adapter in ``folder`` is one that can be merged whole.

    ``settings`` are the contents of its adapter_config.json. DoRA, ranks that differ between modules, biases and
    modules that were trained in full (``modules_to_save``) are merged exactly.
    """
    from peft import LoraConfig

    base = settings.get("base_model_name_or_path")
    advice = (
        f"Merge it where it was trained (merge_and_unload, save_pretrained), or give the base model, {base}, instead."
    )
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"{name} is an adapter of type {kind or '(none)'} (peft_type in {ADAPTER_CONFIG}); only LoRA adapters can "
            f"be merged. {advice}"
        )
    for key, reason in _NOT_MERGED.items():
        if settings.get(key):
            raise ModelError(f"{name} is a LoRA adapter that cannot be merged: {reason} ({key}). {advice}")
    unknown = [key for key, value in settings.items() if key not in LoraConfig.__dataclass_fields__ and value]
    if unknown:
        raise ModelError(
            f"{name} has settings that the installed peft does not know, and would not obey: "
            f"{', '.join(f'{key} = {settings[key]!r}' for key in sorted(unknown))} in {ADAPTER_CONFIG}. Install a "
            f"newer peft. {advice}"
        )
    if any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise ModelError(
            f"{name} holds both a whole model and an adapter ({ADAPTER_CONFIG}); which of them is meant, or whether "
            "one is merged into the other already, cannot be known. Move one of them to another folder."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{name} is an adapter without {ADAPTER_WEIGHTS}; pickled adapters are not opened.")


def merge_adapter(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]) -> Any:
    """``model`` with the LoRA adapter in ``folder`` merged into its weights.

    Raises ModelError when a tensor of either finds no partner; peft itself raises whatever it does for other shapes.
    """
    from peft import PeftModel

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = list(file.keys())
    for module in settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{key}" for key in stored):
            raise ModelError(
                f"{module} was trained in full (modules_to_save in {ADAPTER_CONFIG}), and {ADAPTER_WEIGHTS} has no "
                "weights for it: what it learned is lost. Save the adapter again from where it was trained."
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing keys, which are an error here
        adapted = PeftModel.from_pretrained(model, str(folder))
        # A second time, because only this tells what found no place.
        names = getattr(model, "_checkpoint_conversion_mapping", None)
        result = adapted.load_adapter(str(folder), "default", key_mapping=names, torch_device=str(model.device))
    for keys, where in ((result.unexpected_keys, "the model"), (result.missing_keys, "the adapter's file")):
        if keys:
            raise ModelError(f"{len(keys)} of its tensors have no counterpart in {where}; the first is {keys[0]}.")
    return adapted.merge_and_unload()
