"""Block Influence (ShortGPT, arXiv 2403.03853): how much a decoder layer turns what passes through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from secateur.importance.base import Needs, borrowed, calibration, input_device, unscorable
from secateur.progress import track
from secateur.types import DependencyGraph, Scores

if TYPE_CHECKING:
    from secateur.data import TokenBlocks


@dataclass(frozen=True)
class BlockInfluence:
    """``BI_i = 1 − E[cos(x_i, x_{i+1})]`` over all tokens, x_i being the hidden state that layer i takes in (eq. 1).

    For groups whose units are whole modules (kind ``layer``); raises ModelError for any other prunable group.
    """

    batch_size: int = 4
    name: str = "block-influence"
    needs: Needs = "activations"

    def score(self, model: nn.Module, graph: DependencyGraph, blocks: TokenBlocks | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        blocks = calibration(blocks, self.name)
        for group in graph.prunable:
            if not group.modules:
                raise unscorable(group, self.name, f"it ranks whole layers (budget.kinds=[layer]), not {group.kind}")
        found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in graph.prunable}
        tokens = 0
        hooks = [
            model.get_submodule(path).register_forward_hook(_watch(found[group.name], unit), with_kwargs=True)
            for group in graph.prunable
            for unit, path in enumerate(group.modules)
        ]
        try:
            steps = -(-len(blocks) // self.batch_size)
            with borrowed(model), torch.no_grad():
                for ids in track(blocks.batches(self.batch_size), "block influence", steps):
                    model(input_ids=ids.to(input_device(model)), use_cache=False)
                    tokens += ids.numel()
        finally:
            for hook in hooks:
                hook.remove()
        return Scores({name: (1 - total / tokens).float() for name, total in found.items()})


def _watch(total: torch.Tensor, unit: int) -> Any:
    """A forward hook that adds the cosine between a layer's first tensor in and first tensor out, token by token."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        total[unit] += cosine_similarity(before.float(), after.float(), dim=-1).sum().cpu()

    return hook
