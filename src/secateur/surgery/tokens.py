"""Removed tokens: their logits become -inf, and the ids of kept tokens are renumbered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.types import Cut, DependencyGraph, Kept


def kept_tokens(graph: DependencyGraph, kept: Kept) -> torch.Tensor | None:
    """The old id of every new one, shape ``[tokens left]``; None when the vocabulary is not cut."""
    for group, _ in Cut.keeping(graph, kept).groups:
        if group.kind == "vocab":
            return torch.as_tensor(list(kept[group.name]), dtype=torch.long)
    return None


def new_ids(tokens: torch.Tensor | None, old: torch.Tensor) -> torch.Tensor:
    """Token ids of the smaller model for ids of the whole one that are all in ``tokens``, of the same shape."""
    return old if tokens is None else torch.searchsorted(tokens.to(old.device), old)


@contextmanager
def silenced(model: Any, graph: DependencyGraph, kept: Kept) -> Iterator[None]:
    """A context in which removed tokens are never predicted: softmax runs over the others."""
    tokens = kept_tokens(graph, kept)
    if tokens is None:
        yield
        return
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ModelError(
            f"{type(model).__name__} has no output embeddings, and its vocabulary cannot be masked. Leave vocab out of "
            "budget.kinds."
        )

    def hook(module: nn.Module, args: Any, logits: torch.Tensor) -> torch.Tensor:
        gone = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        gone[tokens.to(logits.device)] = False
        return logits.masked_fill(gone, -torch.inf)

    handle = head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
