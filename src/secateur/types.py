"""The types that every room shares: node groups, scores, plans and cuts.

None of them contains a model's tensors or depends on a model family.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator, model_validator
from safetensors import safe_open
from safetensors.torch import save_file

from secateur.errors import PlanError
from secateur.reading import brief, path_of, read_json, shortened

Kind = Literal["ffn", "attention", "query", "expert", "layer", "hidden", "vocab", "state"]
Role = Literal["out", "in"]
Kept = Mapping[str, Sequence[int]]
"""Group name → kept units; a group without an entry is kept whole."""
Removed = dict[str, list[int]]
"""Group name → units that are removed, ascending."""

_LARGEST = 2**31 - 1


class Settings(BaseModel):
    """Base of every recipe section. It is frozen and typed, refuses unknown keys, and requires finite numbers and
    integers of 31 bits. A single value is read as a list of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lists_of_one(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        lists = {
            name
            for name, field in cls.model_fields.items()
            if any(get_origin(kind) in (list, tuple) for kind in (field.annotation, *get_args(field.annotation)))
        }
        return {
            key: [item] if key in lists and isinstance(item, str | int | float) else item for key, item in value.items()
        }

    @field_validator("*")
    @classmethod
    def _whole_numbers_fit(cls, value: Any) -> Any:
        """Limit integers: a product of two (steps and batch size) must still be a position in a text."""
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(item, int) and abs(item) > _LARGEST for item in items):
            raise ValueError(f"whole numbers are at most {_LARGEST:,}")
        return value


@dataclass(frozen=True)
class Member:
    """One axis of one parameter with rows of a node group's units.

    Unit ``u`` owns the rows ``offset + u * stride + w`` for every ``offset`` in ``offsets`` and ``w < width``; where
    there is a gap, ``u // run * gap`` rows further on.
    """

    parameter: str
    """Path as in ``model.named_parameters()`` (or of a persistent buffer)."""
    axis: int
    role: Role
    """``out``: the parameter produces the units (rows of an up projection, a bias, a norm weight); ``in``: it consumes
    them by contraction (columns of a down projection), and zeroing these removes the unit."""
    offsets: tuple[int, ...]
    stride: int
    width: int
    run: int = 1
    gap: int = 0
    """Rows after every ``run`` units that belong to none (Falcon's rows are the query heads of a KV head, its key, its
    value, and so on)."""

    @property
    def rows_per_unit(self) -> int:
        return len(self.offsets) * self.width

    def elements_per_unit(self, shape: Sequence[int]) -> int:
        """Elements of a parameter of this shape that are removed with one unit while its other axes are whole."""
        return self.rows_per_unit * math.prod(size for axis, size in enumerate(shape) if axis != self.axis)

    @property
    def in_order(self) -> bool:
        """Whether the units follow each other from the first row on, each in one piece."""
        return self.offsets == (0,) and self.stride == self.width and self.gap == 0

    def rows(self, units: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Index tensor of shape ``[len(units), rows_per_unit]``: the rows (or columns) of each unit."""
        unit = torch.as_tensor(units, dtype=torch.long).reshape(-1, 1, 1)
        offset = torch.tensor(self.offsets, dtype=torch.long).reshape(1, -1, 1)
        within = torch.arange(self.width, dtype=torch.long).reshape(1, 1, -1)
        first = unit * self.stride + unit // self.run * self.gap
        return (offset + first + within).reshape(unit.shape[0], -1)


@dataclass(frozen=True)
class NodeGroup:
    """Structures of one place in the model that can be removed unit by unit.

    A unit is LoRAShear's *minimally removable structure*: all rows that depend on each other, and are removed together.
    """

    name: str
    """For instance ``layers.3.mlp``; the same with and without LoRA adapters."""
    kind: Kind
    size: int
    """Number of units."""
    members: tuple[Member, ...]
    protected: str | None = None
    """Why this group must not be cut, or None when it may be."""
    layer: int | None = None
    """Index of the decoder layer it belongs to; None for groups that span the model."""
    renormalised: tuple[str, ...] = ()
    """Reductions other than matrix products that run over the units (``mean`` of an RMS norm, ``softmax``, ``top-k``).
    Removing units of such a group is exact, but it is not the same as zeroing: removed units must be the reduction's
    neutral element, and a divisor must count the kept units."""
    on_request: bool = False
    """Protected only for its kind: a budget that names the kind (``DependencyGraph.opened``), or a plan that names the
    group, may cut it."""
    least: int = 1
    """Smallest number of units to keep: a router that chooses the best two needs two."""
    runs: int = 1
    """Number of runs of equal length, which must keep equal numbers of units (the groups of a group-limited router, the
    query heads of each KV head)."""
    fixed: tuple[tuple[int, str], ...] = ()
    """Units that must be kept, each with the reason, ascending."""
    modules: tuple[str, ...] = ()
    """Path of the module of each unit, for units that are whole modules (decoder layers). Such a group has no members,
    and all parameters in a module are removed with its unit."""
    within: str | None = None
    """Name of the group whose units contain these (query heads are parts of KV heads). One plan cuts only one of the
    two. Groups that are not within another share no rows."""

    @property
    def movable(self) -> list[int]:
        """The units that are not ``fixed``, ascending."""
        fixed = {unit for unit, _ in self.fixed}
        return [unit for unit in range(self.size) if unit not in fixed]

    def in_turn(self, order: Sequence[int]) -> list[int]:
        """``order``, with the first of each run first, then the second of each, and so on.

        Every prefix whose length is a multiple of ``runs`` has equal numbers of units of each run. So must ``order``.
        """
        length = self.size // self.runs
        by_run = [[unit for unit in order if unit // length == run] for run in range(self.runs)]
        return [unit for turn in zip(*by_run, strict=True) for unit in turn]


@dataclass(frozen=True)
class DependencyGraph:
    """All node groups of a model, in model order, with the shape of every parameter."""

    model_type: str
    groups: tuple[NodeGroup, ...]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    """Shape of every parameter by name; tied parameters appear once."""

    @cached_property
    def _by_name(self) -> dict[str, NodeGroup]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _by_parameter(self) -> dict[str, list[tuple[NodeGroup, Member]]]:
        table: dict[str, list[tuple[NodeGroup, Member]]] = {}
        for group in self.groups:
            for member in group.members:
                table.setdefault(member.parameter, []).append((group, member))
        return table

    @cached_property
    def unit_of(self) -> dict[str, tuple[str, int]]:
        """Parameter → its group and unit, for groups whose units are modules."""
        units = {path: (group.name, unit) for group in self.groups for unit, path in enumerate(group.modules)}
        found = {}
        for name in self.shapes if units else ():
            end = name.rfind(".")
            while end > 0 and name[:end] not in units:
                end = name.rfind(".", 0, end)
            if end > 0:
                found[name] = units[name[:end]]
        return found

    @cached_property
    def alike(self) -> dict[str, int]:
        """One of the parameters that lose the same with every unit → the number of such parameters."""
        alike: dict[object, list[str]] = {}
        for name, shape in self.shapes.items():
            owners = [(group.name, member.axis, member.rows_per_unit) for group, member in self.of_parameter(name)]
            alike.setdefault((shape, tuple(owners), self.unit_of.get(name)), []).append(name)
        return {names[0]: len(names) for names in alike.values()}

    def __getitem__(self, name: str) -> NodeGroup:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[NodeGroup]:
        return iter(self.groups)

    def of_parameter(self, parameter: str) -> list[tuple[NodeGroup, Member]]:
        """The groups that own an axis of ``parameter``, with their members."""
        return self._by_parameter.get(parameter, [])

    @property
    def prunable(self) -> tuple[NodeGroup, ...]:
        """The groups that may be cut."""
        return tuple(group for group in self.groups if group.protected is None)

    def opened(self, kinds: Iterable[Kind]) -> DependencyGraph:
        """The same graph, in which groups of these kinds are prunable if they are protected only for their kind."""
        wanted = set(kinds)
        return replace(
            self,
            groups=tuple(
                replace(group, protected=None) if group.on_request and group.kind in wanted else group
                for group in self.groups
            ),
        )

    def protected_as(self, other: DependencyGraph) -> DependencyGraph:
        """The same graph, in which every group may be cut, or not, as its namesake in ``other``."""
        groups = ((group, other[group.name]) for group in self.groups)
        return replace(
            self,
            groups=tuple(
                replace(group, protected=like.protected, on_request=like.on_request, fixed=like.fixed)
                for group, like in groups
            ),
        )

    def parameters_of(self, group: NodeGroup) -> list[str]:
        """The parameters that are cut or removed with units of ``group``."""
        if group.modules:
            return [name for name, (owner, _) in self.unit_of.items() if owner == group.name]
        return list(dict.fromkeys(member.parameter for member in group.members if member.parameter in self.shapes))

    def parameters_by_unit(self, group: NodeGroup) -> list[list[str]]:
        """The parameters in each unit of a group whose units are modules, in model order; empty for any other group."""
        units: list[list[str]] = [[] for _ in group.modules]
        for name in self.parameters_of(group) if group.modules else ():
            units[self.unit_of[name][1]].append(name)
        return units

    def check_kept(self, kept: Kept) -> None:
        """Raise PlanError unless every entry names a prunable group and legal units of it."""
        for name, units in kept.items():
            if name not in self:
                raise PlanError(f"The plan names the group {name}, which this {self.model_type} model does not have.")
            group, units = self[name], list(units)
            if not units or units != sorted(set(units)) or units[0] < 0 or units[-1] >= group.size:
                raise PlanError(
                    f"The plan's kept units of {name} must be ascending, without repeats, at least one, "
                    f"and below {group.size}."
                )
            if len(units) < group.size:
                _check_cut(group, set(units))
        cut = {name for name, units in kept.items() if len(units) < self[name].size}
        for name in sorted(cut):
            if self[name].within in cut:
                raise PlanError(
                    f"The plan cuts {self[name].within} and {name}, whose units are parts of the units of the former. "
                    "Cut one of the two, and the other in a second run on the result."
                )

    def parameter_count(self, kept: Kept | None = None) -> int:
        """Parameters of the model, or after a cut to ``kept`` (exact, by shapes)."""
        return sum(many * self.numel(name, kept or {}) for name, many in self.alike.items())

    def numel(self, parameter: str, kept: Kept) -> int:
        """Elements of ``parameter`` after a cut to ``kept``. Only the lengths matter, except for whole modules."""
        owner, unit = self.unit_of.get(parameter, ("", 0))
        if owner in kept and unit not in kept[owner]:
            return 0
        shape = list(self.shapes[parameter])
        for group, member in self.of_parameter(parameter):
            if group.name in kept:
                shape[member.axis] -= (group.size - len(kept[group.name])) * member.rows_per_unit
        count = 1
        for size in shape:
            count *= size
        return count

    def unit_cost(self, group: NodeGroup) -> int:
        """Parameters removed with one unit of ``group`` when everything else is whole; the mean over the units if these
        are modules."""
        if group.modules:
            return sum(math.prod(self.shapes[name]) for name in self.parameters_of(group)) // group.size
        members = [member for member in group.members if member.parameter in self.shapes]
        return sum(member.elements_per_unit(self.shapes[member.parameter]) for member in members)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the groups and their places (parameters, their shapes, axis, rows of a unit). A plan fits models with
        the same fingerprint.

        Adapters do not change it: they are left out, and wrapped modules have their own names. Whole layers, and groups
        within another, are left out as well: the other groups identify the model.
        """
        facts = [
            (group.name, group.kind, group.size, self._places(group))
            for group in self.groups
            if not group.modules and group.within is None
        ]
        return hashlib.sha256(json.dumps([self.model_type, facts]).encode()).hexdigest()[:16]

    def _places(self, group: NodeGroup) -> list[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape, axis and rows of a unit of every parameter of the model that the group lives on, sorted."""
        rows: dict[tuple[str, tuple[int, ...], int], int] = {}
        for member in group.members:
            if ".lora_" not in member.parameter:
                path = member.parameter.removeprefix("base_model.model.").split(".")
                name = ".".join(part for part in path if part != "base_layer")  # experts are wrapped several times
                place = (name, tuple(self.shapes.get(member.parameter, ())), member.axis)
                rows[place] = rows.get(place, 0) + member.rows_per_unit
        return sorted((*place, count) for place, count in rows.items())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able picture of the graph (written to ``graph.json``)."""
        return {
            "model_type": self.model_type,
            "fingerprint": self.fingerprint,
            "parameters": self.parameter_count(),
            "groups": [asdict(group) for group in self.groups],
        }


def _check_cut(group: NodeGroup, stays: set[int]) -> None:
    """Raise PlanError unless ``group`` may be cut down to the units ``stays``."""
    if group.protected is not None and not group.on_request:
        raise PlanError(f"The plan cuts {group.name}, which is protected: {group.protected}.")
    for unit, reason in group.fixed:
        if unit not in stays:
            raise PlanError(f"The plan removes unit {unit} of {group.name}, which must be kept: {reason}.")
    if len(stays) < group.least:
        raise PlanError(f"The plan keeps {len(stays)} units of {group.name}, which needs at least {group.least}.")
    if group.runs == 1:
        return
    length = group.size // group.runs
    counts = {sum(unit // length == run for unit in stays) for run in range(group.runs)}
    if len(counts) > 1:
        raise PlanError(
            f"The plan must keep equally many units of {group.name} in each of its {group.runs} runs of {length}; "
            f"it keeps from {min(counts)} to {max(counts)}."
        )


@dataclass(frozen=True)
class Scores:
    """One number per unit of each group; higher = keep, always."""

    values: Mapping[str, torch.Tensor]
    """Group name → float tensor of shape ``[group.size]``, finite, on the CPU."""
    of_loss: bool = False
    """Whether a score estimates a change of the loss. Scores of different groups can then be compared after division by
    the parameters removed with a unit."""
    on_one_scale: bool = False
    """Whether scores of different groups can be compared without scaling."""
    reach: float | None = None
    """For scores that are an order of removal (``planning.order``): the ratio at which the order ends. None for all
    others."""

    def __post_init__(self) -> None:
        for name, score in self.values.items():
            if score.dim() != 1:
                raise PlanError(f"Scores of {name} must be one number per unit; got shape {tuple(score.shape)}.")
            broken = int((~torch.isfinite(score)).sum())
            if broken:
                raise PlanError(
                    f"{broken} of the {len(score)} scores of {name} are not finite: the model's weights, or its loss "
                    "on this text, are not. Compute in fp32 (calibration.precision, training.precision), or correct "
                    "the model."
                )

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def save(self, path: Path) -> None:
        """Write them as safetensors, with their scale as metadata."""
        facts = {"of_loss": self.of_loss, "on_one_scale": self.on_one_scale, "reach": self.reach}
        scale = {name: json.dumps(fact) for name, fact in facts.items()}
        save_file({name: score.contiguous() for name, score in self.values.items()}, path, metadata=scale)

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read the file of ``save``; raises SafetensorError or OSError when it is damaged."""
        with safe_open(path, framework="pt") as file:
            scale = file.metadata() or {}
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        reach = json.loads(scale.get("reach", "null"))
        return cls(values, scale.get("of_loss") == "true", scale.get("on_one_scale") == "true", reach)


class PruningPlan(BaseModel):
    """The kept units of each group. It is small, printable JSON, which can be edited by hand and applied again."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    format: Literal[1] = 1
    base_model: str = ""
    """Folder, hub id or built-in name of the model that the plan was made for."""
    revision: str | None = None
    fingerprint: str
    """``DependencyGraph.fingerprint`` of that model."""
    method: str
    ratio_asked: float = Field(ge=0, lt=1)
    """Fraction of all parameters to remove; 0 for a plan that removes nothing."""
    ratio_reached: float = Field(ge=0, lt=1)
    parameters_before: int = Field(ge=1)
    parameters_after: int = Field(ge=1)
    seed: int = 0
    versions: dict[str, str] = {}
    sizes: dict[str, int] = {}
    """Group name → units before the cut, for every group in ``kept``."""
    kept: dict[str, list[StrictInt]] = {}
    """Group name → indices of kept units, ascending; a group that is not listed is kept whole."""

    @model_validator(mode="after")
    def _gets_smaller(self) -> PruningPlan:
        if self.parameters_after > self.parameters_before:
            raise ValueError(
                f"parameters_after ({self.parameters_after:,}) is above parameters_before ({self.parameters_before:,})"
            )
        return self

    def removed(self, name: str) -> list[int]:
        """Indices of the removed units of group ``name``, ascending."""
        if name not in self.kept:
            return []
        keep = set(self.kept[name])
        return [unit for unit in range(self.sizes[name]) if unit not in keep]

    def check(self, graph: DependencyGraph) -> None:
        """Raise PlanError unless the plan was made for a model with this graph and every entry is legal."""
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"The plan was made for another model ({self.base_model or 'unnamed'}, fingerprint "
                f"{self.fingerprint}); this {graph.model_type} model has fingerprint {graph.fingerprint}. Apply it to "
                "the model that it names."
            )
        for name in self.kept:
            if name in graph and self.sizes.get(name) != graph[name].size:
                raise PlanError(
                    f"The plan says {self.sizes.get(name)} units of {name}; this model has {graph[name].size}."
                )
        graph.check_kept(self.kept)

    def to_text(self) -> str:
        """The content of a plan.json."""
        return self.model_dump_json(indent=1) + "\n"

    def save(self, path: Path) -> None:
        path.write_text(self.to_text())

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Read a plan; raises PlanError when the file is missing or not a plan."""
        advice = "Give the path of a plan.json."
        file = path_of(path, "The plan", PlanError)
        try:
            return cls.model_validate(read_json(file, error=PlanError, advice=advice), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            reason = shortened(first["msg"].removeprefix("Value error, "), 300)
            raise PlanError(f"{file} is not a pruning plan: {where}: {reason}. {advice}") from error


def _units_of(graph: DependencyGraph, name: str, units: Iterable[int]) -> set[int]:
    """Indices of units of the group ``name``. Raises PlanError for units that it does not have."""
    if name not in graph:
        raise PlanError(
            f"Units of {shortened(str(name))} are to be removed, and this {graph.model_type} model has none."
        )
    size = graph[name].size
    try:
        found = set(map(operator.index, units))
    except TypeError as error:
        raise PlanError(
            f"Units of {name} are to be removed that are no list of whole numbers: {brief(units)}."
        ) from error
    wrong = sorted(unit for unit in found if not 0 <= unit < size)
    if wrong:
        raise PlanError(f"Unit {wrong[0]} of {name} is to be removed, and its units are numbered from 0 to {size - 1}.")
    return found


class Cut(Mapping[str, tuple[int, ...]]):
    """The kept and removed units of a model's groups. Frozen; made by ``keeping`` or ``removing``.

    As a mapping it is the ``kept`` of a plan: group name → kept units, ascending. Groups that are kept whole are left
    out.
    """

    def __init__(self, graph: DependencyGraph, kept: Mapping[str, tuple[int, ...]]) -> None:
        self.graph = graph
        self._kept = dict(kept)

    @classmethod
    def keeping(cls, graph: DependencyGraph, kept: Mapping[str, Iterable[int]]) -> Cut:
        """A cut by its kept units. Groups not in ``kept`` are kept whole. A ``Cut`` of ``graph`` is returned
        unchanged."""
        if isinstance(kept, Cut) and kept.graph is graph:
            return kept
        named = {name: tuple(sorted(set(units))) for name, units in kept.items() if name in graph}
        return cls(graph, {name: units for name, units in named.items() if len(units) < graph[name].size})

    @classmethod
    def removing(cls, graph: DependencyGraph, removed: Mapping[str, Iterable[int]]) -> Cut:
        """A cut by its removed units. Raises PlanError for a group or a unit that ``graph`` does not have."""
        gone = {name: _units_of(graph, name, units) for name, units in removed.items()}
        sizes = {name: range(graph[name].size) for name, units in gone.items() if units}
        return cls(
            graph, {name: tuple(unit for unit in size if unit not in gone[name]) for name, size in sizes.items()}
        )

    @cached_property
    def groups(self) -> tuple[tuple[NodeGroup, list[int]], ...]:
        """The groups that lose units, with the indices of these units, in model order."""
        found = []
        for group in self.graph:
            if group.name in self._kept:
                stays = set(self._kept[group.name])
                found.append((group, [unit for unit in range(group.size) if unit not in stays]))
        return tuple(found)

    @property
    def removed(self) -> dict[str, list[int]]:
        """Group name → units that are removed, ascending."""
        return {group.name: list(units) for group, units in self.groups}

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
