"""How many experts a router must find: the best k are chosen, perhaps within the best groups of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from secateur.graph.axes import Atom, leaves, resolve, size_of
from secateur.graph.queries import of_pairs
from secateur.graph.symbols import Call, SymbolTable
from secateur.types import Member, NodeGroup

Choice = tuple[list[Atom], int]
"""The atoms that an axis is made of, and how many of its units are chosen."""


def with_legal_choices(
    groups: Sequence[NodeGroup], atoms: Sequence[Atom], table: SymbolTable, calls: Sequence[Call]
) -> list[NodeGroup]:
    """The groups of experts with the fewest experts that their routers can do with.

    ``atoms`` are the leaves of the groups. Where a router first chooses among groups of experts (DeepSeek-V3), the
    experts' axis is ``groups x experts of a group``, and the leaf that was found is one of the two: its group becomes
    one of all experts, that keeps equally many in each run.
    """
    choices = _choices(table, calls)
    return [
        _limited(group, atom, choices) if group.kind == "expert" else group
        for group, atom in zip(groups, atoms, strict=True)
    ]


def _choices(table: SymbolTable, calls: Sequence[Call]) -> list[Choice]:
    found: list[Choice] = []
    winners: list[list[Atom]] = []
    for call in calls:
        if call.name == "aten.topk":
            x = call["self"]
            axis = table[x].axes[call["dim"] % x.dim()]
            found.append((list(resolve(axis)), int(call["k"])))
        elif call.name == "aten.max" and len(call.outputs) == 2:  # one winner at a time (Phi-3.5-MoE)
            x = call["self"]
            winners.append(list(resolve(table[x].axes[call["dim"] % x.dim()])))
    return found + [(atoms, winners.count(atoms)) for atoms in winners]


def _limited(group: NodeGroup, atom: Atom, choices: Sequence[Choice]) -> NodeGroup:
    of_all = max((k for atoms, k in choices if atoms == [atom]), default=1)
    products = [atoms for atoms, _ in choices if len(atoms) > 1 and atom in set(leaves(tuple(atoms)))]
    if not products:
        return replace(group, least=min(of_all, group.size))
    whole = products[0]
    members = [_unrolled(member, atom, *whole) if len(whole) == 2 else None for member in group.members]
    if None in members:
        reason = "its router groups the experts in a way that is not known here"
        return replace(group, protected=group.protected if not group.on_request else reason, on_request=False)
    outer, inner = whole
    chosen = {
        name: max((k for atoms, k in choices if atoms == wanted), default=1)
        for name, wanted in (("all", whole), ("runs", [outer]), ("within", [inner]))
    }
    in_a_run = max(chosen["within"], -(-chosen["all"] // chosen["runs"]))
    return replace(
        group,
        size=size_of(tuple(whole)),
        members=tuple(member for member in members if member is not None),
        least=in_a_run * outer.size,
        runs=outer.size,
    )


def _unrolled(member: Member, atom: Atom, outer: Atom, inner: Atom) -> Member | None:
    """The rows of single experts, where those of ``atom`` are known: one of the factors of ``outer x inner``.

    None when the experts do not lie next to each other.
    """
    if atom is outer:
        width = member.width // inner.size
        return replace(member, stride=width, width=width) if width * inner.size == member.width else None
    pairs = of_pairs(member, outer.size, inner.size)
    return pairs if pairs is not None and not pairs.gap else None
