"""Gives a cut model in memory the class and config of its saved form. It can then be saved, or pruned again."""

from __future__ import annotations

import copy
from typing import NamedTuple

from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ModelError
from secateur.export.huggingface import describes_itself, empty_model, on_meta, standard_form
from secateur.surgery import slice_model
from secateur.types import DependencyGraph, Kept


class Architecture(NamedTuple):
    """A class and a config, from which a model can be built."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig

    def build(self) -> PreTrainedModel:
        """A model with random weights, for inference."""
        return self.model_class(copy.deepcopy(self.config)).eval()


def adopt_config(model: PreTrainedModel, graph: DependencyGraph, kept: Kept) -> Architecture:
    """Give a sliced model, in place, the config and the class that describe it. Returns the previous ones.

    Args:
        model: as ``slice_model`` leaves it, without adapters.
        graph: the graph from before the cut.
        kept: the kept units, as in ``PruningPlan.kept``.

    Weights, buffers and modules are the same objects afterwards, and compute the same. ``save`` may be called
    afterwards with the same ``graph`` and ``kept``. A model that already describes itself is not changed. Raises
    ModelError as ``standard_form`` does.
    """
    before = Architecture(type(model), model.config)
    form = standard_form(model, graph, kept)
    if form.config is model.config:
        return before
    # Each module reads the same config as in a freshly opened model: some uneven layers need their own.
    experts = {vars(module)["config"]._experts_implementation for module in model.modules() if "config" in vars(module)}
    kernels = "eager" if "eager" in experts else model.config._experts_implementation
    for path, built in empty_model(form, like=model).named_modules():
        if "config" in vars(built):
            built.config._experts_implementation = kernels
            model.get_submodule(path).config = built.config
    model.__class__ = form.model_class
    return before


def check_describable(model: PreTrainedModel, graph: DependencyGraph, kept: Kept) -> None:
    """Raise ModelError when no config describes ``model`` after the cut. Tested on a model without weights."""
    outline = on_meta(type(model), model.config)
    slice_model(outline, graph, kept)
    standard_form(outline, graph, kept)


def check_describes_itself(model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose weights have other shapes than in its config.

    ``slice_model`` leaves a model in this state. A second round of pruning cannot start from it.
    """
    if not describes_itself(model):
        raise ModelError(
            f"The weights of this {model.config.model_type} model have other shapes than in its config, as after "
            "slicing by hand. Save it (export.save_folder with its graph and plan), and load the saved model."
        )
