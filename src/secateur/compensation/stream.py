"""Tries whether a layer adds the outputs of its projections to the residual stream as they are.

The refit target ``stream`` adds the drift of the stream to the output that a consumer shall have. Where a norm or a
multiplier follows the consumer (Gemma 2, OLMo 2, GLM-4, Granite), the same output moves the stream by something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.walk import LayerStack, borrowed

_TOKENS = 8
_TOLERANCE = 0.05
"""Largest part of a change that may be missing in the stream: rounding of half precision."""


def check_adds_to_stream(stack: LayerStack, consumers: Iterable[str]) -> None:
    """Raise ModelError unless the layers add the outputs of these weights to the residual stream unchanged.

    Tried on a few tokens: the output of one weight at a time is changed, and the same change must be in the stream
    after it. Costs about one short pass for each weight of a layer.
    """
    by_layer: dict[int, list[str]] = {}
    for name in consumers:
        by_layer.setdefault(int(name.removeprefix(f"{stack.path}.").partition(".")[0]), []).append(name)
    vocabulary = stack.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    states: torch.Tensor | None = None
    with borrowed(stack.model), torch.no_grad():
        for layer in range(len(stack)):
            for name in by_layer.get(layer, ()):
                if not _adds(stack, ids, layer, states, name):
                    raise ModelError(
                        f"The target stream needs layers that add the output of {name} to the residual stream as it "
                        "is, and this one changes it (by a norm or a multiplier). Choose the target dense or own."
                    )
            states = stack.states(ids, layer, states, layer + 1)


def _adds(stack: LayerStack, ids: torch.Tensor, layer: int, states: torch.Tensor | None, name: str) -> bool:
    """Whether a change of the output of ``name`` is found unchanged in a later value of the layer."""
    consumer = stack.model.get_submodule(name.rpartition(".")[0])
    values: list[list[torch.Tensor]] = []
    change: torch.Tensor | None = None
    for _ in range(2):
        with _seen(stack.layers[layer], consumer, change) as seen:
            seen.append(stack.states(ids, layer, states, layer + 1))
        values.append([one.flatten(0, -2) for one in seen])
        own = seen[0]
        if change is None:
            noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(1)).to(own)
            change = noise * max(float(seen[-1].float().square().mean().sqrt()), 1e-3)
    assert change is not None
    before, after = values
    wanted = change.flatten(0, -2).float()
    return any(
        old.shape == wanted.shape
        and not torch.equal(new, after[0])
        and float((new.float() - old.float() - wanted).norm()) <= _TOLERANCE * float(wanted.norm())
        for old, new in zip(before[1:], after[1:], strict=True)
    )


@contextmanager
def _seen(layer: nn.Module, consumer: nn.Module, change: torch.Tensor | None) -> Iterator[list[torch.Tensor]]:
    """A context with the consumer's output, ``change`` added, and then the inputs of all modules called after it."""
    seen: list[torch.Tensor] = []

    def leave(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        found = output if change is None else output + change
        seen.append(found.detach().clone())
        return found

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim() > 1]
        if seen and tensors:
            seen.append(tensors[0].detach().clone())

    inside = [module for module in layer.modules() if module is not layer]
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in inside]
    handles.append(consumer.register_forward_hook(leave))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
