"""What every criterion offers, and how a model is borrowed for scoring: eval mode, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from secateur.errors import DataError, ModelError
from secateur.token_loss import TokenLoss
from secateur.types import DependencyGraph, NodeGroup, Scores

if TYPE_CHECKING:
    from secateur.data import TokenBlocks

Needs = Literal["nothing", "activations", "gradients", "adapters"]


class Criterion(Protocol):
    """Says how much each unit matters. Stateless: all options are its own fields, with defaults."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> Needs:
        """``nothing``: only weights; ``activations``: a forward pass over text; ``gradients``: a backward pass with
        gradients of the weights; ``adapters``: LoRA adapters, their values or the gradients of A and B alone."""
        ...

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """Score every unit of every prunable group of ``graph``; higher = keep, fp32, on the CPU.

        Args:
            model: the model that ``graph`` was traced from; it is left exactly as it was.
            graph: groups that must not be scored are protected in it.
            blocks: calibration text; None for a criterion that needs nothing.
            seed: of whatever is random in the criterion.

        Raises:
            DataError: text is needed and there is none.
            ModelError: a prunable group has no parameter that the criterion can read; the message names it.
        """
        ...


@runtime_checkable
class Checked(Protocol):
    """A criterion that cannot read every group, and says so before anything slow begins."""

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """Raise the ModelError that ``score`` would end with. Takes a moment; adapters need not be trained yet."""
        ...


def calibration(blocks: TokenBlocks | None, criterion: str) -> TokenBlocks:
    """``blocks``, or a DataError when there is none."""
    if blocks is None or len(blocks) == 0:
        raise DataError(
            f"The criterion '{criterion}' looks at text and got none. Give calibration text (calibration.text) "
            "and a tokenizer, or choose a method that needs nothing, such as magnitude."
        )
    return blocks


def unscorable(group: NodeGroup, criterion: str, reason: str) -> ModelError:
    """The error for a group that a criterion cannot read."""
    return ModelError(
        f"The criterion '{criterion}' cannot score {group.name}: {reason}. "
        f'Choose another method, or leave the group whole with budget.protect=["{group.name}"].'
    )


def require_gradients(
    graph: DependencyGraph, parameters: Mapping[str, nn.Parameter], wanted: Iterable[str], criterion: str
) -> None:
    """Raise the ``unscorable`` error for the first parameter in ``wanted`` whose type has no gradient."""
    for name in wanted:
        if not parameters[name].is_floating_point():
            group = next(group for group in graph.prunable if name in graph.parameters_of(group))
            raise unscorable(group, criterion, f"{name} is {parameters[name].dtype}, which has no gradient")


@contextmanager
def borrowed(model: nn.Module, trainable: Iterable[str] = ()) -> Iterator[dict[str, nn.Parameter]]:
    """Put the model in eval mode with gradients for ``trainable`` only; afterwards it is exactly as it was.

    Restores, also after an exception: every module's mode, every ``requires_grad``, every ``.grad``.

    Args:
        model: the model to borrow.
        trainable: names of the parameters that collect gradients in ``.grad``, which starts as None.

    Yields:
        The trainable parameters by name.
    """
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[name] for name in trainable}
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters.values()]
    try:
        model.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        yield chosen
    finally:
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, training in modes:
            module.training = training


@contextmanager
def recomputed(model: nn.Module, on: bool = True) -> Iterator[None]:
    """While it lasts, backward passes compute the activations of each decoder layer anew instead of keeping them.

    Also in eval mode, where the model's own switch does nothing. Memory: the hidden states between layers, and one
    layer's activations. Time: one more forward pass. The gradients are the same.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if on else []
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go in."""
    return next(model.parameters()).device


def mean_loss_backward(model: nn.Module, blocks: TokenBlocks, batch_size: int) -> float:
    """Accumulate in ``.grad`` the gradient of the mean next-token loss over all of ``blocks``; return that loss.

    Every block weighs the same, whatever the batch size. One batch of activations is held at a time, and the logits of
    a few of its positions.
    """
    loss = TokenLoss(model, blocks.ids.to(input_device(model)))
    total = 0.0
    with torch.enable_grad():
        for ids in blocks.batches(batch_size):
            total += loss.backward(ids.to(input_device(model)), len(ids) / len(blocks))
    return total
