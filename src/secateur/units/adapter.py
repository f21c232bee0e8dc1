"""The LoRA adapter of one weight: its factors A and B, and the rows of their product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer

from secateur.errors import ModelError
from secateur.types import Role


@dataclass(frozen=True)
class Adapter:
    """``s B A``, which is added to one weight: a matrix, or stacked experts.

    Methods with a ``role`` use slices of the weight: with ``out`` the rows of ``B A``, whose index runs over the
    outputs; with ``in`` its columns, whose index runs over the inputs.
    """

    a: torch.Tensor
    """``[experts * r, inputs]``; the parameter itself."""
    b: torch.Tensor
    """``[outputs, r * experts]``; the parameter itself."""
    scaling: float
    """s = alpha / r."""
    experts: int = 1
    """Matrices in the weight: 1 for a linear."""

    def rows(self, index: torch.Tensor, role: Role) -> torch.Tensor:
        """Slices of ``s B A``, fp32: ``[m, others]``, or ``[m, experts, others]``. Gradients flow to A and B."""
        if self.experts == 1:
            left, right = self._factors(role)
            return self.scaling * (left[index].float() @ right.float())
        a = self.a.float().reshape(self.experts, -1, self.a.shape[-1])
        b = self.b.float().reshape(self.b.shape[0], -1, self.experts)
        if role == "out":
            return self.scaling * torch.einsum("mre,eri->mei", b[index], a)
        return self.scaling * torch.einsum("ore,erm->meo", b, a[:, :, index])

    def along(self, values: torch.Tensor, index: torch.Tensor, role: Role) -> torch.Tensor:
        """Inner product of each slice of ``s B A`` with ``values`` of the shape of ``rows``, ``[m]``."""
        if self.experts == 1:
            left, right = self._factors(role)
            return self.scaling * ((values @ right.float().T) * left[index].float()).sum(1)
        return (self.rows(index, role) * values).flatten(1).sum(1)

    def add_to(self, values: torch.Tensor, index: torch.Tensor, role: Role, factor: torch.Tensor) -> None:
        """``values += factor * rows(index, role)`` in place, with a factor for each slice, ``[m]``."""
        if self.experts == 1:
            left, right = self._factors(role)
            values.addmm_(left[index].float() * (self.scaling * factor)[:, None], right.float())
        else:
            values += self.rows(index, role) * factor[:, None, None]

    @torch.no_grad()
    def clear(self, index: torch.Tensor, role: Role) -> None:
        """Make these slices of ``B A`` exactly zero: the rows of B, or the columns of A."""
        self._factors(role)[0].index_fill_(0, index, 0.0)

    def _factors(self, role: Role) -> tuple[torch.Tensor, torch.Tensor]:
        """``left`` and ``right`` of which ``s left[index] @ right`` are the slices; (B A)ᵀ is Aᵀ Bᵀ."""
        return (self.b, self.a) if role == "out" else (self.a.T, self.b.T)


def adapter_of(layer: LoraLayer) -> Adapter:
    """The adapter of a wrapped weight. Raises ModelError unless it has one active, unmerged, plain adapter."""
    kind = type(layer.get_base_layer()).__name__
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or len(active) != 1:
        raise ModelError(
            "LoRA-guided pruning needs exactly one adapter that is active and not merged; "
            f"this {kind} has {active or 'none'}{' merged' if layer.merged else ''}."
        )
    name = active[0]
    if name in layer.lora_variant:
        raise ModelError(
            f"LoRA-guided pruning reads W + s B A, and this {kind} has another form of adapter (such as DoRA). Attach "
            "plain LoRA (use_dora=False)."
        )
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return Adapter(a, b, float(layer.scaling[name]), int(getattr(layer, "num_experts", 1)))
