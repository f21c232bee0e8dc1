"""LHSPG, the LoRA half-space projected gradient (LoRAShear, arXiv 2310.18356, Algorithm 4): the maths and its callback.

While the adapters of the important units go on learning, the redundant units of one period are driven to exact zero
a little every step, so that what they did is re-learned by the others before they are cut.

``[x]_g`` is everything that produces unit ``g``: its rows of every weight (role ``out`` in the graph) and bias. In a
*composed operator* ``W + γ B A`` the effective rows are meant: every step folds ``γ [B]_g A`` into ``[W]_g`` and sets
``[B]_g`` to zero, so that shrinking acts on what the unit computes.

A query head has no values of its own: with zero queries it attends to everything alike, and is still heard. Of such
units (``still_heard``) ``[x]_g`` is what consumes them, columns instead of rows, ``γ B [A]_g`` with them.

Where a norm runs over the units (OLMo2), units that shrink would leave the others a larger share of it, and no adapter
before the norm could undo that. The norm's weights are therefore lowered by as much, step by step, so that the norm is
one over the units that are left; ``surgery`` takes that back when the zeros, and with them the divisor, are cut out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState

from secateur.errors import ModelError
from secateur.importance.base import input_device
from secateur.importance.weights import base_members, lora_layer
from secateur.surgery import norms_over, scales_with_zeros, set_epsilon, unproduced
from secateur.training import StatefulCallback
from secateur.types import DependencyGraph, Member, NodeGroup, removed_to_kept

Projection = Literal["decay", "half-space"]


def decay_factor(step: int, steps: int) -> float:
    """Factor of step ``step`` (0-based) whose running product falls linearly from 1 to exactly 0 in ``steps`` steps."""
    return (steps - step - 1) / (steps - step)


def half_space_factor(
    norm2: torch.Tensor, along: torch.Tensor, shrink: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected step of Algorithm 4, lines 7-9, for ``n`` units at once, without their rows.

    The trial ``x̃ = x + u - λ x / ‖x‖`` with ``u = γ B A`` is ``(1 - λ / ‖x‖) x + u``, so that its inner product with
    ``x`` follows from two numbers of the unit.

    Args:
        norm2: ``[n]``, ‖x‖² over all rows of the unit.
        along: ``[n]``, ⟨u, x⟩.
        shrink: ``[n]``, λ_g: how much of the norm goes in this step.
        epsilon: the half-space is ``⟨x̃, x⟩ ≥ ε ‖x‖²``, with ε in [0, 1).

    Returns:
        Two tensors ``[n]``: by what ``x`` and by what ``u`` is multiplied, to be added up; both 0 outside of the
        half-space, and for a unit that is zero already.
    """
    norm = norm2.sqrt()
    factor = 1 - shrink / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    inside = (factor * norm2 + along >= epsilon * norm2) & (norm2 > 0)
    return torch.where(inside, factor, 0.0), inside.to(norm.dtype)


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

    def along(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``⟨γ [B]_g A, rows⟩`` by rows, ``[m]``; of rows ``[m, in]``, or ``[m, experts, in]`` where it is stacked."""
        if self.experts == 1:
            return self.gamma * ((rows @ self.a.float().T) * self.b[index].float()).sum(1)
        return (self._stacked(index) * rows).flatten(1).sum(1)

    def add_to(self, rows: torch.Tensor, index: torch.Tensor, factor: torch.Tensor) -> None:
        """``rows += factor · γ [B]_g A``, with ``factor`` by row, ``[m]``."""
        if self.experts == 1:
            rows.addmm_(self.b[index].float() * (self.gamma * factor)[:, None], self.a.float())
        else:
            rows += self._stacked(index) * factor[:, None, None]

    def _stacked(self, index: torch.Tensor) -> torch.Tensor:
        a = self.a.float().reshape(self.experts, -1, self.a.shape[-1])
        b = self.b[index].float().reshape(len(index), -1, self.experts)
        return self.gamma * torch.einsum("mre,eri->mei", b, a)


@dataclass
class _Rows:
    """The rows of some units in one weight or bias, with the adapter that is added to them."""

    weight: torch.Tensor
    axis: int
    index: torch.Tensor
    """``[m]``: rows of all units, those of one unit together."""
    per_unit: int
    adapter: _Adapter | None

    def read(self) -> torch.Tensor:
        """``[m, ...]``: a copy, in float32 whatever the weights are in."""
        return self.weight.movedim(self.axis, 0)[self.index].float()

    def write(self, rows: torch.Tensor) -> None:
        self.weight.movedim(self.axis, 0)[self.index] = rows.to(self.weight.dtype)

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """A number for each unit as one for each row: ``[n] -> [m]``."""
        return values.repeat_interleave(self.per_unit)

    def by_unit(self, values: torch.Tensor) -> torch.Tensor:
        """A number for each row, summed over those of a unit: ``[m] -> [n]``."""
        return values.reshape(-1, self.per_unit).sum(1)

    def along(self, rows: torch.Tensor) -> torch.Tensor:
        """``⟨γ [B A]_g, [x]_g⟩`` of this member, ``[n]``."""
        if self.adapter is None:
            return torch.zeros(len(self.index) // self.per_unit, device=rows.device)
        return self.by_unit(self.adapter.along(rows, self.index))

    def absorb(self, rows: torch.Tensor, factor: torch.Tensor, share: torch.Tensor) -> None:
        """Write ``factor · rows + share · γ [B]_g A``, factors by unit, and forget the adapter; uses up ``rows``."""
        rows.mul_(self.by_row(factor).view(-1, *[1] * (rows.dim() - 1)))
        if self.adapter is not None:
            self.adapter.add_to(rows, self.index, self.by_row(share))
        self.write(rows)
        self.forget_adapter()

    def clear(self) -> None:
        """Exact zeros, without and with the adapter."""
        self.weight.index_fill_(self.axis, self.index, 0.0)
        self.forget_adapter()

    def forget_adapter(self) -> None:
        """``[B]_g = 0``: it has been absorbed, or the unit is gone."""
        if self.adapter is not None:
            self.adapter.b.index_fill_(0, self.index, 0.0)


def _norm2(members: Iterable[_Rows], values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Squared norm of each unit over all its members, ``[n]``."""
    parts = [
        rows.by_unit(torch.linalg.vector_norm(value.reshape(len(value), -1), dim=1).square())
        for rows, value in zip(members, values, strict=True)
    ]
    return torch.stack(parts).sum(0)


def _adapter_of(model: PeftModel, member: Member) -> _Adapter | None:
    """What is added to this weight; None for a bias, and for a weight without an adapter.

    Where the columns of the weight are meant, ``(B A)ᵀ = Aᵀ Bᵀ``: the two change places.
    """
    layer: Any = lora_layer(model, member.parameter)
    if layer is None or "default" not in layer.lora_A:
        return None
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    if member.role == "in":
        a, b = b.T, a.T
    return _Adapter(a, b, float(layer.scaling["default"]), getattr(layer, "num_experts", 1))


def _shrinking(
    model: PeftModel, graph: DependencyGraph, units: Mapping[str, Sequence[int]], heard: Collection[str]
) -> list[list[_Rows]]:
    """For each group in ``units``, ``[x]_g`` of those units. ``graph`` is that of the model with adapters."""
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())

    def rows_of(group: NodeGroup) -> list[_Rows]:
        found = []
        for member in base_members(group):  # B's own rows go through the composed operator
            if member.role == ("in" if group.name in heard else "out"):
                weight = parameters[member.parameter].detach()
                index = member.rows(units[group.name]).flatten().to(weight.device)
                found.append(_Rows(weight, member.axis, index, member.rows_per_unit, _adapter_of(model, member)))
        return found

    return [rows_of(graph[name]) for name in units if units[name]]


@torch.no_grad()
def still_heard(model: PreTrainedModel, graph: DependencyGraph) -> frozenset[str]:
    """Groups whose units still reach their consumers when everything that produces them is zero.

    Found by trying: one short forward pass without the first unit of every group. The model is left as it was.
    """
    first = {group.name: [0] for group in graph.prunable}
    modules, heard, hooks = dict(model.named_modules()), set[str](), []

    def listen(name: str, index: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if bool(inputs[0][..., index.to(inputs[0].device)].any()):
                heard.add(name)

        return hook

    for group in graph.prunable:
        for member in group.members:
            module = modules.get(member.parameter.removesuffix(".weight"))
            if member.role == "in" and module is not None:
                hooks.append(module.register_forward_pre_hook(listen(group.name, member.rows([0]).flatten())))
    try:
        with unproduced(model, graph, removed_to_kept(graph, first)):
            model(input_ids=torch.ones((1, 4), dtype=torch.long, device=input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(heard)


@dataclass
class _Norm:
    """A norm that runs over units of which some shrink in this period."""

    group: str
    """The group whose units it runs over."""
    module: nn.Module
    start: torch.Tensor
    """``weight[left]`` as it was."""
    left: torch.Tensor
    """Rows of the units that stay."""
    redundant: int
    """Rows that shrink in this period."""

    def follow(self, share: float) -> None:
        """Make it a norm over all units that are there, of whose redundant ones ``share`` of the squares is left.

        It divides by N rows, of which those that are gone are zero.
        """
        weight, left = self.module.get_parameter("weight").detach(), len(self.left)
        counted = left + self.redundant * share
        weight[self.left] = self.start * (counted / (left + self.redundant)) ** 0.5
        set_epsilon(self.module, counted / len(weight))


def _norms(
    model: PeftModel,
    graph: DependencyGraph,
    redundant: Mapping[str, Sequence[int]],
    gone: Mapping[str, Sequence[int]],
    heard: Collection[str],
) -> list[_Norm]:
    """The norms that redundant units count in; ModelError for one that is more than an RMS norm."""
    found = []
    for name in {**redundant, **gone}:
        leaving = {name: [*redundant.get(name, ()), *gone.get(name, ())]}
        for module, norm in norms_over(model, graph, removed_to_kept(graph, leaving)).items():
            if name in heard:  # what produces them stays whole until it is cut, and counts in the norm until then
                raise _cannot_follow(module, model, "shrink where they are consumed, while it sees all of them")
            if not scales_with_zeros(module, norm.kept):
                raise _cannot_follow(module, model, "would shrink to zero, and is no RMS norm: its mean would move")
            weight = module.get_parameter("weight").detach()
            left = norm.kept["weight"].to(weight.device)
            # what is gone is zero, and goes on counting in the divisor
            found.append(_Norm(name, module, weight[left], left, len(weight) - len(norm.counting["weight"])))
    return found


def check_norms(model: PeftModel, graph: DependencyGraph, heard: Collection[str]) -> None:
    """Raise ModelError when LHSPG could not drive units of some prunable group to zero for a norm over them."""
    for group in graph.prunable:
        _norms(model, graph, {group.name: [0]}, {}, heard)


def _cannot_follow(module: nn.Module, model: nn.Module, what: str) -> ModelError:
    path = next(path for path, other in model.named_modules() if other is module)
    return ModelError(
        f"{path} ({type(module).__name__}) runs over units that {what}. "
        "Leave these groups whole (budget.protect), or choose a one-shot method."
    )


class LHSPGCallback(StatefulCallback):
    """Projects one period's redundant units after every optimiser step, and keeps those already gone at zero.

    Its state is the step and the rows of the redundant units: with the model as it was when the period began, a
    checkpoint of the Trainer goes on where it was taken.

    Args:
        graph: of the model that the Trainer trains, traced with the adapters on.
        redundant: group name → units to drive to zero in this period.
        gone: group name → units that earlier periods drove to zero.
        steps: length of the period, T_p.
        mode: ``decay`` multiplies by ``decay_factor`` (as the released optimiser does); ``half-space`` takes
            λ_g = ‖[x]_g‖ / T_p of the period's start and the projection of the paper.
        epsilon: ε of the half-space.
        heard: see ``still_heard``; groups whose units shrink where they are consumed.
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
        heard: Collection[str] = (),
    ) -> None:
        self.steps, self.mode, self.epsilon = steps, mode, epsilon
        self._heard = heard
        self.step = 0
        self._graph, self._units = graph, (redundant, gone)
        self._restored: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Called by the Trainer when the model is where it will be trained."""
        self._redundant, self._gone = (_shrinking(model, self._graph, units, self._heard) for units in self._units)
        self._norms = _norms(model, self._graph, *self._units, self._heard)
        self._shrink = [_norm2(unit, [rows.read() for rows in unit]).sqrt() / self.steps for unit in self._redundant]
        for name, rows in self._by_name().items():
            if name in self._restored:
                rows.write(self._restored.pop(name).to(rows.weight.device))
        self._follow()

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer between the optimiser's step and the next batch."""
        for members, shrink in zip(self._redundant, self._shrink, strict=True):
            self._project(members, shrink)
        for members in self._gone:
            for rows in members:
                rows.forget_adapter()
        self.step += 1
        self._follow()

    def _project(self, members: list[_Rows], shrink: torch.Tensor) -> None:
        if self.step + 1 >= self.steps:  # the period ends at exact zero in both modes
            for rows in members:
                rows.clear()
        elif self.mode == "decay":
            factor = torch.full_like(shrink, decay_factor(self.step, self.steps))
            for rows in members:
                rows.absorb(rows.read(), factor, factor)
        else:
            values = [rows.read() for rows in members]
            along = torch.stack([rows.along(value) for rows, value in zip(members, values, strict=True)]).sum(0)
            factor, share = half_space_factor(_norm2(members, values), along, shrink, self.epsilon)
            for rows, value in zip(members, values, strict=True):
                rows.absorb(value, factor, share)

    def _follow(self) -> None:
        shares = {name: self._share(name) for name in {norm.group for norm in self._norms}}
        for norm in self._norms:
            norm.follow(shares[norm.group])

    def _share(self, name: str) -> float:
        """How much of the squares of a group's redundant rows is left since the period began."""
        redundant = [name for name, units in self._units[0].items() if units]
        if name not in redundant:
            return 0.0
        group = redundant.index(name)
        now = _norm2(self._redundant[group], [rows.read() for rows in self._redundant[group]]).sum()
        begun = (self._shrink[group] * self.steps).square().sum()
        return float(now / begun) if begun > 0 else 0.0

    def _by_name(self) -> dict[str, _Rows]:
        return {f"rows/{g}/{m}": rows for g, unit in enumerate(self._redundant) for m, rows in enumerate(unit)}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The step, and the redundant units' rows."""
        rows = {name: rows.weight.movedim(rows.axis, 0)[rows.index] for name, rows in self._by_name().items()}
        return rows | {"step": torch.tensor(self.step)}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """The opposite of ``state_tensors``; the rows are written when training begins."""
        self._restored = dict(tensors)
        self.step = int(self._restored.pop("step"))
