"""Refuses models that cannot be pruned, before any work."""

from __future__ import annotations

import os

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from secateur.errors import InputError

_QUANTISED = ("Int8Params", "Params4bit")
"""Class names of bitsandbytes' parameters in 8 and 4 bits; by name, because the package may not be installed."""
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Wrappers that keep the model in their attribute ``module``."""


def refuse_what_cannot_work(model: PreTrainedModel) -> None:
    """Raise InputError for a model that cannot be pruned.

    These are objects that are no model, models with adapters, offloaded or distributed weights, weights in 8 or 4 bits,
    wrapped models, several processes, and a GPU that the Trainer would not use.
    """
    _refuse_wrapped(model)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"A {type(model).__name__} is not a model of transformers. Give the model of secateur.load or "
            "AutoModelForCausalLM.from_pretrained."
        )
    if getattr(model.config, "return_dict", None) is False:
        raise InputError("This model answers with tuples. Set model.config.return_dict = True.")
    if isinstance(model, PeftModel):
        raise InputError("This model has adapters. Merge them first: model = model.merge_and_unload().")
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if wrapped:
        raise InputError(
            f"{len(wrapped)} modules of this model carry adapters (the first is {wrapped[0]}). Training was "
            "interrupted, or the model is part of a PeftModel. Load the model again, or merge that PeftModel "
            "(merge_and_unload) and give the result."
        )
    quantised = [name for name, weight in model.named_parameters() if type(weight).__name__ in _QUANTISED]
    if quantised:
        raise InputError(
            f"{len(quantised)} weights of this model are quantised by bitsandbytes (the first is {quantised[0]}). Rows "
            "and columns of quantised weights cannot be removed. Load it in float32, bfloat16 or float16, and "
            "quantise the result."
        )
    _refuse_elsewhere(model)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Pruning supports one process only. Start it without torchrun or accelerate launch.")
    if model.device.type == "cuda" and model.device.index:
        raise InputError(
            f"Training runs on the first visible GPU, and the model is on {model.device}. Set "
            f"CUDA_VISIBLE_DEVICES={model.device.index} and use --device cuda."
        )


def _refuse_wrapped(model: object) -> None:
    """Raise InputError for a model inside a wrapper that changes how it is called."""
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise InputError(
            "This model is wrapped by torch.compile, and its compiled code is for the old shapes. Give the model "
            "inside (model._orig_mod), and compile the model that secateur returns."
        )
    if kind in _WRAPPERS:
        raise InputError(f"This model is wrapped by {kind}. Give the model inside (model.module).")
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if type(module).__name__ in (*_WRAPPERS, "OptimizedModule") or type(module).__name__.startswith("FSDP"):
            raise InputError(f"{name or 'The model'} is wrapped ({type(module).__name__}). Load the model plainly.")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{name or 'The model'} was compiled in place (compile), for the old shapes. Load the model again, and "
                "compile the model that secateur returns."
            )


def _refuse_elsewhere(model: PreTrainedModel) -> None:
    """Raise InputError when weights are not in the memory of this process's device."""
    for name, weight in model.named_parameters():
        if type(weight.data).__name__ == "DTensor":
            raise InputError(f"{name} is spread over several devices (DTensor). Load the model without device_mesh.")
        if not weight.is_meta:
            continue
        places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
        if places:
            raise InputError(
                f"{name} was offloaded by device_map (to {', '.join(places)}) and is on a device only while it "
                "computes. It cannot be cut there. Load the model without device_map, on one device with enough "
                "memory."
            )
        raise InputError(
            f"{name} is on the meta device: it has a shape and no values. Load the model with its weights. Only "
            "secateur.trace supports a model without weights."
        )
