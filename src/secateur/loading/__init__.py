"""Opening a model: a folder, a Hugging Face hub id, or a built-in name becomes a model and a tokenizer."""

from secateur.loading.adapters import is_adapter_folder
from secateur.loading.built_in import BUILT_IN, BuiltInModel
from secateur.loading.library import quiet_transformers
from secateur.loading.opening import Dtype, ModelSettings, load, outline, pick_device

__all__ = [
    "BUILT_IN",
    "BuiltInModel",
    "Dtype",
    "ModelSettings",
    "is_adapter_folder",
    "load",
    "outline",
    "pick_device",
    "quiet_transformers",
]
