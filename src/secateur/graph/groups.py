"""From atoms to node groups: leaves that own rows of parameters, their kinds, and their names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from secateur.graph.axes import Atom, Axis, leaves, resolve, size_of
from secateur.graph.blocks import Span, find_blocks
from secateur.graph.places import Place, Places, common
from secateur.graph.queries import within_heads
from secateur.graph.routers import with_legal_choices
from secateur.graph.symbols import Call, SymbolTable
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
)
"""Marks of reductions that must know the removed units."""

_OPEN: tuple[Kind, ...] = ("ffn", "attention")
"""Kinds that may be cut by default."""

_WHAT: Mapping[Kind, str] = {"ffn": "mlp", "expert": "experts"}
"""Names of kinds in the names of groups, where they differ from the kind."""


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

    def overlaps(self, other: Candidate) -> bool:
        """Whether both own some row of some parameter, as the factors of a product do."""
        mine, theirs = self._intervals(), other._intervals()
        return any(
            start < other_stop and other_start < stop
            for axis in mine.keys() & theirs.keys()
            for start, stop in mine[axis]
            for other_start, other_stop in theirs[axis]
        )

    def _intervals(self) -> dict[tuple[str, int], list[tuple[int, int]]]:
        """The rows it owns on each axis of each parameter; the rows of all units from one start lie together."""
        spans: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
        for member in self.members:
            length = self.atom.size * member.width
            spans[member.parameter, member.axis] += [(start, start + length) for start in member.offsets]
        return spans


def find_groups(
    model: nn.Module, table: SymbolTable, calls: Sequence[Call], spans: Sequence[Span]
) -> tuple[DependencyGraph, dict[str, Axis]]:
    """The graph of ``model`` from the symbols of a recorded run in ``table``, and by group name the leaf of its units;
    for query heads, the leaf of the KV heads and the leaf within.

    Layers, and experts in groups, have no leaf.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    places = Places(model, table.used)
    candidates = _candidates(table, places, list(shapes))
    kinds = _kinds(candidates, shapes)
    unused = _unused_modules(table, places, list(shapes))
    norms = _norms(model, places)
    chosen = [candidate for candidate in candidates if id(candidate.atom) in kinds]
    names = _names(chosen, kinds)
    groups = [
        _group(candidate, kinds[id(candidate.atom)], name, unused, norms)
        for candidate, name in zip(chosen, names, strict=True)
    ]
    groups = with_legal_choices(groups, [candidate.atom for candidate in chosen], table, calls)
    units: dict[str, Axis] = {
        group.name: (candidate.atom,) for candidate, group in zip(chosen, groups, strict=True) if group.runs == 1
    }
    groups = [replace(group, fixed=_special_tokens(model)) if group.kind == "vocab" else group for group in groups]
    unread = [name for name in shapes if name not in table.used]
    groups = [_unless_unread(group, unread, shapes) if group.kind == "hidden" else group for group in groups]
    groups = _with_query_heads(groups, chosen, candidates, unused, norms, units)
    layers = find_blocks(model, table, places, calls, spans)
    if layers is not None:
        groups.append(layers)
    config = getattr(model, "config", None)
    graph = DependencyGraph(getattr(config, "model_type", type(model).__name__), tuple(groups), shapes)
    return graph, units


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
    """Modules with a parameter that the run did not use. Its axes are therefore unknown."""
    return {places[name].module: name for name in order if name not in table.used}


# --- kinds ----------------------------------------------------------------------------------------------------------


def _kinds(candidates: Sequence[Candidate], shapes: Mapping[str, tuple[int, ...]]) -> dict[int, Kind]:
    """The kind of every candidate that is a group, by the ``id`` of its atom."""
    kinds: dict[int, Kind] = {}
    for candidate in candidates:
        kind = _own_kind(candidate, shapes)
        if kind is not None:
            kinds[id(candidate.atom)] = kind
    by_axis: dict[tuple[str, int], list[Candidate]] = defaultdict(list)
    for candidate in sorted(candidates, key=lambda candidate: _rank(candidate, kinds.get(id(candidate.atom)))):
        if id(candidate.atom) not in kinds:
            continue
        if any(candidate.overlaps(rival) for axis in candidate.axes for rival in by_axis[axis]):
            del kinds[id(candidate.atom)]
            continue
        for axis in candidate.axes:
            by_axis[axis].append(candidate)
    return kinds


def _rank(candidate: Candidate, kind: Kind | None) -> tuple[int, int, int, int]:
    """Who owns rows that are a product of several atoms.

    Heads before the dimensions within them; a KV head, which more rows belong to, before its query heads; of the rest
    the finer.
    """
    order = ("vocab", "hidden", "expert", "attention", "state", "ffn")
    if "hidden" in candidate.atom.marks or kind != "hidden":
        first = order.index(kind) if kind in order else len(order)
    else:
        first = len(order)
    rows = candidate.rows if "head" in candidate.atom.marks else 0
    return (first, -rows, -candidate.atom.size, candidate.atom.serial)


def _own_kind(candidate: Candidate, shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    atom, both = candidate.atom, candidate.roles == {"in", "out"}
    if "vocab" in atom.marks:
        return "vocab"
    if "hidden" in atom.marks:
        return "hidden"
    if "top-k" in atom.marks or {"winner", "looked up"} <= atom.marks:
        return "expert" if not atom.refusals or _covers_its_axes(candidate, shapes) else None
    if not both:
        severed = "severed" in atom.marks and len(candidate.layers) == 1 and candidate.layers != [None]
        return "ffn" if severed else None
    if "depthwise convolution" in atom.marks:
        return "state"
    if "head" in atom.marks:
        return "attention"
    if len(candidate.layers) > 1 and "nonlinear" not in atom.marks:
        return "hidden"
    return "ffn" if atom.marks & {"nonlinear", "severed"} else None


def _covers_its_axes(candidate: Candidate, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the units make up whole axes: a loop over the experts that were hit leaves fragments behind."""
    rows: Counter[tuple[str, int]] = Counter()
    for member in candidate.members:
        rows[member.parameter, member.axis] += member.rows_per_unit * candidate.atom.size
    return all(count == shapes[name][axis] for (name, axis), count in rows.items() if name in shapes)


# --- names and protection -------------------------------------------------------------------------------------------


def _names(candidates: Sequence[Candidate], kinds: Mapping[int, Kind]) -> list[str]:
    """A unique, stable name for each group, from where its members live."""
    plain = [_name(candidate, kinds[id(candidate.atom)]) for candidate in candidates]
    twice = {name for name, times in Counter(plain).items() if times > 1}
    longer = [
        _longer_name(candidate, kinds[id(candidate.atom)]) if name in twice else name
        for candidate, name in zip(candidates, plain, strict=True)
    ]
    again, seen = Counter(longer), Counter[str]()
    names = []
    for name in longer:
        seen[name] += 1
        names.append(f"{name}.{seen[name]}" if again[name] > 1 and seen[name] > 1 else name)
    return names


def _longer_name(candidate: Candidate, kind: Kind) -> str:
    """A name that says in which module of its layer the group is, for layers with several groups of one kind."""
    home, layer = _home(candidate), candidate.layers[0]
    what = _WHAT.get(kind, kind)
    if layer is None or len(candidate.layers) > 1:
        return _name(candidate, kind)
    return ".".join(("layers", str(layer), what, *(home[1:] if home[:1] == (what,) else home)))


def _home(candidate: Candidate) -> tuple[str, ...]:
    """The module below the decoder layer that holds all members; a single module is its own home."""
    own = [place.within for place in candidate.places if not place.adapter]
    return common(own)


def _name(candidate: Candidate, kind: Kind) -> str:
    if kind in ("hidden", "vocab"):
        return kind
    home = _home(candidate)
    severed = candidate.roles != {"in", "out"}
    what = _WHAT.get(kind, kind)
    layer = candidate.layers[0]
    if len(candidate.layers) > 1:
        return what
    if layer is None:
        return ".".join((*home, what))
    if kind == "ffn" and severed:  # not known to be a feed-forward layer: the module says where it is
        return ".".join(("layers", str(layer), *home))
    return ".".join(("layers", str(layer), what, *(home[1:] if kind == "ffn" else ())))


def _special_tokens(model: nn.Module) -> tuple[tuple[int, str], ...]:
    """Ids of tokens that the config, or the generation config, has a use for, each with that use."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[int, str] = {}
    for part in (config, text, getattr(model, "generation_config", None)):
        for name, value in vars(part).items() if part is not None else ():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                for token in value if isinstance(value, list | tuple) else (value,):
                    found.setdefault(int(token), f"it is the {name} of the config")
    vocabulary = getattr(text, "vocab_size", 0) or 0
    return tuple(sorted((token, use) for token, use in found.items() if 0 <= token < vocabulary))


def _norms(model: nn.Module, places: Places) -> set[tuple[str, ...]]:
    """The modules that are norms, by their names as elsewhere in transformers."""
    return {
        places[f"{path}.{name}"].module
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }


def _group(
    candidate: Candidate,
    kind: Kind,
    name: str,
    unused: Mapping[tuple[str, ...], str],
    norms: Container[tuple[str, ...]],
) -> NodeGroup:
    layers = candidate.layers
    reason = _protection(candidate, kind, unused) or _statistics(candidate, kind, norms)
    return NodeGroup(
        name=name,
        kind=kind,
        size=candidate.atom.size,
        members=tuple(candidate.members),
        protected=reason or (None if kind in _OPEN else f"protected by default: {kind}"),
        on_request=reason is None and kind not in _OPEN,
        layer=layers[0] if len(layers) == 1 else None,
        renormalised=tuple(what for what in RENORMALISING if what in candidate.atom.marks),
    )


def _protection(candidate: Candidate, kind: Kind, unused: Mapping[tuple[str, ...], str]) -> str | None:
    """Why the group must not be cut, the hardest reason first; None when it may be, if only on request."""
    for reason in candidate.atom.refusals:
        return reason
    for place in candidate.places:
        if place.module in unused:
            return f"the parameter {unused[place.module]} was not used in the recorded pass"
    if kind in ("hidden", "vocab"):
        return None
    if len(candidate.layers) > 1 or candidate.layers == [None]:
        return "it is shared between layers" if len(candidate.layers) > 1 else "it lies outside of the decoder layers"
    return None


def _unless_unread(group: NodeGroup, unread: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> NodeGroup:
    """The hidden width ``group``, protected when a parameter that the run did not use may have that width as well.

    So it is with what turns pictures or sounds into hidden states: text alone does not run it.
    """
    name = next((name for name in unread if any(size % group.size == 0 for size in shapes[name])), None)
    if name is None or not group.on_request:
        return group
    return replace(group, protected=f"the parameter {name} was not used in the recorded pass", on_request=False)


def _statistics(candidate: Candidate, kind: Kind, norms: Container[tuple[str, ...]]) -> str | None:
    """Reductions over units other than products are understood in norms, which can be told who survives."""
    taken = [what for what in RENORMALISING if what in candidate.atom.marks]
    understood = any(place.module in norms for place in candidate.places)
    if kind not in (*_OPEN, "query") or not taken or understood:
        return None
    return f"a {taken[0]} runs over its units outside of a norm"


# --- query heads ----------------------------------------------------------------------------------------------------


def _with_query_heads(
    groups: Sequence[NodeGroup],
    chosen: Sequence[Candidate],
    candidates: Sequence[Candidate],
    unused: Mapping[tuple[str, ...], str],
    norms: Container[tuple[str, ...]],
    units: dict[str, Axis],
) -> list[NodeGroup]:
    """``groups``, and after each of KV heads those of the query heads within them; ``units`` learns of them.

    The query heads of a KV head are a leaf as well, that lost against the KV heads' (``_kinds``). Together the two are
    the query heads of the layer, of which every KV head must keep equally many.
    """
    taken = {id(candidate.atom) for candidate in chosen}
    inner = [
        candidate
        for candidate in candidates
        if id(candidate.atom) not in taken and "head" in candidate.atom.marks and candidate.roles == {"in", "out"}
    ]
    result: list[NodeGroup] = []
    for head, group in zip(chosen, groups, strict=True):
        result.append(group)
        for query in inner if group.kind == "attention" else ():
            members = (
                within_heads(query.members, head.members, head.atom.size, query.atom.size)
                if query.axes <= head.axes
                else None
            )
            if members is not None:
                found = _query_group(group, head, query, members, unused, norms)
                units[found.name] = (head.atom, query.atom)
                result.append(found)
    return result


def _query_group(
    group: NodeGroup,
    head: Candidate,
    query: Candidate,
    members: Sequence[Member],
    unused: Mapping[tuple[str, ...], str],
    norms: Container[tuple[str, ...]],
) -> NodeGroup:
    """The query heads ``query`` of a layer, which lie in the KV heads ``head`` of ``group``.

    They may be cut where the KV heads are shared between layers, but not where something speaks against cutting these.
    """
    own = _group(query, "query", "", unused, norms)
    refusals = [*query.atom.refusals, *head.atom.refusals]
    alone = own.layer is not None and own.layer != group.layer  # several layers attend to the same KV heads
    return replace(
        own,
        name=f"layers.{own.layer}.attention.query" if alone else f"{group.name}.query",
        size=head.atom.size * query.atom.size,
        members=tuple(members),
        protected=refusals[0] if refusals else own.protected,
        on_request=own.on_request and not refusals,
        least=head.atom.size,
        runs=head.atom.size,
        within=group.name,
    )
