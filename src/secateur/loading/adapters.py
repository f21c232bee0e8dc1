"""Folders with a LoRA adapter: checks, and merging without the loss of a weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.reading import brief

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOT_MERGED = {
    "alora_invocation_tokens": "it acts from certain tokens on (aLoRA)",
    "layer_replication": "it repeats layers of its base model",
}
"""Settings that cannot be merged, because the result would not be the base model with other weights."""
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "r": ((int,), "a whole number"),
    "lora_alpha": ((int, float), "a number"),
    "target_modules": ((str, list, type(None)), "a list of names, or a text"),
    "modules_to_save": ((list, type(None)), "a list of names"),
    "rank_pattern": ((dict, type(None)), "an object"),
    "alpha_pattern": ((dict, type(None)), "an object"),
    "layers_to_transform": ((int, list, type(None)), "a list of whole numbers"),
    "trainable_token_indices": ((list, dict, type(None)), "a list of whole numbers"),
}
"""Settings of an adapter whose values peft uses without a check."""
_TOLERANCE, _TOLERANCE_16_BIT = 1e-3, 5e-2
"""Tolerance for the rounding of merging, as a fraction of the largest logit."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` contains an adapter, with or without a config.json of its base model beside it."""
    return (folder / ADAPTER_CONFIG).is_file()


def check_adapter(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Raise ModelError unless the adapter in ``folder`` can be merged completely.

    ``settings`` is the content of its adapter_config.json. DoRA, ranks that differ between modules, biases and
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
    for key, (kinds, what) in _KINDS.items():
        value = settings.get(key)
        if key in settings and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ModelError(f"{folder / ADAPTER_CONFIG}: {key} is {brief(value)}; it must be {what}. {advice}")
    for key, reason in _NOT_MERGED.items():
        if settings.get(key):
            raise ModelError(f"{name} is a LoRA adapter that cannot be merged: {reason} ({key}). {advice}")
    unknown = [key for key, value in settings.items() if key not in LoraConfig.__dataclass_fields__ and value]
    if unknown:
        raise ModelError(
            f"{name} has settings that the installed peft does not know, and would ignore: "
            f"{', '.join(f'{key} = {settings[key]!r}' for key in sorted(unknown))} in {ADAPTER_CONFIG}. Install a "
            f"newer peft. {advice}"
        )
    if any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise ModelError(
            f"{name} holds both a whole model and an adapter ({ADAPTER_CONFIG}); it is not clear which one to open, or "
            "whether they are already merged. Move one of them to another folder."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{name} is an adapter without {ADAPTER_WEIGHTS}. Pickled adapters are not opened. Save it as safetensors."
        )


def attach_adapter(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Attach the LoRA adapter in ``folder`` to ``model``, in place. The model may be without weights.

    Raises ValueError when a tensor of either has no counterpart. peft itself raises many errors for other shapes.
    """
    from peft import PeftModel

    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        stored = list(file.keys())
    for module in settings.get("modules_to_save") or ():
        if not any(f".{module}." in f".{key}" for key in stored):
            raise ValueError(
                f"{module} was trained in full (modules_to_save in {ADAPTER_CONFIG}), and {ADAPTER_WEIGHTS} has no "
                "weights for it: its trained values are missing. Save the adapter again where it was trained."
            )
    place = "cpu" if model.device.type == "meta" else str(model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing keys, which are an error here
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=place)
        # a second time, because only this call returns the tensors without a counterpart
        names = getattr(model, "_checkpoint_conversion_mapping", None)
        result = adapted.load_adapter(str(folder), "default", key_mapping=names, torch_device=place)
    for keys, where in ((result.unexpected_keys, "the model"), (result.missing_keys, "the adapter's file")):
        if keys:
            raise ValueError(f"{len(keys)} of its tensors have no counterpart in {where}; the first is {keys[0]}.")
    return adapted.eval()


def merge_adapter(model: PreTrainedModel, folder: Path, settings: Mapping[str, Any]) -> Any:
    """``model`` with the LoRA adapter in ``folder`` merged into its weights.

    A tied tensor (head and embedding) is untied when the adapter changes one of its uses; the config is changed to
    match. Raises the errors of ``attach_adapter``, and ValueError when the merged model computes something else than
    peft's model with the adapter.
    """
    ties, shared = dict(getattr(model, "all_tied_weights_keys", {})), _uses(model)
    parts = {id(part): part for part in (model.config, model.config.get_text_config())}.values()
    said = [(part, part.tie_word_embeddings) for part in parts if hasattr(part, "tie_word_embeddings")]
    adapted = attach_adapter(model, folder, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about head and embedding, which are told apart here
        _give_each_use_its_own(model, shared)
        ids = _probe(model, settings)
        with torch.no_grad():
            expected = adapted(input_ids=ids, use_cache=False).logits
            merged: Any = adapted.merge_and_unload()
            _tie_again(merged, ties, said)
            found = merged(input_ids=ids, use_cache=False).logits
    _check_the_same(found, expected)
    return merged


def _uses(model: PreTrainedModel) -> dict[int, tuple[torch.nn.Parameter, set[str]]]:
    """Parameters that more than one module uses: their names, by identity."""
    found: dict[int, tuple[torch.nn.Parameter, set[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), (parameter, set()))[1].add(name)
    return {key: entry for key, entry in found.items() if len(entry[1]) > 1}


def _give_each_use_its_own(model: PreTrainedModel, shared: dict[int, tuple[torch.nn.Parameter, set[str]]]) -> None:
    """Copy the ``shared`` parameters that an adapter wraps. Merging then changes only one use."""
    now = _uses(model)
    touched = {key for key, (_, names) in shared.items() if key not in now or now[key][1] != names}
    owners: dict[int, torch.nn.Module] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in touched:
                continue
            if owners.setdefault(id(parameter), module) is not module:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def _tie_again(model: PreTrainedModel, ties: Mapping[str, str], said: Sequence[tuple[PreTrainedConfig, bool]]) -> None:
    """Tie tensors again that are still equal. If some are not, the config states that head and embedding are untied.
    ``said``: its value before peft changed it."""
    from secateur.loading.ties import follow_config, untie

    pairs = [(name, model.get_parameter(name), model.get_parameter(other)) for name, other in ties.items()]
    for _, one, other in pairs:
        if one is not other and not torch.allclose(one, other, rtol=0, atol=1e-6 * float(other.abs().max())):
            untie(model.config)
            follow_config(model)
            return
    for name, _, other in pairs:
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, other)
    for part, tied in said:
        part.tie_word_embeddings = tied


def _probe(model: PreTrainedModel, settings: Mapping[str, Any]) -> torch.Tensor:
    """A few tokens, including those that the adapter trained separately; shape ``[1, tokens]``."""
    rows = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    trained = settings.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    ids = [token for tokens in lists for token in list(tokens)[:4]] + list(range(3, 19))
    return torch.tensor([[token % rows for token in ids]], device=model.device)


def _check_the_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ValueError unless the logits of the merged model equal those of the model with the adapter."""
    tolerance = _TOLERANCE if found.dtype == torch.float32 else _TOLERANCE_16_BIT
    difference = float((found.float() - expected.float()).abs().max())
    scale = float(expected.float().abs().max())
    if not difference <= tolerance * scale:  # also when one of them is not a number
        raise ValueError(
            f"merged into the weights it computes something else than beside them (logits differ by {difference:.3g} "
            f"of {scale:.3g}). Merge it where it was trained (merge_and_unload, save_pretrained)."
        )
