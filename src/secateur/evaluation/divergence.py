"""KL(dense || changed): how far a model's predictions are from those of the dense model, on the same text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from secateur.walk import Calibration

_LIKELIEST = 512
_POSITIONS_PER_CHUNK = 512  # fp32 logits of so many positions at a time


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

    def read(self, model: nn.Module, rows: Sequence[int]) -> None:
        """Let the dense model read those of the windows ``rows`` that it has not read yet."""
        for row, parts in self._parts(model, [row for row in rows if row not in self._dense]):
            found = [_top(z.log_softmax(-1), self.likeliest) for z in parts]
            log_p, tokens = (torch.cat(pieces).cpu() for pieces in zip(*found, strict=True))
            self._dense[row] = log_p, tokens.int()

    def of(self, model: nn.Module, rows: Sequence[int]) -> float:
        """The KL on the windows ``rows``, which the dense model has read. Infinite where the model gives NaN."""
        total = 0.0
        for row, parts in self._parts(model, rows):
            kept = (tensor.split(_POSITIONS_PER_CHUNK) for tensor in self._dense[row])
            for z, log_p, tokens in zip(parts, *kept, strict=True):
                own = z.gather(-1, tokens.to(z.device).long()) - z.logsumexp(-1, keepdim=True)
                total += float(divergence(log_p.to(z.device), with_remainder(own)))
        mean = total / (len(rows) * (self.text.ids.shape[1] - 1))
        return mean if math.isfinite(mean) else math.inf

    def _parts(self, model: nn.Module, rows: Sequence[int]) -> Iterator[tuple[int, tuple[torch.Tensor, ...]]]:
        """Each window, with its fp32 logits ``[positions, vocabulary]`` in parts."""
        if not rows:
            return
        found = (logits for batch in self.text.rows(rows).logits(model) for logits in batch)
        for row, logits in zip(rows, found, strict=True):
            yield row, tuple(part.float() for part in logits[:-1].split(_POSITIONS_PER_CHUNK))


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
