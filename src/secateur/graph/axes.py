"""The algebra of symbolic axes: the parts of a tensor's dimensions, and the relations between them.

An **atom** is a piece of some dimension: it has a size, and represents that many *units*, each kept or removed whole.
An **axis** (one dimension of one tensor) is a tuple of atoms, read as a row-major product; a dimension of size 1 is the
empty tuple. While a model runs, the rule of every operator derives the axes of its output from those of its inputs, and
relates their atoms:

>>> rows = leaf(12)                        # rows of a query projection; nothing is known about them
>>> heads, head_dim = split_axis(rows, 4)  # `view(..., 3, 4)`: the rows are 3 heads of 4
>>> unify(heads, leaf(3))                  # attention multiplies them with something else that has 3 of the same
>>> resolve(rows) == resolve(heads) + resolve(head_dim)
True

An atom starts as a *leaf*. It may later be **bound** in place to a *product* (it was a view of several axes), to a
*concatenation* (a slice cut it: this is how a fused ``gate_up`` comes apart), or to another atom (they were added).
Because bindings are made in place, a late binding is valid everywhere, also for earlier tensors.

Five primitives carry every operator that moves elements around:

* ``resolve``     flattens products: the atoms of an axis as they are known now;
* ``split_axis``  peels an inner axis of a given size off the right of a product, factoring atoms where it must;
* ``factor``      turns one atom into ``outer x inner``; a concatenation is factored piece by piece;
* ``cut``         divides an axis at a position into left and right, which makes a concatenation of a leaf;
* ``unify``       says that two axes are the same; the larger atoms are factored until they match.

Two shapes without a common refinement (12 as 4 x 3 and as 3 x 4, both with meaning) raise ``Conflict``: the caller then
*refuses* the axes. Refusing never has to undo anything: earlier bindings only add dependencies, or make units finer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import count, pairwise

Axis = tuple["Atom", ...]


class Conflict(Exception):  # noqa: N818
    """Two readings of the same elements that have no common refinement."""


class Atom:
    """A node of the union-find forest; use the functions of this module rather than its attributes.

    At most one of ``link`` (same as another atom), ``factors`` (a product) and ``pieces`` (a concatenation) is set.
    ``refusals`` are reasons not to cut (in the order in which they were found), ``marks`` are the operations of the
    atom.
    """

    __slots__ = ("factors", "link", "marks", "pieces", "refusals", "serial", "size")
    _serials = count()

    def __init__(self, size: int) -> None:
        self.size = size
        self.serial = next(Atom._serials)
        self.link: Atom | None = None
        self.factors: Axis | None = None
        self.pieces: list[Axis] | None = None
        self.refusals: dict[str, None] = {}
        self.marks: set[str] = set()

    def __repr__(self) -> str:
        if self.link is not None:
            return repr(representative(self))
        if self.factors is not None:
            return "(" + " x ".join(map(repr, self.factors)) + ")"
        if self.pieces is not None:
            return "[" + " + ".join(axis_text(piece) for piece in self.pieces) + "]"
        return f"a{self.serial}:{self.size}"


def axis_text(axis: Axis) -> str:
    """One axis as text, for people: ``a1:3 x [a2:6 + a2:6]``."""
    return " x ".join(map(repr, resolve(axis))) or "1"


def leaf(size: int) -> Axis:
    """A new axis without any relation; the empty product when ``size`` is 1."""
    return () if size == 1 else (Atom(size),)


def representative(atom: Atom) -> Atom:
    """The representative of everything that was unified with ``atom``."""
    root = atom
    while root.link is not None:
        root = root.link
    while atom.link is not None:
        atom.link, atom = root, atom.link
    return root


def size_of(axis: Iterable[Atom]) -> int:
    return math.prod(atom.size for atom in axis)


def resolve(axis: Axis) -> Axis:
    """The leaves and concatenations that ``axis`` is a product of, outermost first."""
    atoms: list[Atom] = []
    for atom in axis:
        atom = representative(atom)
        if atom.factors is not None:
            atoms.extend(resolve(atom.factors))
        else:
            atoms.append(atom)
    return tuple(atoms)


def leaves(axis: Axis) -> Iterator[Atom]:
    """Every leaf below ``axis``, in row-major order, as often as it occurs."""
    for atom in resolve(axis):
        if atom.pieces is None:
            yield atom
        else:
            for piece in atom.pieces:
                yield from leaves(piece)


def nodes(axis: Axis) -> Iterator[Atom]:
    """Every leaf and every concatenation below ``axis``."""
    for atom in resolve(axis):
        yield atom
        for piece in atom.pieces or ():
            yield from nodes(piece)


def refuse(axis: Axis, reason: str) -> None:
    """Protect everything below ``axis`` from cuts, because of ``reason``."""
    for atom in nodes(axis):
        atom.refusals.setdefault(reason)


def sever(axis: Axis, reason: str) -> None:
    """Refuse ``axis``, and note that the consumers or producers of its units are not known."""
    refuse(axis, reason)
    mark(axis, "severed")


def mark(axis: Axis, what: str) -> None:
    """Note that everything below ``axis`` took part in ``what``."""
    for atom in nodes(axis):
        atom.marks.add(what)


def _inherit(children: Axis, parent: Atom) -> None:
    """What was said about ``parent`` holds for what it turned out to be made of."""
    if parent.refusals or parent.marks:
        for atom in nodes(children):
            atom.refusals.update(parent.refusals)
            atom.marks |= parent.marks


# --- concatenations -------------------------------------------------------------------------------------------------


def pieces_of(axis: Axis) -> list[Axis]:
    """The pieces of an axis that is one concatenation (nested ones flattened), else the axis itself as only piece."""
    atoms = resolve(axis)
    if len(atoms) == 1 and atoms[0].pieces is not None:
        return [inner for piece in atoms[0].pieces for inner in pieces_of(piece)]
    return [atoms]


def join(pieces: list[Axis]) -> Axis:
    """The concatenation of ``pieces`` as one axis."""
    flat = [inner for piece in pieces if size_of(piece) for inner in pieces_of(piece)]
    if len(flat) == 1:
        return flat[0]
    if not flat:
        return leaf(0)
    atom = Atom(sum(size_of(piece) for piece in flat))
    atom.pieces = flat
    return (atom,)


def split_at(axis: Axis, position: int) -> tuple[Axis, Axis]:
    """Divide ``axis`` into its first ``position`` elements and the rest."""
    atoms = resolve(axis)
    total = size_of(atoms)
    if not 0 <= position <= total:
        raise Conflict(f"cannot cut {total} elements at {position}")
    if position in (0, total):
        return (leaf(0), atoms) if position == 0 else (atoms, leaf(0))
    outer, inner = atoms[0], atoms[1:]
    if position % size_of(inner):
        raise Conflict(f"a cut at {position} goes through a unit of {size_of(inner)}")
    left, right = _cut_atom(outer, position // size_of(inner))
    return left + inner, right + inner


def _cut_atom(atom: Atom, position: int) -> tuple[Axis, Axis]:
    if atom.pieces is None:
        left, right = leaf(position), leaf(atom.size - position)
        _inherit(left + right, atom)
        atom.pieces = [left, right]
        return left, right
    start = 0
    for index, piece in enumerate(atom.pieces):
        if start == position:
            break
        end = start + size_of(piece)
        if start < position < end:
            left, right = split_at(piece, position - start)
            atom.pieces[index : index + 1] = [left, right]
            index += 1
            break
        start = end
    return join(atom.pieces[:index]), join(atom.pieces[index:])


def span(axis: Axis, start: int, stop: int) -> Axis:
    """The elements ``start`` to ``stop`` (exclusive) of ``axis``."""
    left, _ = split_at(axis, stop)
    return split_at(left, start)[1]


# --- products -------------------------------------------------------------------------------------------------------


def split_axis(axis: Axis, inner_size: int) -> tuple[Axis, Axis]:
    """Read ``axis`` as ``outer x inner`` with ``inner`` of ``inner_size``."""
    outer: list[Atom] = list(resolve(axis))
    inner: Axis = ()
    while inner_size > 1:
        if not outer:
            raise Conflict("the inner axis is larger than the whole")
        atom = outer.pop()
        if inner_size % atom.size == 0:
            inner = (atom, *inner)
            inner_size //= atom.size
        elif atom.size % inner_size == 0:
            high, low = factor(atom, inner_size)
            outer.extend(high)
            inner = (*low, *inner)
            inner_size = 1
        else:
            raise Conflict(f"a unit of {atom.size} and one of {inner_size} do not fit into each other")
    return tuple(outer), inner


def factor(atom: Atom, inner_size: int) -> tuple[Axis, Axis]:
    """Bind ``atom`` to ``outer x inner`` with ``inner`` of ``inner_size``, which divides its size, and return both."""
    if atom.pieces is None:
        outer, inner = leaf(atom.size // inner_size), leaf(inner_size)
    else:
        halves = [split_axis(chunk, inner_size) for chunk in _chunks(atom.pieces, inner_size)]
        inner = halves[0][1]
        for _, other in halves[1:]:
            unify(inner, other)
        outer = join([high for high, _ in halves])
    _inherit(outer + inner, atom)
    atom.factors, atom.pieces = outer + inner, None
    return outer, inner


def _chunks(pieces: list[Axis], unit: int) -> list[Axis]:
    """Regroup ``pieces`` into chunks whose sizes are multiples of ``unit``.

    A chunk that several pieces share is made as small as it can be (one unit): were it larger, factoring it would
    meet the same straddling pieces again, for ever.
    """
    whole = join(list(pieces))
    bounds, end = {0}, 0
    for piece in pieces:
        end += size_of(piece)
        bounds |= {end // unit * unit, -(-end // unit) * unit}
    ordered = sorted(bounds)
    return [span(whole, start, stop) for start, stop in pairwise(ordered)]


def regroup(axes: Iterable[Axis], shape: Iterable[int]) -> list[Axis]:
    """The axes of a row-major reshape of a tensor with ``axes`` to ``shape``."""
    rest: Axis = tuple(atom for axis in axes for atom in axis)
    result: list[Axis] = []
    for size in reversed(list(shape)):
        rest, inner = split_axis(rest, size)
        result.append(inner)
    if rest:
        raise Conflict("the new shape has fewer elements")
    return result[::-1]


# --- sameness -------------------------------------------------------------------------------------------------------


def unify(first: Axis, second: Axis) -> None:
    """Say that two axes are the same, element by element."""
    left, right = list(resolve(first)), list(resolve(second))
    if size_of(left) != size_of(right):
        raise Conflict(f"axes of {size_of(left)} and {size_of(right)} cannot be the same")
    if size_of(left) == 0:
        return  # there is nothing that could be the same
    while left and right:
        if left == right:
            return
        one, two = left.pop(), right.pop()
        if one is not two:
            if one.size < two.size:
                one, two, left, right = two, one, right, left
            if one.size % two.size:
                raise Conflict(f"a unit of {one.size} and one of {two.size} do not fit into each other")
            if one.size == two.size:
                _unify_atoms(one, two)
            else:
                outer, inner = factor(one, two.size)
                left.extend(outer)
                unify(inner, (two,))
        left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))


def _unify_atoms(one: Atom, two: Atom) -> None:
    """Two atoms of one size, each a leaf or a concatenation, become one."""
    if two.pieces is not None and (one.pieces is None or two.serial < one.serial):
        one, two = two, one  # a leaf is bound to the concatenation; of two alike, the elder stays
    elif one.pieces is None and two.serial < one.serial:
        one, two = two, one
    if two.pieces is not None:
        _align(pieces_of((one,)), pieces_of((two,)))
        one, two = representative(one), representative(two)
        if one is two or one.factors is not None or two.factors is not None:
            return
    two.link = one
    _inherit((one,), two)


def _align(left: list[Axis], right: list[Axis]) -> None:
    """Unify two lists of pieces of the same total size, cutting where their boundaries differ."""
    left, right = left[::-1], right[::-1]
    while left and right:
        one, two = left.pop(), right.pop()
        if size_of(one) > size_of(two):
            one, rest = split_at(one, size_of(two))
            left.append(rest)
        elif size_of(one) < size_of(two):
            two, rest = split_at(two, size_of(one))
            right.append(rest)
        unify(one, two)
