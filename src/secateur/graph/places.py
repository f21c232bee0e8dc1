"""Where in the model a parameter lives: its module without adapter wrappers, and its decoder layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


@dataclass(frozen=True)
class Place:
    """The home of one parameter."""

    module: tuple[str, ...]
    """Path of the module, as it would be without adapters."""
    adapter: bool
    """Whether the parameter belongs to a peft adapter rather than to the model."""
    layer: int | None
    """Index in the list of decoder layers; None outside of it."""
    within: tuple[str, ...]
    """Path of the module below its decoder layer; all of ``module`` outside of the decoder layers."""


class Places:
    """Looks up the ``Place`` of every parameter or buffer of a model; ``used`` are the parameters of a forward pass."""

    def __init__(self, model: nn.Module, used: Container[str]) -> None:
        self._peft = isinstance(model, PeftModel)
        self._tuners = {path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        self._layers = self._decoder_layers(model, used)
        self._beside = self._lists_beside(model)
        """The list of decoder layers, and lists beside it that hold a part of each (XLM's attentions)."""

    def blocks(self, model: nn.Module) -> list[str]:
        """Paths of the decoder layers in ``model``, in order; empty when it has none."""
        depth = len(self._layers)
        found = [
            path
            for path, _ in model.named_modules()
            if depth and len(plain := self._plain(path.split("."))) == depth + 1 and plain[:depth] == self._layers
        ]
        return sorted(found, key=lambda path: int(path.rpartition(".")[2])) if found else []

    def _decoder_layers(self, model: nn.Module, used: Container[str]) -> tuple[str, ...]:
        """Path of the list of modules that holds most of the parameters that a forward pass uses."""
        sizes: Counter[tuple[str, ...]] = Counter()
        for name, parameter in model.named_parameters():
            module, _ = self._unwrapped(name)
            number = _first_number(module)
            if number is not None and name in used:
                sizes[module[:number]] += parameter.numel()
        return max(sizes, key=lambda path: sizes[path]) if sizes else ()

    def _lists_beside(self, model: nn.Module) -> set[tuple[str, ...]]:
        """Paths of the lists that lie where the decoder layers do, and are as long."""
        lengths = {
            self._plain(path.split(".")): len(modules)
            for path, modules in model.named_modules()
            if isinstance(modules, nn.ModuleList)
        }
        return {
            path
            for path, length in lengths.items()
            if path[:-1] == self._layers[:-1] and length == lengths.get(self._layers)
        }

    def _unwrapped(self, name: str) -> tuple[tuple[str, ...], bool]:
        """Module path and whether it is an adapter's, for a parameter called ``name``."""
        parts = name.split(".")
        module: list[str] = []
        for length, part in enumerate(parts[:-1]):
            if ".".join(parts[:length]) in self._tuners and part != "base_layer":
                return self._plain(module), True
            if part != "base_layer":
                module.append(part)
        return self._plain(module), ".".join(parts[:-1]) in self._tuners

    def _plain(self, module: Sequence[str]) -> tuple[str, ...]:
        plain = module[2:] if self._peft else module
        return tuple(part for part in plain if part not in ("", "original_module", "modules_to_save"))

    def __getitem__(self, name: str) -> Place:
        module, adapter = self._unwrapped(name)
        depth = len(self._layers)
        if module[:depth] in self._beside and len(module) > depth and module[depth].isdigit():
            return Place(module, adapter, int(module[depth]), module[depth + 1 :])
        return Place(module, adapter, None, module)


def _first_number(module: Sequence[str]) -> int | None:
    return next((place for place, part in enumerate(module) if part.isdigit()), None)


def common(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest beginning that all ``paths`` share."""
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return tuple(shared)
