"""What cannot be pruned is refused before anything is done."""

from __future__ import annotations

import os

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from secateur.errors import InputError

_QUANTISED = ("Int8Params", "Params4bit")
"""What bitsandbytes calls parameters in 8 and 4 bits; by name, as it need not be installed."""
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""What holds a model in its attribute ``module``."""


def refuse_what_cannot_work(model: PreTrainedModel) -> None:
    """Raise InputError for what is no model, adapters, weights that are elsewhere or in 8 or 4 bits, models wrapped by
    something else, several processes, and a GPU that the Trainer would not use."""
    _refuse_wrapped(model)
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise InputError(
            f"A {type(model).__name__} is not a model of transformers. Give what secateur.load or "
            "AutoModelForCausalLM.from_pretrained returns."
        )
    if getattr(model.config, "return_dict", None) is False:
        raise InputError("This model answers with tuples. Set model.config.return_dict = True.")
    if isinstance(model, PeftModel):
        raise InputError("This model carries adapters. Merge them first: model = model.merge_and_unload().")
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if wrapped:
        raise InputError(
            f"{len(wrapped)} modules of this model carry adapters (the first is {wrapped[0]}), as after training that "
            "was interrupted, or because a PeftModel holds it. Load the model again, or merge that PeftModel "
            "(merge_and_unload) and give what it returns."
        )
    quantised = [name for name, weight in model.named_parameters() if type(weight).__name__ in _QUANTISED]
    if quantised:
        raise InputError(
            f"{len(quantised)} weights of this model are quantised by bitsandbytes (the first is {quantised[0]}); rows "
            "and columns cannot be cut out of those. Load it in float32, bfloat16 or float16, and quantise the result."
        )
    _refuse_elsewhere(model)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Pruning runs in one process so far. Start it without torchrun or accelerate launch.")
    if model.device.type == "cuda" and model.device.index:
        raise InputError(
            f"Training happens on the first visible GPU, and the model is on {model.device}. "
            f"Set CUDA_VISIBLE_DEVICES={model.device.index} and use --device cuda."
        )


def _refuse_wrapped(model: object) -> None:
    """Raise InputError for a model inside something that calls it in a way of its own."""
    kind = type(model).__name__
    if kind == "OptimizedModule":
        raise InputError(
            "This model is wrapped by torch.compile, which keeps what it compiled for the old shapes. Give the model "
            "inside (model._orig_mod), and compile what secateur returns."
        )
    if kind in _WRAPPERS:
        raise InputError(f"This model is wrapped by {kind}. Give the model inside (model.module).")
    for name, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if type(module).__name__ in (*_WRAPPERS, "OptimizedModule") or type(module).__name__.startswith("FSDP"):
            raise InputError(f"{name or 'The model'} is wrapped ({type(module).__name__}). Load the model plainly.")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise InputError(
                f"{name or 'The model'} was compiled in place (compile), for the old shapes. Load the model again, and "
                "compile what secateur returns."
            )


def _refuse_elsewhere(model: PreTrainedModel) -> None:
    """Raise InputError when numbers are not in the memory of this process's device."""
    for name, weight in model.named_parameters():
        if type(weight.data).__name__ == "DTensor":
            raise InputError(f"{name} is spread over several devices (DTensor). Load the model without device_mesh.")
        if not weight.is_meta:
            continue
        places = sorted({str(place) for place in getattr(model, "hf_device_map", {}).values()})
        if places:
            raise InputError(
                f"{name} was offloaded by device_map (to {', '.join(places)}) and comes to a device only while it "
                "computes, so it cannot be cut. Load the model without device_map, on one device that holds it."
            )
        raise InputError(
            f"{name} is on the meta device: it has a shape and no numbers. Load the model with its weights; "
            "secateur.trace looks at one without."
        )
