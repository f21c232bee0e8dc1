"""From atoms to node groups: which leaves own rows of parameters, what they are, and how they are called."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from secateur.graph.axes import Atom, Axis, leaves, resolve, size_of
from secateur.graph.places import Place, Places, common
from secateur.graph.symbols import SymbolTable
from secateur.types import DependencyGraph, Kind, Member, NodeGroup, Role

RENORMALISING = (
    "mean",
    "layer norm",
    "group norm",
    "variance",
    "vector norm",
    "softmax",
    "logsumexp",
    "top-k",
    "max",
    "sum",
    "cumulative sum",
    "cumulative product",
    "product",
    "sort",
)
"""Marks of reductions that have to be told which units are gone."""

_OPEN: tuple[Kind, ...] = ("ffn", "attention")
"""Kinds that may be cut unless something speaks against it."""


@dataclass
class Candidate:
    """A leaf that owns rows of parameters."""

    atom: Atom
    members: list[Member] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    @property
    def layers(self) -> list[int | None]:
        return sorted({place.layer for place in self.places}, key=lambda layer: -1 if layer is None else layer)

    @property
    def roles(self) -> set[str]:
        return {member.role for member in self.members}

    @property
    def axes(self) -> set[tuple[str, int]]:
        return {(member.parameter, member.axis) for member in self.members}

    @property
    def rows(self) -> int:
        return sum(member.rows_per_unit for member in self.members) * self.atom.size


def find_groups(model: nn.Module, table: SymbolTable) -> DependencyGraph:
    """The dependency graph of ``model``, from the symbols that a recorded run left in ``table``."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    places = Places(model)
    candidates = _candidates(table, places, list(shapes))
    kinds = _kinds(candidates)
    unused = _unused_modules(table, places, list(shapes))
    chosen = [candidate for candidate in candidates if id(candidate.atom) in kinds]
    names = _names(chosen, kinds)
    groups = tuple(
        _group(candidate, kinds[id(candidate.atom)], name, unused)
        for candidate, name in zip(chosen, names, strict=True)
    )
    config = getattr(model, "config", None)
    return DependencyGraph(getattr(config, "model_type", type(model).__name__), groups, shapes)


# --- members --------------------------------------------------------------------------------------------------------


def occurrences(axis: Axis) -> Iterator[tuple[Atom, list[int], int]]:
    """Every leaf below ``axis`` with where it lies: unit ``u`` has the rows ``start + u * width + (0 .. width - 1)``
    for each of the starts."""
    yield from _visit(axis, [0], 1)


def _visit(axis: Axis, starts: list[int], width: int) -> Iterator[tuple[Atom, list[int], int]]:
    atoms = resolve(axis)
    total = size_of(atoms) * width
    for atom in reversed(atoms):
        block = width * atom.size
        inside = [start + outer for start in starts for outer in range(0, total, block)]
        if atom.pieces is None:
            yield atom, inside, width
        else:
            offset = 0
            for piece in atom.pieces:
                yield from _visit(piece, [start + offset for start in inside], width)
                offset += size_of(piece) * width
        width = block


def _candidates(table: SymbolTable, places: Places, order: Sequence[str]) -> list[Candidate]:
    """Leaves with members, in the order of the parameters; leaves that only adapters have (ranks) are left out."""
    found: dict[int, Candidate] = {}
    names = [name for name in order if name in table.used] + [name for name in table.used if name not in set(order)]
    for name in names:
        place = places[name]
        for number, axis in enumerate(table.used[name].axes):
            starts: dict[tuple[int, int], list[int]] = defaultdict(list)
            for atom, inside, width in occurrences(axis):
                starts[id(atom), width] += inside
                found.setdefault(id(atom), Candidate(atom))
            consumed = {id(atom) for part in table.contracted.get((name, number), ()) for atom in leaves(part)}
            for (key, width), offsets in starts.items():
                role: Role = "in" if key in consumed else "out"
                found[key].members.append(Member(name, number, role, tuple(sorted(offsets)), width, width))
                found[key].places.append(place)
    return [
        candidate for candidate in found.values() if candidate.places and not all(p.adapter for p in candidate.places)
    ]


def _unused_modules(table: SymbolTable, places: Places, order: Sequence[str]) -> Mapping[tuple[str, ...], str]:
    """Modules with a parameter that the run did not use, so that nothing is known about its axes."""
    return {places[name].module: name for name in order if name not in table.used}


# --- kinds ----------------------------------------------------------------------------------------------------------


def _kinds(candidates: Sequence[Candidate]) -> dict[int, Kind]:
    """The kind of every candidate that is a group, by the ``id`` of its atom."""
    kinds: dict[int, Kind] = {}
    for candidate in candidates:
        kind = _own_kind(candidate)
        if kind is not None:
            kinds[id(candidate.atom)] = kind
    heads = [candidate for candidate in candidates if kinds.get(id(candidate.atom)) == "attention"]
    for candidate in candidates:
        kind = kinds.get(id(candidate.atom))
        rivals = [head for head in heads if head is not candidate and head.axes & candidate.axes]
        if kind == "attention" and any(_outranks(rival, candidate) for rival in rivals):
            del kinds[id(candidate.atom)]  # query heads within a KV head
        elif kind in ("ffn", "state", "hidden") and rivals:
            del kinds[id(candidate.atom)]  # dimensions within a head
    return kinds


def _outranks(head: Candidate, other: Candidate) -> bool:
    """Of two atoms of the same rows, the head is the one that more rows belong to: a KV head owns its query heads."""
    return (head.rows, -head.atom.serial) > (other.rows, -other.atom.serial)


def _own_kind(candidate: Candidate) -> Kind | None:
    atom, both = candidate.atom, candidate.roles == {"in", "out"}
    if "vocab" in atom.marks:
        return "vocab"
    if "hidden" in atom.marks:
        return "hidden"
    if "top-k" in atom.marks:
        return "expert"
    if not both:
        return "ffn" if _without_rule(atom) and len(candidate.layers) == 1 else None
    if "head" in atom.marks:
        return "attention"
    if len(candidate.layers) > 1 and "nonlinear" not in atom.marks:
        return "hidden"
    if "depthwise convolution" in atom.marks:
        return "state"
    return "ffn" if "nonlinear" in atom.marks or _without_rule(atom) else None


def _without_rule(atom: Atom) -> bool:
    """Whether an operator that is not understood has touched this place, so that its other half may be unknown."""
    return any("has no rule" in reason or reason.startswith("conflicting") for reason in atom.refusals)


# --- names and protection -------------------------------------------------------------------------------------------


def _names(candidates: Sequence[Candidate], kinds: Mapping[int, Kind]) -> list[str]:
    """A unique, stable name for each group, from where its members live."""
    plain = [_name(candidate, kinds[id(candidate.atom)]) for candidate in candidates]
    twice = {name for name, times in Counter(plain).items() if times > 1}
    longer = [
        ".".join((name, *_home(candidate)[:1])) if name in twice else name
        for candidate, name in zip(candidates, plain, strict=True)
    ]
    again, seen = Counter(longer), Counter[str]()
    names = []
    for name in longer:
        seen[name] += 1
        names.append(f"{name}.{seen[name]}" if again[name] > 1 and seen[name] > 1 else name)
    return names


def _home(candidate: Candidate) -> tuple[str, ...]:
    """The module below the decoder layer that holds all members; a single module is its own home."""
    own = [place.within for place in candidate.places if not place.adapter]
    return common(own)


def _name(candidate: Candidate, kind: Kind) -> str:
    if kind in ("hidden", "vocab"):
        return kind
    home = _home(candidate)
    what = {"ffn": "mlp", "expert": "experts"}.get(kind, kind)
    layer = candidate.layers[0]
    if len(candidate.layers) > 1:
        return what
    if layer is None:
        return ".".join((*home, what))
    return ".".join(("layers", str(layer), what, *(home[1:] if kind == "ffn" else ())))


def _group(candidate: Candidate, kind: Kind, name: str, unused: Mapping[tuple[str, ...], str]) -> NodeGroup:
    layers = candidate.layers
    return NodeGroup(
        name=name,
        kind=kind,
        size=candidate.atom.size,
        members=tuple(candidate.members),
        protected=_protection(candidate, kind, unused),
        layer=layers[0] if len(layers) == 1 else None,
        renormalised=tuple(what for what in RENORMALISING if what in candidate.atom.marks),
    )


def _protection(candidate: Candidate, kind: Kind, unused: Mapping[tuple[str, ...], str]) -> str | None:
    """Why the group must not be cut, the hardest reason first; None when it may be."""
    for reason in candidate.atom.refusals:
        return reason
    for place in candidate.places:
        if place.module in unused:
            return f"the parameter {unused[place.module]} was not used in the recorded pass"
    if kind not in _OPEN:
        return f"protected by default: {kind}"
    if len(candidate.layers) > 1 or candidate.layers == [None]:
        return "it is shared between layers" if len(candidate.layers) > 1 else "it lies outside of the decoder layers"
    return None
