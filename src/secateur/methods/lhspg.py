"""LHSPG, the LoRA half-space projected gradient (LoRAShear, arXiv 2310.18356, Algorithm 4): the maths and its callback.

While the adapters of the important units go on learning, the redundant units of one period are driven to exact zero
a little every step, so that what they did is re-learned by the others before they are cut.

``[x]_g`` is everything that produces unit ``g``: its rows of every weight (role ``out`` in the graph) and bias. In a
*composed operator* ``W + γ B A`` the effective rows are meant: every step folds ``γ [B]_g A`` into ``[W]_g`` and sets
``[B]_g`` to zero, so that shrinking acts on what the unit computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState

from secateur.importance.weights import lora_layer
from secateur.types import DependencyGraph, NodeGroup

Projection = Literal["decay", "half-space"]


def decay_factor(step: int, steps: int) -> float:
    """Factor of step ``step`` (0-based) whose running product falls linearly from 1 to exactly 0 in ``steps`` steps."""
    return (steps - step - 1) / (steps - step)


def half_space_step(
    x: Sequence[torch.Tensor], update: Sequence[torch.Tensor | None], shrink: torch.Tensor, epsilon: float
) -> list[torch.Tensor]:
    """One projected step of Algorithm 4, lines 7-9, for ``n`` units at once.

    Args:
        x: the units' rows, one tensor ``[n, ...]`` for each member.
        update: ``γ [B A]_g`` of each member, of the same shape, or None where the member has no adapter.
        shrink: ``[n]``, λ_g: how much of the norm goes in this step.
        epsilon: the half-space is ``⟨x̃, x⟩ ≥ ε ‖x‖²``, with ε in [0, 1).

    Returns:
        The new rows: ``x̃ = x + γ B A - λ x / ‖x‖`` inside the half-space, exact zeros outside.
    """
    norm2 = _norm2(x)
    scale = shrink / norm2.sqrt().clamp_min(torch.finfo(norm2.dtype).tiny)
    trial = []
    for rows, extra in zip(x, update, strict=True):
        shrunk = rows - _per_unit(scale, rows) * rows
        trial.append(shrunk if extra is None else shrunk + extra)
    towards = torch.stack([_dot(new, rows) for new, rows in zip(trial, x, strict=True)]).sum(0)
    inside = towards >= epsilon * norm2
    inside &= norm2 > 0
    return [new * _per_unit(inside, new) for new in trial]


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each unit's rows, ``[n, ...] x [n, ...] -> [n]``."""
    return (a * b).flatten(1).sum(1)


def _norm2(x: Iterable[torch.Tensor]) -> torch.Tensor:
    """Squared norm of each unit over all its members, ``[n]``."""
    return torch.stack([_dot(rows, rows) for rows in x]).sum(0)


def _per_unit(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)


@dataclass
class _Adapter:
    """``A`` [experts * r, in], ``B`` [out, r * experts] and γ = alpha / r of a composed operator, as peft has them.

    Detached views that write through.
    """

    a: torch.Tensor
    b: torch.Tensor
    gamma: float
    experts: int
    """Matrices in the weight: 1 for a linear."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """``γ [B]_g A`` for rows ``index`` [n, k]: [n, k, in], or [n, k, experts, in] where the weight is stacked."""
        a, b = self.a.float(), self.b[index].float()
        if self.experts == 1:
            return self.gamma * (b @ a)
        a = a.reshape(self.experts, -1, a.shape[-1])
        b = b.reshape(*index.shape, -1, self.experts)
        return self.gamma * torch.einsum("nkre,eri->nkei", b, a)


@dataclass
class _Rows:
    """The rows of some units in one weight or bias, with the adapter that is added to them."""

    weight: torch.Tensor
    axis: int
    index: torch.Tensor
    """``[n, rows per unit]``."""
    adapter: _Adapter | None

    def read(self) -> torch.Tensor:
        """``[n, rows per unit, ...]``, in float32 whatever the weights are in."""
        return self.weight.movedim(self.axis, 0)[self.index].float()

    def write(self, rows: torch.Tensor) -> None:
        self.weight.movedim(self.axis, 0)[self.index] = rows.to(self.weight.dtype)

    def update(self) -> torch.Tensor | None:
        """``γ [B]_g A``, of the shape of ``read()``."""
        return None if self.adapter is None else self.adapter.rows(self.index)

    def forget_adapter(self) -> None:
        """``[B]_g = 0``: it has been absorbed, or the unit is gone."""
        if self.adapter is not None:
            self.adapter.b[self.index] = 0


def _adapter_of(model: PeftModel, parameter: str) -> _Adapter | None:
    """What is added to this weight; None for a bias, and for a weight without an adapter."""
    layer: Any = lora_layer(model, parameter)
    if layer is None or "default" not in layer.lora_A:
        return None
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    return _Adapter(a, b, float(layer.scaling["default"]), getattr(layer, "num_experts", 1))


def _producers(model: PeftModel, graph: DependencyGraph, units: Mapping[str, Sequence[int]]) -> list[list[_Rows]]:
    """For each group in ``units``, where those units are produced. ``graph`` is that of the model with adapters."""
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())

    def rows_of(group: NodeGroup) -> list[_Rows]:
        found = []
        for member in group.members:
            # B's own rows go through the composed operator, not as a member of their own
            if member.role == "out" and ".lora_" not in member.parameter:
                weight = parameters[member.parameter].detach()
                index = member.rows(units[group.name]).to(weight.device)
                found.append(_Rows(weight, member.axis, index, _adapter_of(model, member.parameter)))
        return found

    return [rows_of(graph[name]) for name in units if units[name]]


class LHSPGCallback(TrainerCallback):
    """Projects one period's redundant units after every optimiser step, and keeps those already gone at zero.

    Args:
        graph: of the model that the Trainer trains, traced with the adapters on.
        redundant: group name → units to drive to zero in this period.
        gone: group name → units that earlier periods drove to zero.
        steps: length of the period, T_p.
        mode: ``decay`` multiplies by ``decay_factor`` (as the released optimiser does); ``half-space`` takes
            λ_g = ‖[x]_g‖ / T_p of the period's start and the projection of the paper.
        epsilon: ε of the half-space.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        redundant: Mapping[str, Sequence[int]],
        gone: Mapping[str, Sequence[int]],
        *,
        steps: int,
        mode: Projection,
        epsilon: float,
    ) -> None:
        self.steps, self.mode, self.epsilon = steps, mode, epsilon
        self.step = 0
        self._graph, self._units = graph, (redundant, gone)

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the Trainer when the model is where it will be trained."""
        self._redundant, self._gone = (_producers(model, self._graph, units) for units in self._units)
        self._shrink = [_norm2(rows.read() for rows in unit).sqrt() / self.steps for unit in self._redundant]

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer between the optimiser's step and the next batch."""
        for members, shrink in zip(self._redundant, self._shrink, strict=True):
            self._project(members, shrink)
        for members in self._gone:
            for rows in members:
                rows.forget_adapter()
        self.step += 1

    def _project(self, members: list[_Rows], shrink: torch.Tensor) -> None:
        if self.step + 1 >= self.steps:  # the period ends at exact zero in both modes
            new = [torch.zeros_like(rows.read()) for rows in members]
        elif self.mode == "decay":
            factor = decay_factor(self.step, self.steps)
            new = [factor * _plus(rows.read(), rows.update()) for rows in members]
        else:
            new = half_space_step(
                [rows.read() for rows in members], [rows.update() for rows in members], shrink, self.epsilon
            )
        for rows, values in zip(members, new, strict=True):
            rows.write(values)
            rows.forget_adapter()


def _plus(rows: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
    return rows if update is None else rows + update
