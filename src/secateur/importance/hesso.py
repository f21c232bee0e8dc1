"""The saliency proxies of HESSO and LHSPG (arXiv 2409.09085; the optimisers that LoRAShear's authors released).

``x_g`` is the vector of all parameters that produce unit ``g`` (its rows of weights, biases and norms). ``d_g`` is the
direction in which the loss falls there. There are five proxies:

* ``magnitude`` ``‖x_g‖`` and ``average-magnitude`` ``‖x_g‖ / numel``: a unit of small weights is unimportant;
* ``cosine`` ``1 + cos(x_g, d_g)``: near 0 the loss falls towards the origin, and training moves the unit there anyway;
* ``first-order`` ``|⟨x_g, d_g⟩|`` and ``second-order`` ``½ ⟨x_g, d_g⟩²``: the change of the loss without the unit.

``d_g`` is ``−∇f`` of calibration text, or ``γ B A``: the LoRA update is about the sum of ``−∇f`` over its steps, and
replaces a gradient that is never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar, Literal

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.importance.base import Criterion, Needs, require_gradients, unscorable
from secateur.types import DependencyGraph, NodeGroup, Scores
from secateur.units import (
    active_adapters,
    adapter_delta,
    base_members,
    base_parameters,
    effective_weight,
    is_adapter_parameter,
    stored_weight,
    sum_units,
)
from secateur.walk import Calibration, borrowed, calibration_for

Proxy = Literal["magnitude", "average-magnitude", "cosine", "first-order", "second-order"]
Direct = Callable[[str], torch.Tensor | None]
"""Parameter → d, of its shape; None where d is unknown, which counts as zero."""


def proxy_scores(
    proxy: Proxy, x2: torch.Tensor, d2: torch.Tensor, xd: torch.Tensor, elements: torch.Tensor
) -> torch.Tensor:
    """The proxy of each unit from ``‖x‖²``, ``‖d‖²``, ``⟨x, d⟩`` and the number of elements, all ``[units]``."""
    if proxy == "magnitude":
        return x2.sqrt()
    if proxy == "average-magnitude":
        return x2.sqrt() / elements
    if proxy == "cosine":
        norms = (x2 * d2).sqrt()
        return 1 + torch.where(norms > 0, xd / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    return xd.abs() if proxy == "first-order" else 0.5 * xd.square()


class Hesso(Criterion):
    """One proxy, by the gradient of text or by adapters; ``magnitude`` and ``average-magnitude`` need neither.

    Memory: by gradients, one for each weight that produces units; by adapters, one ``γ B A`` at a time.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.09085"
    proxy: ClassVar[Proxy]

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``. With adapters, no text is read."""
        if not graph.prunable:
            return Scores({})
        # proportional to a change of the loss, with the same factor in all groups
        of_loss = self.needs == "gradients" and self.proxy != "cosine"
        if self.needs == "nothing":
            return self._scores(model, graph, lambda name: effective_weight(model, name), lambda name: None, of_loss)
        if self.needs == "adapters":
            self.check(model, graph)
            return self._scores(
                model, graph, lambda name: stored_weight(model, name), lambda name: adapter_delta(model, name), of_loss
            )
        text = calibration_for(calibration, self.name)
        parameters = dict(model.named_parameters())
        wanted = {name for group in graph.prunable for name in _names(graph, group) if name in parameters}
        require_gradients(graph, parameters, wanted, self.name)
        with borrowed(model, wanted) as trained:
            text.backward(model)

            def downhill(name: str) -> torch.Tensor | None:
                gradient = trained[name].grad if name in trained else None  # None: no token reached it
                return None if gradient is None else -gradient

            return self._scores(model, graph, lambda name: effective_weight(model, name), downhill, of_loss)

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """Raise ModelError when the proxy reads adapters and a prunable group has none: it would score 0.

        It is quick, and the adapters need not be trained yet.
        """
        if self.needs != "adapters":
            return
        if not any(is_adapter_parameter(name) for name, _ in model.named_parameters()):
            raise ModelError(f"'{self.name}' reads LoRA adapters, and there are none. First attach and train them.")
        for group in graph.prunable:
            # a unit that is a module needs an adapter of its own, while the units of other groups share theirs
            for names in base_parameters(graph, group) if group.modules else [_names(graph, group)]:
                if not any(active_adapters(model, name) for name in names):
                    reason = "no weight that produces its units has an active LoRA adapter (lora.targets)"
                    raise unscorable(group, self.name, reason)

    def _scores(
        self, model: nn.Module, graph: DependencyGraph, weight: Callable[[str], torch.Tensor], d: Direct, of_loss: bool
    ) -> Scores:
        found = {}
        for group in graph.prunable:
            sums = _module_sums if group.modules else _member_sums
            found[group.name] = proxy_scores(self.proxy, *sums(graph, group, weight, d)).float()
        return Scores(found, of_loss)


class HessoMagnitude(Hesso):
    """See ``proxy_scores``."""

    name: ClassVar[str] = "hesso-magnitude"
    proxy: ClassVar[Proxy] = "magnitude"


class HessoAverageMagnitude(Hesso):
    """See ``proxy_scores``."""

    name: ClassVar[str] = "hesso-average-magnitude"
    proxy: ClassVar[Proxy] = "average-magnitude"


class HessoCosine(Hesso):
    """See ``proxy_scores``."""

    name: ClassVar[str] = "hesso-cosine"
    proxy: ClassVar[Proxy] = "cosine"
    needs: ClassVar[Needs] = "gradients"


class HessoFirstOrder(Hesso):
    """See ``proxy_scores``."""

    name: ClassVar[str] = "hesso-first-order"
    proxy: ClassVar[Proxy] = "first-order"
    needs: ClassVar[Needs] = "gradients"


class HessoSecondOrder(Hesso):
    """See ``proxy_scores``."""

    name: ClassVar[str] = "hesso-second-order"
    proxy: ClassVar[Proxy] = "second-order"
    needs: ClassVar[Needs] = "gradients"


class HessoLoRACosine(HessoCosine):
    """``HessoCosine`` with the direction of the adapters."""

    name: ClassVar[str] = "hesso-lora-cosine"
    needs: ClassVar[Needs] = "adapters"


class HessoLoRAFirstOrder(HessoFirstOrder):
    """``HessoFirstOrder`` with the direction of the adapters."""

    name: ClassVar[str] = "hesso-lora-first-order"
    needs: ClassVar[Needs] = "adapters"


class HessoLoRASecondOrder(HessoSecondOrder):
    """``HessoSecondOrder`` with the direction of the adapters."""

    name: ClassVar[str] = "hesso-lora-second-order"
    needs: ClassVar[Needs] = "adapters"


HESSO: tuple[type[Hesso], ...] = (
    HessoMagnitude,
    HessoAverageMagnitude,
    HessoCosine,
    HessoFirstOrder,
    HessoSecondOrder,
    HessoLoRACosine,
    HessoLoRAFirstOrder,
    HessoLoRASecondOrder,
)
"""All criteria of this family."""

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _names(graph: DependencyGraph, group: NodeGroup) -> Iterable[str]:
    if group.modules:
        return [name for unit in base_parameters(graph, group) for name in unit]
    return [member.parameter for member in base_members(group) if member.role == "out"]


def _member_sums(graph: DependencyGraph, group: NodeGroup, weight: Callable[[str], torch.Tensor], d: Direct) -> Sums:
    """``‖x‖²``, ``‖d‖²``, ``⟨x, d⟩`` and the elements of each unit, float64 on the CPU."""
    x2, d2, xd, elements = torch.zeros(4, group.size, dtype=torch.float64)
    for member in base_members(group):
        if member.role == "out":
            x, direction = weight(member.parameter), d(member.parameter)
            x2 += sum_units(x.float().square(), member, group.size).cpu()
            elements += x.numel() // x.shape[member.axis] * member.rows_per_unit
            if direction is not None:
                d2 += sum_units(direction.float().square(), member, group.size).cpu()
                xd += sum_units(x.float() * direction.float(), member, group.size).cpu()
    return x2, d2, xd, elements


def _module_sums(graph: DependencyGraph, group: NodeGroup, weight: Callable[[str], torch.Tensor], d: Direct) -> Sums:
    """The same, where a unit is a whole module."""
    x2, d2, xd, elements = torch.zeros(4, group.size, dtype=torch.float64)
    for unit, names in enumerate(base_parameters(graph, group)):
        for name in names:
            x, direction = weight(name).float(), d(name)
            x2[unit] += float(x.square().sum())
            elements[unit] += x.numel()
            if direction is not None:
                d2[unit] += float(direction.float().square().sum())
                xd[unit] += float((x * direction.float()).sum())
    return x2, d2, xd, elements
