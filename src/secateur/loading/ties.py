"""Tied tensors: consistency with the files, and untying."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def untie(config: PreTrainedConfig) -> None:
    """Set in ``config``, and in its text part, that head and embedding are two tensors."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def follow_config(model: PreTrainedModel) -> None:
    """Update the ties of ``model`` from its config, which it reads only once, when it is built."""
    known: Any = model
    known.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
