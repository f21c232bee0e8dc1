"""The least-squares problem of one consumer, in matrices whose size does not depend on the number of tokens.

A consumer (down projection of an FFN, output projection of attention) computes ``y = W x``. In the pruned model it sees
``x'``, of which only the kept inputs S count, and its output should be the dense model's y. With ``H = Σ x' x'ᵀ`` and
``C = Σ y x'ᵀ`` over tokens, the summed squared error of any weights V of the kept inputs is

    E(V) = Σ y² − 2 ⟨V, C_S⟩ + ⟨V H_SS, V⟩.

Ridge regression towards the old weights is ``V = W_S + (C_S − W_S H_SS) (H_SS + λ I)⁻¹``: the larger λ, the smaller the
change. Each λ takes one Cholesky decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from secateur.precision import in_float64, sums_device

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""λ as shares of the typical mean square of an input."""
_SKEWED = 10.0
"""From this ratio of mean to median on, the median is taken: few inputs are many times as large as all others."""

_BLOCK = 512
"""Inputs whose products are computed together."""


@dataclass
class Gram:
    """Sums over tokens, float64, on ``sums_device`` of the model's device; whatever is solved with them is there."""

    inputs: torch.Tensor
    """H, ``[inputs, inputs]``."""
    cross: torch.Tensor
    """C, ``[outputs, inputs]``."""
    square: float = 0.0
    """``Σ y²``."""
    tokens: int = 0

    @classmethod
    def empty(cls, outputs: int, inputs: int, device: torch.device) -> Gram:
        """Sums over no tokens."""
        zeros = partial(torch.zeros, dtype=torch.float64, device=sums_device(device))
        return cls(zeros(inputs, inputs), zeros(outputs, inputs))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the tokens of one pass: inputs ``[tokens, inputs]`` and wanted outputs ``[tokens, outputs]``.

        Products are computed in float32, which a pass of some thousand tokens stands, and summed up in float64.
        """
        x, y = x.float(), y.float()
        for start in range(0, x.shape[1], _BLOCK):  # H is symmetric: what is below the diagonal blocks is above them
            here = slice(start, start + _BLOCK)
            found = in_float64(x[:, here].T @ x[:, start:])
            self.inputs[here, start:] += found
            self.inputs[start + _BLOCK :, here] += found[:, _BLOCK:].T
        self.cross += in_float64(y.T @ x)
        self.square += float(in_float64(y).square().sum())
        self.tokens += len(x)

    def towards(self, weight: torch.Tensor) -> Gram:
        """The same inputs, with ``weight x'`` as the wanted outputs: the dense matrix on the pruned model's inputs."""
        weight = in_float64(weight)
        cross = weight @ self.inputs
        return Gram(self.inputs, cross, float((cross * weight).sum()), self.tokens)

    def error(self, weight: torch.Tensor, kept: torch.Tensor) -> float:
        """E of ``weight`` (``[outputs, kept]``) as a share of ``Σ y²``; 0 where nothing is wanted."""
        weight, kept = in_float64(weight), kept.to(self.inputs.device)
        product = weight @ self.inputs[kept][:, kept]
        total = self.square - 2 * float((weight * self.cross[:, kept]).sum()) + float((weight * product).sum())
        return max(total, 0.0) / self.square if self.square > 0 else 0.0


@dataclass(frozen=True)
class Solution:
    """New weights of the kept inputs, or the old ones when no step lowers the error."""

    weight: torch.Tensor
    """float64, ``[outputs, kept]``, on the device of the sums."""
    ridge: float
    """λ as a share (``RIDGES``)."""
    step: float
    """Fraction of the way from the old weights to the ridge solution, 0 to 1."""
    before: float
    """Error of the old weights on the check windows (``Gram.error``)."""
    after: float
    """Error of the new weights on the same windows."""


def typical(squares: torch.Tensor) -> float:
    """The typical of these sums of squares (``[inputs]``): their mean, or their median where the mean is more than ten
    times as large, because of few inputs."""
    mean, median = float(squares.mean()), float(squares.median())
    return median if 0 < median * _SKEWED < mean else mean


def solve_refit(fit: Gram, check: Gram, weight: torch.Tensor, kept: torch.Tensor) -> Solution:
    """Fit on some windows; choose λ and the step on the others.

    Args:
        weight: W, ``[outputs, inputs]``.
        kept: indices of the kept inputs, ``[k]``.

    The step is where the error on ``check`` is smallest along the way, clipped to [0, 1]; it never rises there.
    """
    kept = kept.to(fit.inputs.device)
    old = in_float64(weight)[:, kept]
    before = check.error(old, kept)
    best = Solution(old, 0.0, 0.0, before, before)
    gram = fit.inputs[kept][:, kept]
    diagonal = gram.diagonal()
    if not float(diagonal.sum()) > 0:
        return best  # the kept inputs are zero on this text: no refit is possible
    scale = typical(diagonal)
    missing = fit.cross[:, kept] - old @ gram
    there = check.inputs[kept][:, kept]
    gain = check.cross[:, kept] - old @ there
    for ridge in RIDGES:
        damped = gram.clone()
        damped.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed):
            continue  # so small a ridge does not outweigh the rounding of the sums
        change = torch.cholesky_solve(missing.T, factor).T
        downhill, steepness = float((gain * change).sum()), float((change @ there * change).sum())
        step = min(max(downhill / steepness, 0.0), 1.0) if steepness > 0 else 0.0
        if step > 0 and check.square > 0:
            after = max(before - step * (2 * downhill - step * steepness) / check.square, 0.0)
            if after < best.after:
                best = Solution(old + step * change, ridge, step, before, after)
    return best
