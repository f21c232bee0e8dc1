"""A database of compensated weights: what each consumer is after any number of its group's units has been removed.

One run of optimal brain surgery through the layers of the dense model removes the units of each group, cheapest first,
and keeps what each removal subtracts from the consumer's weights (``obs.Step``). The first k columns of it give the
weights that compensate for exactly these k, so that every level is exact and takes no memory of its own. (Weights at
several levels from one run: ZipLM, arXiv 2302.04089; searched by whole models: DarwinLM, arXiv 2502.07780.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.compensation.gram import Gram
from secateur.compensation.guard import SKIPPED
from secateur.compensation.obs import Elimination
from secateur.compensation.refit import check_removable, consumers_of, matrix_of
from secateur.keeping import keep, take
from secateur.progress import Bar
from secateur.surgery.updates import Updates
from secateur.types import Cut, DependencyGraph
from secateur.units import Rows
from secateur.walk import Calibration, Walker, borrowed, calibration_for, watched

_Tensors = dict[str, torch.Tensor]


class Database:
    """Units in the order of removal, and the weights of their consumer after any number of them.

    Files: one for each layer, in ``folder``; without a folder they stay in memory. A group takes 4 bytes for each
    removed input and each input or output of its consumer. Files are mapped into memory, and read where they are used.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, deepest: Mapping[str, int], folder: Path | None):
        """
        Args:
            model: the dense model; its weights must be the dense ones whenever a method is called.
            graph: of the model.
            deepest: group name → the largest number of units that it may lose.
            folder: where layers are kept, and found again after an interruption.
        """
        self.model, self.graph, self.folder = model, graph, folder
        self.deepest = {name: count for name, count in deepest.items() if count}
        self._layers: dict[int, _Tensors] = {}
        self._last: dict[str, tuple[int, torch.Tensor]] = {}

    def build(self, calibration: Calibration | None, key: str) -> None:
        """Make the layers that are not in the folder yet. Costs one forward pass over the text; memory: one layer.

        ``key`` is the key of the recipe that asks for it.

        Raises:
            ModelError: as ``check_removable``, or inputs are not finite.
            DataError: there is no text.
        """
        text = calibration_for(calibration, key)
        walker = Walker(check_removable(self.model, self.graph, self.deepest, key), text)
        with borrowed(self.model), torch.no_grad(), Bar("compensating", len(walker.stack)) as bar:
            for layer in range(len(walker.stack)):
                here = [name for name in self.deepest if self.graph[name].layer == layer]
                if here and not self._found(layer, here):
                    walker.go_to(layer)
                    self._keep(layer, self._made(walker, here))
                bar.advance()

    @property
    def orders(self) -> dict[str, list[int]]:
        """Group name → ``deepest`` units in the order of removal."""
        return {name: self._entry(name)["units"].tolist() for name in self.deepest}

    def weights(self, removed: Mapping[str, int]) -> Updates:
        """Path of each consumer → its weights when the groups have lost so many units, in its own shape and type.

        The columns of removed units are zero, up to rounding. What did not change since the last call is not computed
        again.
        """
        found = {name: (count, self._weight(name, count)) for name, count in removed.items() if count}
        self._last = found
        return {self._consumer(name).name: weight for name, (_, weight) in found.items()}

    def _weight(self, name: str, count: int) -> torch.Tensor:
        if self._last.get(name, (0,))[0] == count:
            return self._last[name][1]
        rows, entry = self._consumer(name), self._entry(name)
        dense = matrix_of(rows)
        columns = count * (len(entry["inputs"]) // len(entry["units"]))
        outputs, inputs = (entry[part][:columns].to(dense.device) for part in ("outputs", "inputs"))
        new = torch.addmm(dense.float(), outputs.T, inputs, alpha=-1)
        return new.to(dense.dtype).movedim(-1, rows.axis).contiguous()

    def _consumer(self, name: str) -> Rows:
        [rows] = consumers_of(self.model, self.graph, Cut.removing(self.graph, {name: [0]})).values()
        return rows

    def _entry(self, name: str) -> _Tensors:
        layer = self.graph[name].layer
        assert layer is not None
        return {part: self._layers[layer][f"{name}/{part}"] for part in _PARTS}

    def _made(self, walker: Walker, here: list[str]) -> _Tensors:
        """The tensors of these groups of one layer; the walker moves to the next layer."""
        rows = {name: self._consumer(name) for name in here}
        window = walker.calibration.ids.shape[1]
        sums = {one.name: _Products(matrix_of(one), window) for one in rows.values()}
        with watched(self.model, sums):
            walker.go_to(walker.layer + 1)
        tensors: _Tensors = {}
        for name, one in rows.items():
            group, dense = self.graph[name], matrix_of(one)
            [member] = [each for each in group.members if each.role == "in" and each.parameter == one.name]
            columns = member.rows(range(group.size))
            elimination = Elimination(sums[one.name].gram.towards(dense), dense, columns, group.runs)
            steps = [
                (torch.tensor(step.units), step.outputs.float().cpu(), step.inputs.float().cpu())
                for step in elimination.remove(self.deepest[name])
            ]
            tensors |= {
                f"{name}/{part}": torch.cat(each) for part, each in zip(_PARTS, zip(*steps, strict=True), strict=True)
            }
        return tensors

    def _keep(self, layer: int, tensors: _Tensors) -> None:
        file = self._file(layer)
        keep(file, lambda scratch: save_file(tensors, scratch))
        self._layers[layer] = tensors if file is None else load_file(file)

    def _found(self, layer: int, here: list[str]) -> bool:
        """Whether the layer is in the folder, with all that these groups need."""
        tensors = take(self._file(layer), load_file)
        if tensors is None or any(len(tensors.get(f"{name}/units", ())) != self.deepest[name] for name in here):
            return False
        self._layers[layer] = tensors
        return True

    def _file(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f"layer-{layer}.safetensors"


class _Products:
    """The sums of ``Gram`` over the inputs of a linear (``Statistic``), without the first positions of each window."""

    def __init__(self, weight: torch.Tensor, window: int) -> None:
        self.gram, self._window = Gram.empty(0, weight.shape[1], weight.device), window

    def add(self, x: torch.Tensor, matrix: int = 0) -> None:
        """See ``Statistic``."""
        x = x.detach().reshape(-1, self._window, x.shape[-1])[:, SKIPPED:].flatten(0, 1)
        self.gram.add(x, x[:, :0])


_PARTS = ("units", "outputs", "inputs")
"""The tensors of a group, as in ``obs.Step``, of all steps together."""
