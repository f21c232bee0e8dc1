"""Sizes of every layer of a pruned model, under the names of its config."""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig

from secateur.errors import ModelError
from secateur.export.sizes import SizePlace, query_heads_name, size_name, size_place_of
from secateur.surgery.rebuild import OWN_NAME, is_listed, is_uneven
from secateur.types import DependencyGraph, Kept, NodeGroup


class LayerSizes:
    """The sizes of layers after a cut to ``kept`` of the model that ``config`` and ``graph`` describe.

    ``config`` may already contain sizes of layers, from an earlier round of pruning. Raises ModelError for a cut group
    that is neither inside one layer nor has its own name in the config.
    """

    def __init__(self, config: PreTrainedConfig, graph: DependencyGraph, kept: Kept) -> None:
        self.graph = graph
        self.whole = without_layer_sizes(config)
        """The config with the sizes of an uncut layer."""
        self.sizes: dict[int, dict[str, int]] = {}
        """Layer → name → size; missing sizes are those of ``whole``."""
        self.names: dict[SizePlace, str] = {}
        """Place of a group that was cut in some layer, now or earlier → the name of its size."""
        self.cut_now: dict[str, NodeGroup] = {}
        """Name of a size → a group with this size that loses units now."""
        if is_uneven(config):
            self._continue_from(config)
        elif config.is_heterogeneous and kept:
            raise ModelError(
                f"The layers of this {config.model_type} model differ in size by design (per_layer_config), and a "
                "further cut cannot be described."
            )
        if kept and not isinstance(getattr(config, "num_hidden_layers", None), int):
            raise ModelError(
                f"The config of this {config.model_type} model does not contain the number of layers (the model may "
                "have several parts), therefore it cannot describe the cut."
            )
        layer_configs = list(config.per_layer_config) if kept else []
        for group in graph:
            lost = group.size - len(kept.get(group.name, range(group.size)))
            if lost and group.layer is None:
                self._cut_everywhere(group, lost)
            elif lost and group.layer is not None:
                if group.layer >= len(layer_configs):
                    raise ModelError(
                        f"{group.name} is beyond the {len(layer_configs)} layers in the config of this "
                        f"{graph.model_type} model, therefore its size cannot be described. Protect it "
                        "(budget.protect)."
                    )
                self._cut(layer_configs[group.layer], group, lost)

    def of(self, layer: int, name: str) -> int:
        """Size ``name`` of ``layer``."""
        return int(self.sizes.get(layer, {}).get(name, getattr(self.whole, name)))

    def even(self) -> PreTrainedConfig | None:
        """A plain config with the common size of all layers under each name; None when layers differ."""
        config = copy.deepcopy(self.whole)
        for name in self.names.values():
            for size in filter(None, (name, query_heads_name(self.whole, name))):
                values = {self.of(layer, size) for layer in self._layers_with(name, size)}
                if len(values) != 1:
                    return None
                setattr(config, size, values.pop())
        for name in [name for name in vars(config) if name.startswith(OWN_NAME)]:
            delattr(config, name)
        return config

    def _layers_with(self, name: str, size: str) -> set[int]:
        """The layers with a size ``name``, cut or not."""
        places = {place for place, other in self.names.items() if other == name}
        whole = {g.layer for g in self.graph if g.layer is not None and size_place_of(g) in places}
        return whole | {layer for layer, own in self.sizes.items() if size in own}

    def _continue_from(self, config: PreTrainedConfig) -> None:
        for layer, own in config.to_dict()["per_layer_config"].items():
            self.sizes[int(layer)] = {self._plain_name(name): size for name, size in own.items()}
        for name, followers in config.pruned_layers["follows"].items():
            rows = frozenset((key, rows) for key, rows in followers.items() if ":" in key)
            least = min(followers.values())
            runs = round(1 / least) if least < 1 else 1
            self.names[SizePlace(config.pruned_layers["path"], rows, runs)] = self._plain_name(name)

    def _plain_name(self, name: str) -> str:
        """The family's name for a size that has our name, because the family's validator refuses it."""
        plain = name.removeprefix(OWN_NAME)
        return plain if hasattr(self.whole, plain) else name

    def _cut_everywhere(self, group: NodeGroup, lost: int) -> None:
        if getattr(self.whole, f"{group.kind}_size", None) == group.size - lost:
            return  # slicing has already changed the config, because the code reads hidden and vocabulary size there
        name = size_name(self.whole, group)
        if getattr(self.whole, name, None) != group.size:
            raise ModelError(
                f"{group.name} has {group.size} units in all layers together, and the config of "
                f"{self.graph.model_type} has no name for that number, therefore it cannot describe the cut model. "
                "Protect this group (budget.protect)."
            )
        setattr(self.whole, name, group.size - lost)

    def _cut(self, layer_config: PreTrainedConfig, group: NodeGroup, lost: int) -> None:
        place, layer = size_place_of(group), group.layer
        if place is None or layer is None:
            raise ModelError(
                f"{group.name} is not inside one layer, and layers cannot differ in it. Protect it (budget.protect)."
            )
        if any(place.path != other.path for other in self.names):
            raise ModelError(
                f"{group.name} is in a second list of layers, which no config describes. Protect it (budget.protect)."
            )
        if place not in self.names:
            self.names[place] = self._free_name(size_name(layer_config, group), group)
        name = self.names[place]
        self.cut_now.setdefault(name, group)
        if getattr(self.whole, name, None) is None:
            setattr(self.whole, name, group.size)
        own = self.sizes.setdefault(layer, {})
        if group.kind in ("attention", "query"):
            _make_head_dim_explicit(self.whole)
        if group.kind == "attention":
            query = query_heads_name(self.whole, name)
            if query is not None and query not in self.names.values():  # else their size is cut separately
                heads = self.of(layer, query)
                own[query] = heads - lost * (heads // group.size)
        own[name] = self.of(layer, name) - lost

    def _free_name(self, name: str, group: NodeGroup) -> str:
        """``name``, or one of our names when another size in the layers already uses it.

        This happens with two kinds of attention in one model, and with the query heads of a layer that has only one KV
        head left: these get their own name from then on.
        """
        taken = {*self.names.values(), *(query_heads_name(self.whole, other) for other in self.names.values())}
        ours = f"{OWN_NAME}{group.kind}_units"
        names = (name, ours, *(f"{ours}_{number}" for number in range(2, 2 + len(self.names))))
        return next(free for free in names if free not in taken)


def without_layer_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy in which every layer has the global sizes. It needs no extra code for layers that differ."""
    plain = copy.deepcopy(config)
    if is_uneven(config):
        if not is_listed(config):
            plain.per_layer_config = None
        for name in ("pruned_layers", "auto_map"):
            vars(plain).pop(name, None)
    return plain


def _make_head_dim_explicit(config: PreTrainedConfig) -> None:
    """Set ``head_dim``. transformers would otherwise use hidden size / heads, which changes with the heads."""
    computed = isinstance(getattr(type(config), "head_dim", None), property)
    if not computed and getattr(config, "head_dim", None) is None and hasattr(config, "num_attention_heads"):
        config.head_dim = config.hidden_size // config.num_attention_heads
