"""How many logits a computation holds at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.testing.tiny import HIDDEN, VOCAB


class LargestLogits(TorchDispatchMode):
    """The most elements of any tensor with a value for each token of the vocabulary of a tiny model at some positions.

    Tensors are counted as they are computed, while this is entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for each operation."""
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, torch.Tensor) and _is_of_logits(one.shape):
                self.most = max(self.most, one.numel())
        return result


def _is_of_logits(shape: torch.Size) -> bool:
    """Not the head's weight."""
    return shape[-1:] == (VOCAB,) and shape[-2:] != (HIDDEN, VOCAB)
