"""LHSPG, the LoRA half-space projected gradient (LoRAShear, arXiv 2310.18356, Algorithm 4): maths and transfers.

While the adapters of the important units keep learning, the redundant units of one period are driven to exact zero, a
little in every step. The other units learn their function before they are cut.

``[x]_g`` is everything that produces unit ``g``: its rows of every weight (role ``out`` in the graph) and bias. In a
*composed operator* ``W + γ B A`` the effective rows are meant: every step folds ``γ [B]_g A`` into ``[W]_g`` and sets
``[B]_g`` to zero. Shrinking then acts on the whole effective weight.

A query head has no values of its own: with zero queries it attends to all positions equally, and is still consumed. For
such units (``still_consumed``), ``[x]_g`` is the weights that consume them: columns instead of rows, and ``γ B [A]_g``
with them.

Where a norm runs over the units (OLMo2), shrinking units give the others a larger share of it, and no adapter before
the norm can undo that. The norm's weights are therefore lowered to match in every step: the norm then equals one over
the remaining units. ``surgery`` reverses this when it removes the zeros, and with them changes the divisor.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import ModelError
from secateur.methods.transfer import Transfer
from secateur.surgery import norms_over, scales_with_zeros, set_epsilon, unproduced
from secateur.types import Cut, DependencyGraph, Kept
from secateur.units import UnitRows, rows_of, squared_norms
from secateur.walk import input_device


def decay_factor(step: int, steps: int) -> float:
    """Factor of step ``step`` (0-based) whose running product falls linearly from 1 to exactly 0 in ``steps`` steps."""
    return (steps - step - 1) / (steps - step)


def half_space_factor(
    norm2: torch.Tensor, along: torch.Tensor, shrink: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The projected step of Algorithm 4, lines 7-9, for ``n`` units at once, without their rows.

    The trial ``x̃ = x + u - λ x / ‖x‖`` with ``u = γ B A`` is ``(1 - λ / ‖x‖) x + u``. Its inner product with ``x``
    therefore follows from two numbers of the unit.

    Args:
        norm2: ``[n]``, ‖x‖² over all rows of the unit.
        along: ``[n]``, ⟨u, x⟩.
        shrink: ``[n]``, λ_g: the amount by which the norm shrinks in this step.
        epsilon: the half-space is ``⟨x̃, x⟩ ≥ ε ‖x‖²``, with ε in [0, 1).

    Returns:
        Two tensors ``[n]``: the factors of ``x`` and of ``u``, whose products are added. Both are 0 outside of the
        half-space, and for a unit that is already zero.
    """
    norm = norm2.sqrt()
    factor = 1 - shrink / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    inside = (factor * norm2 + along >= epsilon * norm2) & (norm2 > 0)
    return torch.where(inside, factor, 0.0), inside.to(norm.dtype)


@torch.no_grad()
def still_consumed(model: PreTrainedModel, graph: DependencyGraph) -> frozenset[str]:
    """Groups whose units still reach their consumers when all weights that produce them are zero.

    Found by one short forward pass without the first unit of every group. The model is restored.
    """
    first = {group.name: [0] for group in graph.prunable}
    modules, consumed, hooks = dict(model.named_modules()), set[str](), []

    def listen(name: str, index: torch.Tensor) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if bool(inputs[0][..., index.to(inputs[0].device)].any()):
                consumed.add(name)

        return hook

    for group in graph.prunable:
        for member in group.members:
            module = modules.get(member.parameter.removesuffix(".weight"))
            if member.role == "in" and module is not None:
                hooks.append(module.register_forward_pre_hook(listen(group.name, member.rows([0]).flatten())))
    try:
        with unproduced(model, graph, Cut.removing(graph, first)):
            model(input_ids=torch.ones((1, 4), dtype=torch.long, device=input_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return frozenset(consumed)


@dataclass
class _Norm:
    """A norm that runs over units of which some shrink in this period."""

    group: str
    """The group whose units it runs over."""
    module: nn.Module
    start: torch.Tensor
    """``weight[left]`` at the start of the period."""
    left: torch.Tensor
    """Rows of the kept units."""
    redundant: int
    """Rows that shrink in this period."""

    def follow(self, share: float) -> None:
        """Make it a norm over the units that are left, when ``share`` of the redundant units' squares is left.

        It divides by N rows; rows of removed units are zero.
        """
        weight, left = self.module.get_parameter("weight").detach(), len(self.left)
        counted = left + self.redundant * share
        weight[self.left] = self.start * (counted / (left + self.redundant)) ** 0.5
        set_epsilon(self.module, counted / len(weight))


def _norms(
    model: PeftModel,
    graph: DependencyGraph,
    redundant: Kept,
    gone: Kept,
    consumed: Collection[str],
) -> list[_Norm]:
    """The norms over redundant units. Raises ModelError for one that is not a plain RMS norm."""
    found = []
    for name in {**redundant, **gone}:
        leaving = {name: [*redundant.get(name, ()), *gone.get(name, ())]}
        for module, norm in norms_over(model, graph, Cut.removing(graph, leaving)).items():
            if name in consumed:  # their producers are unchanged until the cut, and count in the norm until then
                raise _cannot_follow(
                    module, model, "shrink where they are consumed, while the norm still includes all of them"
                )
            if not scales_with_zeros(module, norm.kept):
                raise _cannot_follow(
                    module, model, "would shrink to zero, and it is no RMS norm: its mean would change"
                )
            weight = module.get_parameter("weight").detach()
            left = norm.kept["weight"].to(weight.device)
            # removed units are zero, and still count in the divisor
            found.append(_Norm(name, module, weight[left], left, len(weight) - len(norm.counting["weight"])))
    return found


def check_norms(model: PeftModel, graph: DependencyGraph, consumed: Collection[str]) -> None:
    """Raise ModelError when a norm over units of a prunable group does not allow driving them to zero."""
    for group in graph.prunable:
        _norms(model, graph, {group.name: [0]}, {}, consumed)


def _cannot_follow(module: nn.Module, model: nn.Module, what: str) -> ModelError:
    path = next(path for path, other in model.named_modules() if other is module)
    return ModelError(
        f"{path} ({type(module).__name__}) runs over units that {what}. Protect these groups (budget.protect), or "
        "choose a one-shot method."
    )


def _norm2(members: list[UnitRows]) -> torch.Tensor:
    """Squared norm of each unit as it is now, ``[n]``."""
    return squared_norms(members, [rows.read().float() for rows in members])


class Shrinking(Transfer):
    """Drives one period's redundant units to exact zero, and keeps removed units at zero.

    Its state is the rows of the redundant units. With them, and with the model from the start of the period, a
    checkpoint of the Trainer can be resumed. Subclasses define by how much the units shrink in a step.

    Args:
        graph: of the model that the Trainer trains, traced with the adapters on.
        redundant: group name → units to drive to zero in this period.
        gone: group name → units that earlier periods drove to zero.
        steps: length of the period, T_p.
        consumed: see ``still_consumed``; groups whose units shrink where they are consumed.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        redundant: Kept,
        gone: Kept,
        *,
        steps: int,
        consumed: Collection[str] = (),
    ) -> None:
        self.steps = steps
        self._consumed = consumed
        self._graph, self._units = graph, (redundant, gone)
        self._restored: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def begin(self, model: PeftModel) -> None:
        """See ``Transfer.begin``."""
        self._redundant, self._gone = (self._shrinking(model, units) for units in self._units)
        self._norms = _norms(model, self._graph, *self._units, self._consumed)
        self._shrink = [_norm2(unit).sqrt() / self.steps for unit in self._redundant]
        for name, rows in self._by_name().items():
            if name in self._restored:
                rows.write(self._restored.pop(name).to(rows.tensor.device))
        self._follow()

    @torch.no_grad()
    def after_step(self, model: PeftModel, step: int) -> None:
        """See ``Transfer.after_step``."""
        for members, shrink in zip(self._redundant, self._shrink, strict=True):
            if step + 1 < self.steps:
                self._project(members, shrink, step)
                continue
            for rows in members:  # the period ends at exact zero
                rows.clear()
        for members in self._gone:
            for rows in members:
                rows.clear_adapter()
        self._follow()

    def _project(self, members: list[UnitRows], shrink: torch.Tensor, step: int) -> None:
        """Shrink the units of one group, of which ``members`` has all rows; ``shrink``: λ_g, ``[n]``."""
        raise NotImplementedError

    def _shrinking(self, model: PeftModel, units: Kept) -> list[list[UnitRows]]:
        """For each group in ``units``, ``[x]_g`` of those units."""
        return [
            rows_of(model, self._graph[name], units[name], "in" if name in self._consumed else "out")
            for name in units
            if units[name]
        ]

    def _follow(self) -> None:
        shares = {name: self._share(name) for name in {norm.group for norm in self._norms}}
        for norm in self._norms:
            norm.follow(shares[norm.group])

    def _share(self, name: str) -> float:
        """The share of the squares of a group's redundant rows that is left since the start of the period."""
        redundant = [name for name, units in self._units[0].items() if units]
        if name not in redundant:
            return 0.0
        group = redundant.index(name)
        now = _norm2(self._redundant[group]).sum()
        begun = (self._shrink[group] * self.steps).square().sum()
        return float(now / begun) if begun > 0 else 0.0

    def _by_name(self) -> dict[str, UnitRows]:
        return {f"rows/{g}/{m}": rows for g, unit in enumerate(self._redundant) for m, rows in enumerate(unit)}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The redundant units' rows."""
        return {name: rows.read() for name, rows in self._by_name().items()}

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore the state from ``state_tensors``; the rows are written when training begins."""
        self._restored = dict(tensors)


class Decay(Shrinking):
    """Multiplies by ``decay_factor`` in every step, as the released optimiser does."""

    def _project(self, members: list[UnitRows], shrink: torch.Tensor, step: int) -> None:
        factor = torch.full_like(shrink, decay_factor(step, self.steps))
        for rows in members:
            rows.absorb(rows.read().float(), factor, factor)


class HalfSpace(Shrinking):
    """The projection of the paper, with λ_g = ‖[x]_g‖ / T_p of the period's start.

    Args: those of ``Shrinking``, and ``epsilon``: ε of the half-space.
    """

    def __init__(self, *args: Any, epsilon: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.epsilon = epsilon

    def _project(self, members: list[UnitRows], shrink: torch.Tensor, step: int) -> None:
        values = [rows.read().float() for rows in members]
        along = torch.stack([rows.along(value) for rows, value in zip(members, values, strict=True)]).sum(0)
        factor, share = half_space_factor(squared_norms(members, values), along, shrink, self.epsilon)
        for rows, value in zip(members, values, strict=True):
            rows.absorb(value, factor, share)
