"""Optimal brain surgery on whole units: chooses the inputs of a consumer to remove, with compensation after each.

With ``H̄ = H + λ I``, its inverse B and the present weights W, removing the columns g costs
``½ tr(W_g (B_gg)⁻¹ W_gᵀ)``; then ``W ← W − W_g (B_gg)⁻¹ B_g,:`` and ``B ← B − B_:,g (B_gg)⁻¹ B_g,:`` are what is left.
(OBS, Hassibi and Stork 1993; whole structures: ZipLM, arXiv 2302.04089, and SlimGPT, arXiv 2412.18110.)
"""

from __future__ import annotations

import torch

from secateur.compensation.gram import Gram

DAMPING = 1e-2
"""λ as a share of the mean of H's diagonal, as in ZipLM."""
EXACT = 4096
"""Up to so many inputs units are removed one by one; wider consumers lose a sixteenth of the count at a time."""
_ROUNDS = 16


def removal_order(gram: Gram, weight: torch.Tensor, columns: torch.Tensor, count: int) -> list[int]:
    """The first ``count`` units in the order in which they are removed.

    Starts from the full refit of all inputs to the wanted outputs. Memory: two matrices of H's size in float64.

    Args:
        gram: of the consumer's inputs in the pruned model, with the dense outputs.
        weight: W, ``[outputs, inputs]``.
        columns: ``[units, width]``: the inputs that each unit owns. Other inputs are never removed.
        count: less than the number of units.
    """
    gram_of_all, columns = gram.inputs.clone(), columns.to(gram.inputs.device)
    damping = DAMPING * float(gram_of_all.diagonal().mean()) or 1.0
    gram_of_all.diagonal().add_(damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram_of_all))
    present = (gram.cross + damping * weight.double()) @ inverse
    alive = torch.ones(len(columns), dtype=torch.bool, device=columns.device)
    at_once = 1 if gram_of_all.shape[0] <= EXACT else max(1, count // _ROUNDS)
    order: list[int] = []
    while len(order) < count:
        prices = torch.full((len(columns),), torch.inf, dtype=torch.float64, device=columns.device)
        prices[alive] = _prices(inverse, present, columns[alive])
        chosen = prices.argsort(stable=True)[: min(at_once, count - len(order))]
        _remove(inverse, present, columns[chosen].flatten())
        alive[chosen] = False
        order += chosen.tolist()
    return order


def _prices(inverse: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What removing each unit would cost, ``[units]``."""
    if columns.shape[1] == 1:
        only = columns[:, 0]
        return 0.5 * weight[:, only].square().sum(0) / inverse.diagonal()[only]
    blocks = inverse[columns.unsqueeze(2), columns.unsqueeze(1)]  # [units, width, width]
    factors = torch.linalg.cholesky(blocks)
    parts = weight[:, columns].permute(1, 2, 0)  # [units, width, outputs]
    return 0.5 * torch.linalg.solve_triangular(factors, parts, upper=False).square().sum((1, 2))


def _remove(inverse: torch.Tensor, weight: torch.Tensor, gone: torch.Tensor) -> None:
    """Remove these inputs from both matrices, in place, and let the others compensate for them."""
    block = torch.cholesky_inverse(torch.linalg.cholesky(inverse[gone][:, gone]))
    rows = block @ inverse[gone]
    weight -= weight[:, gone] @ rows
    inverse -= inverse[:, gone] @ rows
    weight[:, gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0
    inverse[gone, gone] = 1
