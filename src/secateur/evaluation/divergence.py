"""KL(dense || changed): how far a model's predictions are from those of the dense model, on the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from secateur.token_loss import LogitReader, Use
from secateur.walk import Calibration

_LIKELIEST = 512


class Divergence:
    """The mean KL(dense || changed) over the predicted tokens of some windows, nats.

    The dense model's predictions are its ``likeliest`` tokens at each position, and one bucket for all others. They
    stay in memory on the CPU: 4 kB a token for 512 tokens of the vocabulary. Their KL is at most that over the whole
    vocabulary.
    """

    def __init__(self, text: Calibration, likeliest: int = _LIKELIEST) -> None:
        """``text``: windows, and how they are run."""
        self.text, self.likeliest = text, likeliest
        self._dense: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Window → log-probabilities ``[window - 1, k + 1]`` and tokens ``[window - 1, k]``."""
        self._reader: LogitReader | None = None

    def read(self, model: nn.Module, rows: Sequence[int]) -> None:
        """Let the dense model read those of the windows ``rows`` that it has not read yet."""
        new = [row for row in dict.fromkeys(rows) if row not in self._dense]
        found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {row: [] for row in new}

        def keep(some: slice, here: slice, logits: torch.Tensor) -> None:
            log_p, tokens = _top(logits.log_softmax(-1), self.likeliest)
            for row, pair in zip(new[some], zip(log_p.cpu(), tokens.cpu().int(), strict=True), strict=True):
                found[row].append(pair)

        self._each(model, new, keep)
        for row, pairs in found.items():
            log_p, tokens = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            self._dense[row] = log_p, tokens

    def of(self, model: nn.Module, rows: Sequence[int]) -> float:
        """The KL on the windows ``rows``, which the dense model has read. Infinite where the model gives NaN."""
        total = 0.0

        def add(some: slice, here: slice, logits: torch.Tensor) -> None:
            nonlocal total
            kept = zip(*(self._dense[row] for row in rows[some]), strict=True)
            log_p, tokens = (torch.stack([one[here] for one in each]).to(logits.device) for each in kept)
            own = logits.gather(-1, tokens.long()) - logits.logsumexp(-1, keepdim=True)
            total += float(divergence(log_p, with_remainder(own)))

        self._each(model, rows, add)
        mean = total / (len(rows) * (self.text.ids.shape[1] - 1))
        return mean if math.isfinite(mean) else math.inf

    def _each(self, model: nn.Module, rows: Sequence[int], use: Use) -> None:
        """``Calibration.read`` for the windows ``rows``; ``use`` receives places in ``rows``."""
        if not rows:
            return
        if self._reader is None or self._reader.model is not model:
            self._reader = self.text.reader(model)
        self.text.rows(rows).read(self._reader, use)


def with_remainder(log_p: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens ``[..., k]`` → ``[..., k + 1]``, the last of all other tokens together.

    Their mass is at least 1e-6, about the error of the sum.
    """
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
    return torch.cat([log_p, rest.log()], dim=-1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, skew: float = 0.0) -> torch.Tensor:
    """``KL(p || skew · p + (1 − skew) · q)`` summed over all positions, from log-probabilities; 0 is KL(p || q)."""
    if skew > 0:
        log_q = torch.logaddexp(math.log(skew) + log_p, math.log1p(-skew) + log_q)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _top(log_p: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[n, k + 1]`` and ``[n, k]``, with k at most the vocabulary."""
    top, tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return with_remainder(top), tokens
