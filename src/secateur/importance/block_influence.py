"""Block Influence (ShortGPT, arXiv 2403.03853): how much a decoder layer turns the hidden state."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from secateur.importance.base import Criterion, Needs, unscorable
from secateur.types import DependencyGraph, Kind, Scores
from secateur.walk import Calibration, borrowed, calibration_for


class BlockInfluence(Criterion):
    """``BI_i = 1 − E[cos(x_i, x_{i+1})]`` over all tokens, where x_i is the input of layer i (eq. 1).

    For groups whose units are whole modules (kind ``layer``); raises ModelError for any other prunable group.
    """

    name: ClassVar[str] = "block-influence"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.03853"
    summary: ClassVar[str] = "whole layers, those that turn the hidden state least"
    needs: ClassVar[Needs] = "activations"
    kinds: ClassVar[tuple[Kind, ...]] = ("layer",)

    def score(self, model: nn.Module, graph: DependencyGraph, calibration: Calibration | None, seed: int) -> Scores:
        """See ``Criterion.score``."""
        text = calibration_for(calibration, self.name)
        self.check(model, graph)
        reader = text.reader(model)
        found = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in graph.prunable}
        hooks = [
            model.get_submodule(path).register_forward_hook(_watch(found[group.name], unit), with_kwargs=True)
            for group in graph.prunable
            for unit, path in enumerate(group.modules)
        ]
        try:
            with borrowed(model):
                text.run(reader, "block influence")
        finally:
            for hook in hooks:
                hook.remove()
        return Scores({name: (1 - total / text.ids.numel()).float() for name, total in found.items()})

    def check(self, model: nn.Module, graph: DependencyGraph) -> None:
        """See ``Criterion.check``: units are whole layers."""
        for group in graph.prunable:
            if not group.modules:
                raise unscorable(group, self.name, f"it ranks whole layers (budget.kinds=[layer]), not {group.kind}")


def _watch(total: torch.Tensor, unit: int) -> Any:
    """A forward hook that adds the cosine between a layer's first tensor in and first tensor out, token by token."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        total[unit] += cosine_similarity(before.float(), after.float(), dim=-1).sum().cpu()

    return hook
