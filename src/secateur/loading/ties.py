"""Tensors that a model holds once and uses twice: what the files say about them, and untying."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def untie(config: PreTrainedConfig) -> None:
    """Let ``config``, and the part of it that is about text, say that head and embedding are two tensors."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def follow_config(model: PreTrainedModel) -> None:
    """Let ``model`` know of its ties what its config says, which it reads once only, when it is built."""
    known: Any = model
    known.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
