"""Opens models whose layers have different sizes with secateur's code, and writes that code into their folders.

The folder of such a model contains ``modeling_pruned.py`` for people without secateur. secateur never runs that file:
the class is made here, from the same source.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any, cast

import jinja2
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.errors import ModelError
from secateur.surgery.pruned_layers import PrunedLayers

MODELING_FILE = "modeling_pruned.py"
OWN_NAME = "pruned_"
"""Prefix of our names for sizes of a layer, where the family has no name, or requires its own to be global."""

_TEMPLATE = jinja2.Environment(
    loader=jinja2.PackageLoader("secateur.surgery", "."), keep_trailing_newline=True, undefined=jinja2.StrictUndefined
).get_template("modeling_pruned.py.jinja")


def is_uneven(config: PreTrainedConfig) -> bool:
    """True for the config of a model whose layers were pruned to different sizes."""
    return getattr(config, "pruned_layers", None) is not None


def is_listed(config: PreTrainedConfig) -> bool:
    """True for such a config that lists tensors instead of sizes of layers."""
    return "tensors" in (getattr(config, "pruned_layers", None) or {})


def before_listing(config: PreTrainedConfig) -> PreTrainedConfig:
    """``config``, changed in place when it lists tensors: the config of the family's larger model."""
    if is_listed(config):
        for name, value in config.pruned_layers["built_with"].items():
            part, _, size = name.rpartition(".")
            setattr(getattr(config, part) if part else config, size, value)
        for name in ("pruned_layers", "auto_map"):
            vars(config).pop(name, None)
    return config


def family_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class that transformers defines for this model, also when it has uneven layers already."""
    if not is_uneven(model.config):
        return type(model)
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.models."))


def pruned_class(family: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of this family's models with uneven layers; its ``save_pretrained`` writes the modelling file too."""
    return type(f"Pruned{family.__name__}", (_WritesItsCode, PrunedLayers, family), {"__module__": __name__})


def pruned_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class to open a saved model with, when ``is_uneven(config)``; nothing from its folder is executed.

    Raises ModelError for a config that transformers knows no causal language model for.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # its config is a part of that of its type, therefore the class must be named
        name = config.auto_map["AutoModelForCausalLM"].split(".Pruned")[-1]
        family = getattr(transformers, name, None)
        if isinstance(family, type) and issubclass(family, PreTrainedModel) and family.config_class is type(config):
            return pruned_class(family)
        raise ModelError(
            f"{config.model_type} is not a causal language model that transformers {transformers.__version__} knows. "
            "Install the version named in the folder's config.json."
        )
    return pruned_class(cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]))


def auto_map_of(family: type[PreTrainedModel]) -> dict[str, str]:
    """The entry ``auto_map`` of a config, for the class of this family's uneven models."""
    return {"AutoModelForCausalLM": f"{MODELING_FILE.removesuffix('.py')}.Pruned{family.__name__}"}


def modeling_source(family: type[PreTrainedModel]) -> str:
    """The text of ``modeling_pruned.py``: :class:`PrunedLayers` and the family's class, imported from transformers."""
    source = re.sub(r"  # type: ignore.*", "", inspect.getsource(PrunedLayers))
    return _TEMPLATE.render(family=family.__name__, pruned_layers=source)


class _WritesItsCode:
    """transformers copies the file of a class that came with a folder; ours came from here."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        super().save_pretrained(save_directory, **options)  # type: ignore[misc]
        if options.get("is_main_process", True):
            Path(save_directory, MODELING_FILE).write_text(modeling_source(family_of(self)))  # type: ignore[arg-type]
