"""The order of reading blocks, when the weights of sources may change during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import torch


class ReadingOrder:
    """Chooses the block for each position. The shares of the sources follow their weights at that moment.

    Smooth weighted round robin: every source earns its weight at each position; the richest is read and pays one. After
    n positions with constant weights a source was read n·w times, plus or minus one. The blocks of a source are in
    random order, with a new order in each round. Positions are decided in order, at their first request, and
    remembered. A run can resume from ``state`` alone.
    """

    def __init__(self, sources: Sequence[str], weights: Mapping[str, float], seed: int) -> None:
        """``sources``: the source of each block, as in ``TokenBlocks.sources``; ``weights`` as in ``set_weights``."""
        self._rows: dict[str, list[int]] = {}
        for row, name in enumerate(sources):
            self._rows.setdefault(name, []).append(row)
        self._sources, self._seed = sources, seed
        self._shuffled: dict[str, tuple[int, list[int]]] = {}
        self._credit = dict.fromkeys(self._rows, 0.0)
        self._read: list[int] = []
        self._times = dict.fromkeys(self._rows, 0)
        self.set_weights(weights)

    @property
    def weights(self) -> dict[str, float]:
        """Present share of each source; the sum is one."""
        return dict(self._weights)

    def set_weights(self, weights: Mapping[str, float], position: int = 0) -> None:
        """Change the shares from ``position`` on, or from the next undecided position, if that is later.

        Sources that are not named get none; some must be positive. Processes that read different positions of one order
        agree on it if they change it at the same position, and none of them has requested that position yet.
        """
        if position > 0:
            self(position - 1)
        total = sum(weights.get(name, 0.0) for name in self._rows)
        if total <= 0 or any(weight < 0 for weight in weights.values()):
            raise ValueError(f"weights must not be negative, and one of {', '.join(self._rows)} must be positive")
        self._weights = {name: weights.get(name, 0.0) / total for name in self._rows}

    def __call__(self, position: int) -> int:
        """Index of the block that is read at ``position`` (0-based)."""
        while len(self._read) <= position:
            self._read.append(self._next())
        return self._read[position]

    def _next(self) -> int:
        for name, weight in self._weights.items():
            self._credit[name] += weight
        candidates = [name for name, weight in self._weights.items() if weight > 0]
        name = max(candidates, key=lambda name: self._credit[name])
        self._credit[name] -= 1.0
        round_, place = divmod(self._times[name], len(self._rows[name]))
        self._times[name] += 1
        if self._shuffled.get(name, (-1, []))[0] != round_:
            rows = list(self._rows[name])
            Random(f"{self._seed}/{name}/{round_}").shuffle(rows)
            self._shuffled[name] = round_, rows
        return self._shuffled[name][1][place]

    def state(self) -> dict[str, torch.Tensor]:
        """The blocks read, and the balance and weight of each source; for a checkpoint."""
        return {
            "read": torch.tensor(self._read, dtype=torch.int64),
            "credit": torch.tensor(list(self._credit.values()), dtype=torch.float64),
            "weights": torch.tensor(list(self._weights.values()), dtype=torch.float64),
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the state from ``state``; the sources must be the same."""
        self._read = state["read"].tolist()
        self._credit = dict(zip(self._rows, state["credit"].tolist(), strict=True))
        self._weights = dict(zip(self._rows, state["weights"].tolist(), strict=True))
        self._times = dict.fromkeys(self._rows, 0)
        for row in self._read:
            self._times[self._sources[row]] += 1
