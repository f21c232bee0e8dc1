"""Local reconstruction: each block of the pruned model is trained alone, so that it gives what the dense model's gives.

A *block* is a part of a layer that ends in a weight which consumes units: attention up to its output projection, then
the MLP up to its down projection, or the experts. Its output is the residual stream right after it: the output of the
layer while the later blocks of the layer give zeros. This holds for norms before and after a block, for blocks side by
side and for scaled residuals alike. (A Free Lunch in LLM Compression, arXiv 2510.14444, section 3; docs/recovery.md.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.compensation.guard import EVERY, SKIPPED, Guarded, Target, check_inside, guarded, text_for
from secateur.errors import ModelError
from secateur.keeping import keep_tensors, take_tensors
from secateur.progress import Bar
from secateur.surgery import masked, updated
from secateur.surgery.mask import MASKABLE
from secateur.surgery.rows import removed_rows
from secateur.types import Cut, DependencyGraph, Kept
from secateur.units import Rows
from secateur.walk import Calibration, LayerStack, Walker, borrowed

_KEY = "recovery.reconstruct"
_WARMUP = 0.1
"""Fraction of the steps in which the learning rate rises."""
_EQUAL = 1e-10
"""A block with a smaller error has nothing to learn."""


@dataclass(frozen=True)
class Reconstruction:
    """How the blocks are trained: AdamW without weight decay, a linear fall of the learning rate after a warm-up."""

    target: Target = "stream"
    """``dense``: the dense block's output, both for the dense model's inputs; ``stream``: the dense model's residual
    stream, for the pruned model's inputs; ``own``: the dense block's output, both for the pruned model's inputs."""
    learning_rate: float = 2e-4
    epochs: int = 1
    batch_size: int = 2
    """Windows per step."""


@dataclass(frozen=True)
class Block:
    """How one block was trained."""

    before: float
    """Distance of its output from the target on the check windows, as a share of the target's square."""
    after: float
    kept: bool
    """Whether it has the new weights: whether the distance fell."""


@dataclass(frozen=True)
class Reconstructed(Guarded):
    """New values for the weights of blocks, not yet written, with their effect on the loss."""

    blocks: dict[str, Block] = field(default_factory=dict)
    """Path of the consumer that a block ends in → how it was trained."""

    @property
    def facts(self) -> dict[str, Any]:
        """See ``Guarded.facts``."""
        return {"blocks": {name: asdict(block) for name, block in self.blocks.items()}, **super().facts}


def reconstruct(
    model: nn.Module,
    graph: DependencyGraph,
    kept: Kept,
    calibration: Calibration | None,
    settings: Reconstruction | None = None,
    *,
    start: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
) -> Reconstructed:
    """New values for all weights of the blocks. The model is restored.

    Every fifth window is a check window, and is never trained on. A block keeps its new weights only if its error on
    the check windows falls. At the end all changes are made, half of each, or none: the loss on the check windows never
    rises. Rows and columns of removed units keep their values.

    Costs about three forward passes over the text, and ``epochs`` forward and backward passes, of the layers. Memory:
    the gradients and the optimiser state of one block, hidden states of both models at one layer, the target, and the
    new values of all blocks in the memory of the processor.

    Args:
        model: the dense model.
        calibration: at least ``EVERY`` windows.
        start: path of a parameter → its value in the pruned model, where that differs from the dense one.
        seed: of the order of the windows.
        checkpoints: a folder for finished layers, with which an interrupted call goes on; None keeps nothing.

    Raises:
        ModelError: as ``check_reconstructable``.
        DataError: there is no text.
    """
    text = text_for(calibration, _KEY)
    cut = Cut.keeping(graph, kept)
    stack = check_reconstructable(model, graph, cut)
    settings, start = settings or Reconstruction(), start or {}
    walk = _Walk(model, graph, cut, settings, start, seed, Walker(stack, text), Walker(stack, text))
    with borrowed(model), Bar("reconstructing", len(stack)) as bar:
        for layer in range(len(stack)):
            walk.layer(layer, None if checkpoints is None else checkpoints / f"layer-{layer}.safetensors")
            bar.advance()
        found = guarded(model, graph, cut, text, walk.updates, start)
    return Reconstructed(**vars(found), blocks=walk.blocks)


def check_reconstructable(model: nn.Module, graph: DependencyGraph, kept: Iterable[str]) -> LayerStack:
    """The layers. Raises ModelError unless the blocks with these groups can be trained."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ModelError(
                f"{name} is stored as {parameter.dtype}, and {_KEY} trains weights of floating point. Load the model "
                f"in float32, or set {_KEY}=false."
            )
    return check_inside(model, graph, kept, _KEY)


@dataclass(frozen=True)
class _Part:
    """A block of one layer."""

    name: str
    """Path of the module that ends it."""
    later: Mapping[str, bool]
    """Paths of the modules that end the blocks after it, or contain them → whether these need not run to give zeros."""
    parameters: tuple[str, ...]
    """Those that its output depends on, without those of the blocks before it."""


@dataclass
class _Walk:
    """Both models on their way through the layers: the dense one, and the pruned one with its new weights."""

    model: nn.Module
    graph: DependencyGraph
    cut: Cut
    settings: Reconstruction
    start: Mapping[str, torch.Tensor]
    seed: int
    dense: Walker
    pruned: Walker
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    blocks: dict[str, Block] = field(default_factory=dict)
    drifts: bool = False
    """Whether an earlier layer is not that of the dense model."""

    @property
    def fed(self) -> Walker:
        """Gives the inputs of the trained blocks."""
        return self.dense if self.settings.target == "dense" else self.pruned

    @property
    def taught(self) -> Walker:
        """Gives the inputs of the dense blocks."""
        return self.pruned if self.settings.target == "own" else self.dense

    def layer(self, layer: int, file: Path | None) -> None:
        """Train the blocks of one layer, or read their new weights from ``file``, and move on."""
        here = {name: units for name, units in self.cut.items() if self.graph[name].layer == layer}
        prefix = f"{self.dense.stack.path}.{layer}."
        old = {name: value for name, value in self.start.items() if name.startswith(prefix)}
        changes = bool(here or old)
        new, facts = take_tensors(file) or ({}, {})
        blocks = {name: Block(**fact) for name, fact in facts.items()}
        if not blocks and (changes or (self.drifts and self.settings.target == "stream")):
            new, blocks = self._trained(layer, here, old)
            keep_tensors(file, new, {name: asdict(block) for name, block in blocks.items()})
        self.updates |= new
        self.blocks |= blocks
        self.drifts = self.drifts or changes
        if layer + 1 < len(self.dense.stack):
            if self.settings.target != "own":
                self.dense.go_to(layer + 1)
            if self.settings.target != "dense":
                with updated(self.model, {**old, **new}), masked(self.model, self.graph, here):
                    self.pruned.go_to(layer + 1)

    def _trained(
        self, layer: int, here: Kept, old: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Block]]:
        """New values of this layer's parameters, on the processor, and how each of its blocks was trained."""
        new: dict[str, torch.Tensor] = {}
        blocks: dict[str, Block] = {}
        with updated(self.model, old):
            parts = self._parts(layer)
        for part in parts:
            with _silent(self.model, part.later):
                wanted = self.taught.through()
                values, blocks[part.name] = self._train(part, here, {**old, **new}, wanted)
            new |= values
            if not part.later and self.taught is self.dense:
                self.dense.states, self.dense.layer = wanted, layer + 1
        return new, blocks

    def _train(
        self, part: _Part, here: Kept, present: Mapping[str, torch.Tensor], wanted: list[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], Block]:
        """New values of the part's parameters; none if its error does not fall. The model is restored.

        Args:
            present: values of parameters of this layer in the pruned model, where they differ from the dense ones.
            wanted: the target for each batch of windows.
        """
        dense = {name: self.model.get_parameter(name) for name in part.parameters if name not in present}
        with updated(self.model, {**dense, **present}):
            with masked(self.model, self.graph, here), borrowed(self.model, part.parameters) as trained:
                before = after = self._error(wanted)
                if before > _EQUAL:
                    self._descend(list(trained.values()), removed_rows(self.model, self.graph, here, "in"), wanted)
                    after = self._error(wanted)
            if not after < before:
                return {}, Block(before, before, False)
            return {name: value.detach().cpu().clone() for name, value in trained.items()}, Block(before, after, True)

    def _descend(self, parameters: list[nn.Parameter], gone: list[Rows], wanted: list[torch.Tensor]) -> None:
        """Train these parameters in place; ``gone`` stay as they are."""
        settings, text = self.settings, self.fed.calibration
        windows = [window for window in range(len(text)) if window % EVERY != EVERY - 1]
        draw = torch.Generator().manual_seed(self.seed)
        order = [
            windows[i] for _ in range(settings.epochs) for i in torch.randperm(len(windows), generator=draw).tolist()
        ]
        batches = [order[first : first + settings.batch_size] for first in range(0, len(order), settings.batch_size)]
        exact = [one if one.dtype == torch.float32 else one.detach().float().clone() for one in parameters]
        optimiser = torch.optim.AdamW(exact, settings.learning_rate, weight_decay=0.0)
        for step, rows in enumerate(batches):
            optimiser.param_groups[0]["lr"] = settings.learning_rate * _share(step, len(batches))
            with torch.enable_grad():
                error, square = self._distance(rows, wanted)
                (error / square).backward()
            for item in gone:
                if item.tensor.grad is not None:
                    item.tensor.grad.index_fill_(item.axis, item.index.to(item.tensor.device), 0.0)
            for one, parameter in zip(exact, parameters, strict=True):
                if one is not parameter and parameter.grad is not None:
                    one.grad = parameter.grad.float()
            optimiser.step()
            for one, parameter in zip(exact, parameters, strict=True):
                parameter.grad = None
                if one is not parameter:
                    parameter.detach().copy_(one)

    def _error(self, wanted: list[torch.Tensor]) -> float:
        """Distance from the target on the check windows, as a share of the target's square."""
        text = self.fed.calibration
        checks = list(range(EVERY - 1, len(text), EVERY))
        error = square = 0.0
        with torch.no_grad():
            for first in range(0, len(checks), text.batch_size):
                one, other = self._distance(checks[first : first + text.batch_size], wanted)
                error, square = error + float(one), square + float(other)
        return error / square if square else 0.0  # NaN stays NaN, and is never less

    def _distance(self, rows: Sequence[int], wanted: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Square of the distance from the target, and of the target, summed over these windows."""
        walker = self.fed
        states = None if walker.layer == 0 else self._windows(walker.states, rows)
        with walker.calibration.autocast(self.model):
            out = walker.stack.states(walker.calibration.ids[list(rows)], walker.layer, states, walker.layer + 1)
        target = self._windows(wanted, rows).float()[:, SKIPPED:]
        return (out.float()[:, SKIPPED:] - target).square().sum(), target.square().sum()

    def _windows(self, batches: list[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        size = self.fed.calibration.batch_size
        return torch.stack([batches[row // size][row % size] for row in rows])

    def _parts(self, layer: int) -> list[_Part]:
        """The blocks of a layer in the order in which they run."""
        prefix = f"{self.dense.stack.path}.{layer}."
        ends = self._ends(layer, prefix)
        silenced = [self._silenced(layer, end, ends) for end in ends]
        names = [name for name, _ in self.model.named_parameters() if name.startswith(prefix)]
        parts: list[_Part] = []
        for place, name in enumerate(ends):
            later = dict(silenced[place + 1 :])
            with borrowed(self.model, names) as parameters, torch.enable_grad(), _silent(self.model, later):
                out = self._probe(layer).float().square().sum()
                gradients = torch.autograd.grad(out, list(parameters.values()), allow_unused=True)
            taken = {one for part in parts for one in part.parameters}
            reached = zip(parameters, gradients, strict=True)
            mine = [one for one, gradient in reached if gradient is not None and bool(gradient.any())]
            parts.append(_Part(name, later, tuple(one for one in mine if one not in taken)))
        return parts

    def _ends(self, layer: int, prefix: str) -> list[str]:
        """Paths of the modules with weights that consume units of this layer, in the order in which they run."""
        members = (member for group in self.graph if group.kind in MASKABLE for member in group.members)
        paths = {one.parameter.rpartition(".")[0] for one in members if one.role == "in"}
        called: dict[str, None] = {}
        with ExitStack() as stack:
            for path in sorted(path for path in paths if path.startswith(prefix)):
                note = partial(_note, called, path)
                stack.callback(self.model.get_submodule(path).register_forward_hook(note).remove)
            with torch.no_grad():
                self._probe(layer)
        return list(called)

    def _silenced(self, layer: int, end: str, ends: Sequence[str]) -> tuple[str, bool]:
        """The module around ``end``, and True, if it gives zeros without running when ``end`` gives zeros.

        Otherwise ``end`` itself, and False. An MLP around its down projection, for example, need not run.
        """
        others = [one for one in ends if one != end]
        path = end
        while (above := path.rpartition(".")[0]) != f"{self.dense.stack.path}.{layer}":
            if any(one.startswith(f"{above}.") for one in others):
                break
            path = above
        seen: list[bool] = []

        def look(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            alike = bool(args) and isinstance(out, torch.Tensor) and out.shape == args[0].shape
            seen.append(alike and not bool(out.any()))

        with _silent(self.model, {end: False}), torch.no_grad():
            handle = self.model.get_submodule(path).register_forward_hook(look)
            try:
                self._probe(layer)
            finally:
                handle.remove()
        return (path, True) if all(seen) else (end, False)

    def _probe(self, layer: int) -> torch.Tensor:
        """Output of the layer for the first window."""
        walker = self.taught
        states = None if layer == 0 else walker.states[0][:1]
        with walker.calibration.autocast(self.model):
            return walker.stack.states(walker.calibration.ids[:1], layer, states, layer + 1)


def _note(called: dict[str, None], path: str, *_: Any) -> None:
    called[path] = None


@contextmanager
def _silent(model: nn.Module, paths: Mapping[str, bool]) -> Iterator[None]:
    """A context in which these modules give zeros; those with True without running, in the shape of their input."""
    with ExitStack() as stack:
        for path, skipped in paths.items():
            module = model.get_submodule(path)
            if skipped:
                stack.enter_context(_skipped(module))
            else:
                stack.callback(module.register_forward_hook(lambda _, args, out: torch.zeros_like(out)).remove)
        yield


@contextmanager
def _skipped(module: nn.Module) -> Iterator[None]:
    before = module.__dict__.get("forward")  # libraries hang hooks there
    module.forward = lambda states, *args, **kwargs: torch.zeros_like(states)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _share(step: int, steps: int) -> float:
    """Share of the peak learning rate: it rises to 1 in the warm-up, and falls towards 0."""
    warmup = max(1, round(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup + 1))
