"""The LoRA-guided criterion of LoRAPrune (arXiv 2305.18403): Taylor from the gradients of A and B alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from secateur.errors import ModelError
from secateur.importance.base import Criterion, Needs, unscorable
from secateur.types import DependencyGraph, Member, NodeGroup, Scores
from secateur.units import adapter_of, base_members, dequantised, is_adapter_parameter, lora_layer, sum_rows
from secateur.walk import Calibration, borrowed, calibration_for, recomputed

Form = Literal["absolute", "squared"]
Sides = Literal["both", "out", "in"]

_BLOCK_ELEMENTS = 1 << 19
"""Elements of one block of rows of the estimate. A block fits a processor's cache: several passes over it are cheap,
and a tensor of the size of a whole weight is never allocated."""


class LoRA(Criterion):
    """``Σ |Ĝ (W + s B A)|`` over the elements of a unit, Ĝ from the gradients of A and B alone.

    The gradient of a frozen weight is never allocated: backward runs with gradients for A and B alone. At LoRA's
    initialisation (B = 0) the estimate is a rank-r random projection of the true gradient. It improves with training.
    Memory beside the model: the activations of one pass, which are recomputed layer by layer in the backward pass, for
    about a third more time.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "https://arxiv.org/abs/2305.18403"
    summary: ClassVar[str] = "weights times their gradients, estimated from the gradients of LoRA's A and B"
    needs: ClassVar[Needs] = "adapters"

    form: Form = "absolute"
    """``absolute``: sum of absolute values (the paper's code); ``squared``: sum of squares (the paper)."""
    normalise: bool = False
    """Divide the unit sums of each module by their L2 norm before they are added up, as in the paper's code.
    Differences between layers are lost. It is required for adding the two ``sides``, whose estimates differ in
    scale."""
    sides: Sides = "out"
    """Matrices that count: those that produce a unit (``out``), those that consume it (``in``), or ``both`` (the
    paper). The estimate for the consuming ones is mostly noise until B has been trained for long."""
    quadratic: bool = False
    """Keep the third term of eq. 10, −∂_B ∂_A."""

    @property
    def of_loss(self) -> bool:
        """Whether scores of different groups can be compared (``Scores.of_loss``).

        With B = 0 the estimate is ``G AᵀA``, and the variance of A's entries depends on the width of the input only. It
        is about the same fraction of G in all matrices that read the residual stream, and these produce the units.
        """
        return self.sides == "out" and not self.normalise

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``. The model must have exactly one active LoRA adapter."""
        text = calibration_for(calibration, self.name)
        if not graph.prunable:
            return Scores({})
        gradients = self._gradients(model, graph)
        adapters = [name for name, _ in model.named_parameters() if is_adapter_parameter(name)]
        with borrowed(model, adapters), recomputed(model):
            text.backward(model)
            return gradients.scores()

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """See ``Criterion.check``: the model has adapters, and every prunable group a weight with one."""
        self._gradients(model, graph)

    def _gradients(self, model: nn.Module, graph: DependencyGraph) -> AdapterGradients:
        if not any(is_adapter_parameter(name) for name, _ in model.named_parameters()):
            raise ModelError("LoRA-guided scores need a model with LoRA adapters. First attach them (attach_lora).")
        return AdapterGradients(model, graph, self)


def gradient_factors(
    a: torch.Tensor,
    b: torch.Tensor,
    grad_a: torch.Tensor,
    grad_b: torch.Tensor,
    scaling: float,
    quadratic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors whose product estimates the gradient G of the effective weight ``W + s B A`` (eq. 10 over s).

    ``∂L/∂(BA) ≈ ∂_B A + B ∂_A``, where ``∂_B = s G Aᵀ`` and ``∂_A = s Bᵀ G``; hence ``(∂_B A + B ∂_A) / s`` is exactly
    ``G AᵀA + B Bᵀ G``: G itself where the rows of A (with B = 0) or the rows of B (with A = 0) are an orthonormal
    basis. The paper's third term ``− ∂_B ∂_A`` is left out unless ``quadratic`` is set: it is not of the same degree in
    the loss, therefore its share depends on the scale of the loss.

    Args:
        a: ``[r, in]``, with its gradient ``grad_a``.
        b: ``[out, r]``, with its gradient ``grad_b``; any rows of it give the same rows of the estimate.
        scaling: s = alpha / r.

    Returns:
        ``[out, 2r]`` and ``[2r, in]``, fp32.
    """
    left = torch.cat([grad_b.float(), b.float() - grad_b.float() if quadratic else b.float()], dim=1)
    return left / scaling, torch.cat([a.float(), grad_a.float()])


def row_sums(layer: LoraLayer, axis: int, criterion: LoRA) -> torch.Tensor:
    """``Σ |Ĝ (W + s B A)|`` or its squares over the other axis of a wrapped linear, from the gradients of A and B now.

    A number for each slice of its weight along ``axis``, fp32. The weight may be quantised. Raises ModelError unless
    the layer has one active, unmerged, plain adapter.
    """
    adapter = adapter_of(layer)
    transposed = bool(getattr(layer, "fan_in_fan_out", False))  # GPT-2's Conv1D
    over_outputs = (axis == 0) != transposed
    a, b, grad_a, grad_b = adapter.a.detach(), adapter.b.detach(), adapter.a.grad, adapter.b.grad
    outputs, inputs = b.shape[0], a.shape[1]
    total = torch.zeros(outputs if over_outputs else inputs, device=a.device)
    if grad_a is None or grad_b is None:
        return total
    weight = dequantised(layer.get_base_layer())
    weight = weight.T if transposed else weight
    left, right = gradient_factors(a, b, grad_a, grad_b, adapter.scaling, criterion.quadratic)
    a, b = a.float(), b.float() * adapter.scaling
    step = max(1, _BLOCK_ELEMENTS // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        value = torch.addmm(weight[rows].float(), b[rows], a).mul_(left[rows] @ right)
        # not vector_norm, which takes as long as all the rest
        value = value.abs_() if criterion.form == "absolute" else value.square_()
        if over_outputs:
            total[rows] = value.sum(dim=1)
        else:
            total += value.sum(dim=0)
    return total


class AdapterGradients:
    """Scores from the present gradients of A and B, for use within a training step, unscaled and unclipped.

    For each wrapped weight of a group, output side (rows of ``W`` and ``B``) and input side (columns of ``W`` and
    ``A``), the sums over the rows of a unit are divided by their L2 norm over the units and added up (``normalise``:
    the estimate's scale depends on the norms of A and B, which differ between the two sides).

    Layers are looked up once; ``scores`` reads their gradients at the time of the call.

    Raises:
        ModelError: a prunable group has no weight with an adapter on the sides asked for.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, criterion: LoRA) -> None:
        self.criterion = criterion
        self._members = [(group, _adapted_members(model, group, criterion.sides)) for group in graph.prunable]

    def scores(self) -> Scores:
        """Scores of every prunable group, from the present gradients.

        Raises PlanError where these are not finite, and ModelError where an adapter has been merged or switched off.
        """
        scores = {group.name: self._of_group(group, members) for group, members in self._members}
        return Scores(scores, self.criterion.of_loss)

    def _of_group(self, group: NodeGroup, members: Sequence[tuple[Member, LoraLayer]]) -> torch.Tensor:
        total = torch.zeros(group.size)
        for member, layer in members:
            score = sum_rows(row_sums(layer, member.axis, self.criterion), member, group.size).cpu()
            total += score / score.norm() if self.criterion.normalise and float(score.norm()) > 0 else score
        return total


def _adapted_members(model: nn.Module, group: NodeGroup, sides: Sides) -> list[tuple[Member, LoraLayer]]:
    members = [member for member in base_members(group) if sides in ("both", member.role)]
    layers = [(member, lora_layer(model, member.parameter)) for member in members]
    found = [(member, layer) for member, layer in layers if layer is not None and _is_linear(layer)]
    if not found:
        side = "" if sides == "both" else f" on the side {sides!r}"
        raise unscorable(
            group, "lora", f"none of its weights is a linear layer with a LoRA adapter{side} (lora.targets)"
        )
    for _, layer in found:  # refuse before training, not at the first score
        adapter_of(layer)
    return found


def _is_linear(layer: LoraLayer) -> bool:
    """False for adapters of stacked experts, which are not of the form W + s B A of one matrix."""
    return isinstance(getattr(layer.get_base_layer(), "weight", None), torch.Tensor) and len(layer.lora_A) > 0
