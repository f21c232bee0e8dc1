"""Optimal brain surgery on whole units: chooses the inputs of a consumer to remove, with compensation after each.

With ``H̄ = H + λ I``, its inverse B, the present weights W and the Cholesky factor L of B_gg, removing the columns g is

    U = L⁻¹ W_gᵀ,  R = L⁻¹ B_g,:,   W ← W − Uᵀ R,   B ← B − Rᵀ R,   at the price ½ ‖U‖².

Putting them back is the same with plus signs, and with the Cholesky factor of the Schur complement of H̄_gg. (OBS,
Hassibi and Stork 1993; whole structures: ZipLM, arXiv 2302.04089, and SlimGPT, arXiv 2412.18110; swaps: OSSCAR, arXiv
2403.12983.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.linalg import solve_triangular

from secateur.compensation.gram import Gram, typical
from secateur.errors import ModelError
from secateur.precision import in_float64

DAMPING = 1e-2
"""λ as a share of the mean of H's diagonal, as in ZipLM, or of its median (``gram.typical``)."""
EXACT = 4096
"""Up to so many inputs units are removed one by one; wider consumers lose a sixteenth of the count at a time."""
_ROUNDS = 16
_PENDING = 64
"""Removed columns that are collected before they are taken out of both matrices in one product."""
_FIRST_SWAPS = 0.25
"""Share of the removed units that the first try of ``Elimination.swap`` exchanges."""


@dataclass(frozen=True)
class Step:
    """Units that were removed together: ``W − outputsᵀ inputs`` is what they leave of W."""

    units: list[int]
    outputs: torch.Tensor
    """U, ``[columns, outputs]``, float64, in the order of the units and their columns."""
    inputs: torch.Tensor
    """R, ``[columns, inputs]``."""

    @property
    def price(self) -> float:
        """By how much half the squared error of the damped problem rises."""
        return 0.5 * float(self.outputs.square().sum())


class Elimination:
    """Removes units of one consumer's inputs and lets the others compensate; starts from the full refit of all inputs.

    Every prefix of the columns of all steps is exact: after k columns the weights are those of the joint solution for
    the others. Memory: three matrices of H's size in float64, and two of W's.
    """

    def __init__(self, gram: Gram, weight: torch.Tensor, columns: torch.Tensor, runs: int = 1) -> None:
        """
        Args:
            gram: of the consumer's inputs in the pruned model, with the wanted outputs.
            weight: W, ``[outputs, inputs]``.
            columns: ``[units, width]``: the inputs that each unit owns. Other inputs are never removed.
            runs: number of runs of units that lose equally many (``NodeGroup.runs``).

        Raises ModelError for inputs that are not finite.
        """
        if not bool(torch.isfinite(gram.inputs).all()):
            raise ModelError(
                "The inputs of a linear are NaN or infinite on the calibration text, and nothing can be compensated. "
                "Set calibration.precision=fp32. If that does not help, the model's weights are damaged."
            )
        self.hessian, self.columns, self.runs = gram.inputs.clone(), columns.to(gram.inputs.device), runs
        damping = DAMPING * typical(self.hessian.diagonal()) or 1.0
        self.hessian.diagonal().add_(damping)
        self.wanted = gram.cross + damping * in_float64(weight)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.hessian))
        self.weight = self.wanted @ self.inverse
        """The present weights, as those of ``inverse``: removed columns are zero once nothing is pending."""
        self.alive = torch.ones(len(columns), dtype=torch.bool, device=self.columns.device)
        self._pending: list[Step] = []
        self._measure()

    def remove(self, count: int) -> Iterator[Step]:
        """Remove the ``count`` cheapest units, one by one or in rounds; from each run equally many, in turn."""
        at_once = self.runs * (1 if len(self.hessian) <= EXACT else max(1, count // self.runs // _ROUNDS))
        while count > 0:
            units = self._lowest(self._prices(), min(at_once, count))
            count -= len(units)
            yield self._remove(units)
        self._settle()

    def swap(self, tries: int) -> None:
        """Exchange removed units for others while that lowers the error of the damped problem.

        Each try puts back the units that are worth most, and removes as many of the cheapest then. A quarter of the
        removed units at first; half as many after a try that did not lower the error and was undone.
        """
        many = -int(-_FIRST_SWAPS * len(self.removed) // self.runs)
        for _ in range(tries):
            if many == 0:
                break
            before = self.alive.clone(), self.inverse.clone(), self.weight.clone()
            gain = self._put_back(self._lowest(-self._gains(), many * self.runs))
            price = sum(step.price for step in self.remove(many * self.runs))
            if not price < gain * (1 - 1e-9):
                self.alive, self.inverse, self.weight = before
                self._measure()
                many //= 2

    @property
    def removed(self) -> list[int]:
        """The removed units, ascending."""
        return (~self.alive).nonzero().flatten().tolist()

    def _lowest(self, values: torch.Tensor, many: int) -> list[int]:
        """The units with the lowest ``values``, from each run equally many, in turn."""
        by_run = values.view(self.runs, -1)
        found = by_run.argsort(dim=1, stable=True)[:, : many // self.runs]
        first = torch.arange(self.runs, device=found.device).unsqueeze(1) * by_run.shape[1]
        return (found + first).T.flatten().tolist()

    def _prices(self) -> torch.Tensor:
        """What removing each unit would cost, ``[units]``; infinite for removed ones."""
        prices = torch.full((len(self.columns),), torch.inf, dtype=torch.float64, device=self.columns.device)
        columns = self.columns[self.alive]
        if columns.shape[1] == 1:
            prices[self.alive] = 0.5 * self._squares[columns[:, 0]] / self._diagonal[columns[:, 0]]
            return prices
        factors = torch.linalg.cholesky(self.inverse[columns.unsqueeze(2), columns.unsqueeze(1)])
        parts = self.weight[:, columns].permute(1, 2, 0)  # [units, width, outputs]
        prices[self.alive] = 0.5 * solve_triangular(factors, parts, upper=False).square().sum((1, 2))
        return prices

    def _remove(self, units: list[int]) -> Step:
        gone = self.columns[units].flatten()
        rows, parts = self.inverse[gone], self.weight[:, gone].T
        for step in self._pending:
            there = step.inputs[:, gone].T
            rows, parts = rows - there @ step.inputs, parts - there @ step.outputs
        factor = torch.linalg.cholesky(rows[:, gone])
        found = Step(units, solve_triangular(factor, parts, upper=False), solve_triangular(factor, rows, upper=False))
        self.alive[units] = False
        if self.columns.shape[1] == 1:
            self._reckon(found)
        self._pending.append(found)
        if self.columns.shape[1] > 1 or sum(len(step.inputs) for step in self._pending) >= _PENDING:
            self._settle()
        return found

    def _reckon(self, found: Step) -> None:
        """Bring the numbers that prices need up to date, before the step is added to the pending ones."""
        along = found.outputs @ self.weight
        for step in self._pending:
            along -= (found.outputs @ step.outputs.T) @ step.inputs
        own = found.outputs @ found.outputs.T
        self._squares += (found.inputs * (own @ found.inputs - 2 * along)).sum(0)
        self._diagonal -= found.inputs.square().sum(0)

    def _settle(self) -> None:
        """Take the pending steps out of both matrices."""
        if self._pending:
            inputs = torch.cat([step.inputs for step in self._pending])
            outputs = torch.cat([step.outputs for step in self._pending])
            self.inverse.addmm_(inputs.T, inputs, alpha=-1)
            self.weight.addmm_(outputs.T, inputs, alpha=-1)
            gone = self.columns[~self.alive].flatten()
            self.inverse[gone] = 0
            self.inverse[:, gone] = 0
            self.weight[:, gone] = 0
            self._pending = []
        self._measure()

    def _measure(self) -> None:
        self._squares, self._diagonal = self.weight.square().sum(0), self.inverse.diagonal().clone()

    def _gains(self) -> torch.Tensor:
        """By how much putting each unit back would lower the error, ``[units]``; −infinite for units that are there."""
        gains = torch.full((len(self.columns),), -torch.inf, dtype=torch.float64, device=self.columns.device)
        columns = self.columns[~self.alive]
        parts, through = self._missing(columns.flatten())
        blocks = self.hessian[columns.unsqueeze(2), columns.unsqueeze(1)]
        by_unit = through.T.unflatten(0, columns.shape)  # [units, width, inputs]
        there = self.hessian[columns]
        factors = torch.linalg.cholesky(blocks - there @ by_unit.mT)
        found = solve_triangular(factors, parts.T.unflatten(0, columns.shape), upper=False)
        gains[~self.alive] = 0.5 * found.square().sum((1, 2))
        return gains

    def _put_back(self, units: list[int]) -> float:
        """Put these units back; returns by how much the error falls."""
        columns = self.columns[units].flatten()
        parts, through = self._missing(columns)
        factor = torch.linalg.cholesky(self.hessian[columns][:, columns] - self.hessian[columns] @ through)
        through[columns, torch.arange(len(columns), device=columns.device)] = -1
        outputs = solve_triangular(factor, parts.T, upper=False)
        inputs = solve_triangular(factor, -through.T, upper=False)
        self.inverse.addmm_(inputs.T, inputs)
        self.weight.addmm_(outputs.T, inputs)
        self.alive[units] = True
        self._measure()
        return 0.5 * float(outputs.square().sum())

    def _missing(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the present weights leave of the wanted products with removed ``columns`` (``[outputs, columns]``), and
        these columns as combinations of the inputs that are there (``[inputs, columns]``)."""
        there = self.hessian[:, columns]
        return self.wanted[:, columns] - self.weight @ there, self.inverse @ there


def removal_order(gram: Gram, weight: torch.Tensor, columns: torch.Tensor, count: int, runs: int = 1) -> list[int]:
    """The first ``count`` units in the order in which they are removed; arguments as in ``Elimination``."""
    return [unit for step in Elimination(gram, weight, columns, runs).remove(count) for unit in step.units]


def removed_units(
    gram: Gram, weight: torch.Tensor, columns: torch.Tensor, count: int, runs: int = 1, swaps: int = 0
) -> list[int]:
    """``count`` units to remove, ascending, after at most ``swaps`` tries of ``Elimination.swap``."""
    elimination = Elimination(gram, weight, columns, runs)
    for _ in elimination.remove(count):
        pass
    elimination.swap(swaps)
    return elimination.removed
