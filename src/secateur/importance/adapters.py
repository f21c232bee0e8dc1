"""The LoRA-guided criterion of LoRAPrune (arXiv 2305.18403): Taylor from the gradients of A and B alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from secateur.errors import ModelError
from secateur.importance.base import Needs, borrowed, calibration, mean_loss_backward, unscorable
from secateur.importance.weights import base_members, is_adapter, lora_layer, sum_rows
from secateur.types import DependencyGraph, Member, NodeGroup, Scores

if TYPE_CHECKING:
    from secateur.data import TokenBlocks

Form = Literal["absolute", "squared"]

_BLOCK_ELEMENTS = 1 << 22
"""Elements of one block of rows of the estimate: nothing of the size of a whole weight is ever allocated."""


def estimate_gradient(
    a: torch.Tensor, b: torch.Tensor, grad_a: torch.Tensor, grad_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Estimate of the gradient G of the effective weight ``W + s B A`` (eq. 10 without its quadratic term, over s).

    ``∂L/∂(BA) ≈ ∂_B A + B ∂_A``, where ``∂_B = s G Aᵀ`` and ``∂_A = s Bᵀ G``; hence ``(∂_B A + B ∂_A) / s`` is exactly
    ``G AᵀA + B Bᵀ G``: G itself where the rows of A (with B = 0) or the rows of B (with A = 0) are an orthonormal
    basis. The paper's third term ``− ∂_B ∂_A`` is dropped: it is not of the same degree in the loss, so that loss
    scaling or clipping would change the ranking.

    Args:
        a: ``[r, in]``, with its gradient ``grad_a``.
        b: ``[out, r]``, with its gradient ``grad_b``; any rows of it give the same rows of the estimate.
        scaling: s = alpha / r.

    Returns:
        ``[out, in]``, fp32.
    """
    return (grad_b.float() @ a.float() + b.float() @ grad_a.float()) / scaling


@dataclass(frozen=True)
class Composed:
    """A LoRA-wrapped linear ``W + s B A`` with the gradients that its adapter holds now."""

    weight: torch.Tensor
    """``[out, in]`` as stored, or ``[in, out]`` when ``transposed`` (GPT-2's ``Conv1D``)."""
    transposed: bool
    a: nn.Parameter
    b: nn.Parameter
    scaling: float

    def row_sums(self, axis: int, form: Form) -> torch.Tensor:
        """``Σ |Ĝ (W + s B A)|`` or its squares over the other axis: a number for each slice along ``axis``, fp32."""
        weight = self.weight.T if self.transposed else self.weight
        over_outputs = (axis == 0) != self.transposed
        outputs, inputs = weight.shape
        total = torch.zeros(outputs if over_outputs else inputs, device=weight.device)
        if self.a.grad is None or self.b.grad is None:
            return total
        step = max(1, _BLOCK_ELEMENTS // inputs)
        for start in range(0, outputs, step):
            rows = slice(start, start + step)
            b = self.b.detach()[rows]
            effective = weight[rows].detach().float() + self.scaling * (b.float() @ self.a.detach().float())
            effective *= estimate_gradient(self.a.detach(), b, self.a.grad, self.b.grad[rows], self.scaling)
            value = effective.abs() if form == "absolute" else effective.square()
            if over_outputs:
                total[rows] = value.sum(1)
            else:
                total += value.sum(0)
        return total


def composed(layer: LoraLayer) -> Composed:
    """The composed operator of a wrapped linear with one active, unmerged adapter; ModelError otherwise."""
    base = layer.get_base_layer()
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or len(active) != 1:
        raise ModelError(
            "LoRA-guided scores need exactly one adapter that is active and not merged; "
            f"this {type(base).__name__} has {active or 'none'}{' merged' if layer.merged else ''}."
        )
    name = active[0]
    a, b, weight = layer.lora_A[name].weight, layer.lora_B[name].weight, base.weight
    assert isinstance(a, nn.Parameter)
    assert isinstance(b, nn.Parameter)
    assert isinstance(weight, torch.Tensor)
    return Composed(weight, bool(getattr(layer, "fan_in_fan_out", False)), a, b, float(layer.scaling[name]))


def scores_from_adapter_gradients(
    model: nn.Module, graph: DependencyGraph, form: Form = "absolute", normalise: bool = True
) -> Scores:
    """Scores from the gradients that A and B hold *now*: for use inside a training step, unscaled and unclipped.

    Of each wrapped weight that a group lives on, output side (rows of ``W`` and ``B``) and input side (columns of
    ``W`` and ``A``), the sums over the rows of a unit are divided by their L2 norm over the units (``normalise``: the
    estimate's scale depends on the norms of A and B, so that modules are not comparable without it) and added up.

    Raises:
        ModelError: a prunable group has no weight with an adapter.
    """
    return Scores({group.name: _group_scores(model, group, form, normalise) for group in graph.prunable})


def _group_scores(model: nn.Module, group: NodeGroup, form: Form, normalise: bool) -> torch.Tensor:
    total = torch.zeros(group.size)
    for member, operator in _composed_members(model, group):
        score = sum_rows(operator.row_sums(member.axis, form), member, group.size).cpu()
        total += score / score.norm() if normalise and float(score.norm()) > 0 else score
    return total


def _composed_members(model: nn.Module, group: NodeGroup) -> list[tuple[Member, Composed]]:
    layers = [(member, lora_layer(model, member.parameter)) for member in base_members(group)]
    found = [(member, composed(layer)) for member, layer in layers if layer is not None]
    if not found:
        raise unscorable(group, "lora", "none of its weights has a LoRA adapter (attach one: lora.targets)")
    return found


@dataclass(frozen=True)
class Adapters:
    """``Σ |Ĝ (W + s B A)|`` (``absolute``, LoRAPrune's code) or ``Σ (Ĝ (W + s B A))²`` (``squared``, its paper).

    The gradient of a frozen weight is never allocated: backward runs with gradients for A and B alone. At LoRA's
    initial state (B = 0) the estimate is a rank-r projection of the gradient, good for rows, noisy for columns; it
    becomes useful once the adapters have been trained for a while.
    """

    form: Form = "absolute"
    normalise: bool = True
    batch_size: int = 4
    name: str = "lora"
    needs: Needs = "adapters"

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """See ``Criterion.score``; ``model`` carries LoRA adapters."""
        blocks = calibration(blocks, self.name)
        if not graph.prunable:
            return Scores({})
        adapters = [name for name, _ in model.named_parameters() if is_adapter(name)]
        if not adapters:
            raise ModelError("LoRA-guided scores need a model with LoRA adapters; attach them first (attach_lora).")
        for group in graph.prunable:
            _composed_members(model, group)
        with borrowed(model, adapters):
            mean_loss_backward(model, blocks, self.batch_size)
            return scores_from_adapter_gradients(model, graph, self.form, self.normalise)
