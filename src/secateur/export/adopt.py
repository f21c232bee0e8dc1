"""Lets a cut model in memory describe itself, as the saved one would: it can then be saved, or pruned again."""

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
    """Give a sliced model, in place, the config and the class that describe it; returns those it had before.

    Args:
        model: as ``slice_model`` leaves it, without adapters.
        graph: the graph from before the cut.
        kept: what stayed, as in ``PruningPlan.kept``.

    Weights, buffers and modules stay the same objects; what they compute does not change. ``save`` may be called
    afterwards with the same ``graph`` and ``kept``. A model that describes itself already is left alone.
    Raises ModelError as ``standard_form`` does.
    """
    before = Architecture(type(model), model.config)
    form = standard_form(model, graph, kept)
    if form.config is model.config:
        return before
    # Which module reads which config is as a freshly opened model has it: some of uneven layers need their own.
    experts = {vars(module)["config"]._experts_implementation for module in model.modules() if "config" in vars(module)}
    kernels = "eager" if "eager" in experts else model.config._experts_implementation
    for path, built in empty_model(form, like=model).named_modules():
        if "config" in vars(built):
            built.config._experts_implementation = kernels
            model.get_submodule(path).config = built.config
    model.__class__ = form.model_class
    return before


def check_describable(model: PreTrainedModel, graph: DependencyGraph, kept: Kept) -> None:
    """Raise ModelError when no config describes ``model`` without what goes; tried on one without weights."""
    outline = on_meta(type(model), model.config)
    slice_model(outline, graph, kept)
    standard_form(outline, graph, kept)


def check_describes_itself(model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose weights have other shapes than its config says.

    That is how ``slice_model`` leaves a model, which no second round can start from.
    """
    if not describes_itself(model):
        raise ModelError(
            f"The weights of this {model.config.model_type} model have other shapes than its config says, as after "
            "slicing by hand. Save it (export.save_folder with its graph and plan), and load it from there."
        )
