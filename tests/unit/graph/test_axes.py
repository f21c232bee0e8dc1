"""The algebra of symbolic axes on small cases."""

from __future__ import annotations

import pytest

from secateur.graph.axes import (
    Axis,
    Conflict,
    join,
    leaf,
    leaves,
    mark,
    pieces_of,
    refuse,
    regroup,
    resolve,
    size_of,
    span,
    split_at,
    split_axis,
    unify,
)
from secateur.graph.groups import occurrences


def layout(axis: Axis) -> list[tuple[int, list[int], int]]:
    """(size of the leaf, starts, width), outermost first."""
    found = [(atom.size, starts, width) for atom, starts, width in occurrences(axis)]
    return sorted(found, key=lambda item: (-item[2], item[1]))


def test_size_one_is_the_empty_product() -> None:
    assert leaf(1) == ()
    assert size_of(leaf(1)) == 1


def test_splitting_a_leaf_binds_it_in_place() -> None:
    rows = leaf(12)
    heads, head_dim = split_axis(rows, 4)
    assert (size_of(heads), size_of(head_dim)) == (3, 4)
    assert resolve(rows) == heads + head_dim


def test_splitting_across_atoms_factors_only_where_needed() -> None:
    outer, inner = leaf(6), leaf(4)
    high, low = split_axis(outer + inner, 8)
    assert (size_of(high), size_of(low)) == (3, 8)
    assert resolve(low)[-1:] == inner
    assert resolve(outer) == high + resolve(low)[:1]


def test_shapes_without_common_refinement_conflict() -> None:
    with pytest.raises(Conflict):
        split_axis(leaf(4) + leaf(3), 4)
    with pytest.raises(Conflict):
        unify(leaf(4) + leaf(3), leaf(3) + leaf(4))
    with pytest.raises(Conflict):
        unify(leaf(4), leaf(5))


def test_a_cut_makes_a_concatenation_and_cuts_again_inside_it() -> None:
    rows = leaf(10)
    left, right = split_at(rows, 4)
    assert [size_of(piece) for piece in pieces_of(rows)] == [4, 6]
    middle = span(rows, 3, 6)
    assert [size_of(piece) for piece in pieces_of(rows)] == [3, 1, 2, 4]
    assert size_of(middle) == 3
    assert [size_of(piece) for piece in pieces_of(left)] == [3, 1]
    assert [size_of(piece) for piece in pieces_of(right)] == [2, 4]


def test_a_cut_through_a_unit_conflicts() -> None:
    with pytest.raises(Conflict):
        split_at(leaf(3) + leaf(4), 6)


def test_unifying_leaves_is_transitive_and_late() -> None:
    one, two, three = leaf(6), leaf(6), leaf(6)
    unify(one, two)
    unify(two, three)
    high, low = split_axis(three, 2)
    assert resolve(one) == high + low == resolve(two)


def test_unify_factors_the_larger_side() -> None:
    kv, repeat, head_dim, rows = leaf(3), leaf(2), leaf(4), leaf(24)
    unify(rows, kv + repeat + head_dim)
    assert resolve(rows) == kv + repeat + head_dim
    assert layout(rows) == [(3, [0], 8), (2, [0, 8, 16], 4), (4, [0, 4, 8, 12, 16, 20], 1)]


def test_fused_gate_and_up_become_one_leaf_that_occurs_twice() -> None:
    rows = leaf(10)
    gate, up = split_at(rows, 5)
    unify(gate, up)
    assert layout(rows) == [(5, [0], 1), (5, [5], 1)]
    assert len(set(leaves(rows))) == 1


def test_fused_query_key_value_with_grouped_heads() -> None:
    rows = leaf(2 * 3 * 4 + 2 * 4 + 2 * 4)
    query, rest = split_at(rows, 24)
    key, value = split_at(rest, 8)
    query_heads, query_dim = split_axis(query, 4)
    key_heads, key_dim = split_axis(key, 4)
    value_heads, _ = split_axis(value, 4)
    unify(query_heads, key_heads + leaf(3))
    unify(key_heads, value_heads)
    unify(query_dim, key_dim)
    kv = resolve(key_heads)[0]
    assert sorted((starts, width) for atom, starts, width in occurrences(rows) if atom is kv) == [
        ([0], 12),
        ([24], 4),
        ([32], 4),
    ]


def test_interleaved_halves_and_rotary_halves_meet() -> None:
    rotated, plain = leaf(6), leaf(12)
    halves = join([rotated, rotated])
    unify(plain, halves)
    pairs, two = split_axis(plain, 2)
    assert (size_of(pairs), size_of(two)) == (6, 2)
    assert size_of(resolve(rotated)) == 6
    assert len(resolve(rotated)) == 2  # 3 x 2, as the factor of 2 runs through both halves


def test_factoring_regroups_pieces_that_straddle_a_unit() -> None:
    rows = join([leaf(3), leaf(5)])
    high, low = split_axis(rows, 4)
    assert (size_of(high), size_of(low)) == (2, 4)
    assert [size_of(piece) for piece in pieces_of(low)] == [3, 1]


def test_concatenations_align_their_boundaries() -> None:
    one, two = join([leaf(3), leaf(5)]), join([leaf(6), leaf(2)])
    unify(one, two)
    assert [size_of(piece) for piece in pieces_of(one)] == [3, 3, 2]
    assert resolve(one) == resolve(two)


def test_regroup_is_a_reshape() -> None:
    batch, length, rows = leaf(2), leaf(7), leaf(12)
    assert regroup([batch, length, rows], (14, 12)) == [batch + length, rows]
    shape = regroup([batch + length, rows], (2, 7, 3, 1, 4))
    assert [size_of(axis) for axis in shape] == [2, 7, 3, 1, 4]
    assert shape[:2] == [batch, length]
    with pytest.raises(Conflict):
        regroup([batch, length], (2, 2))


def test_what_is_said_of_an_atom_holds_for_its_parts_and_its_equals() -> None:
    rows = leaf(12)
    refuse(rows, "because")
    mark(rows, "head")
    heads, head_dim = split_axis(rows, 4)
    left, _ = split_at(head_dim, 2)
    other = leaf(3)
    unify(other, heads)
    for axis in (heads, left, other):
        atom = resolve(axis)[0]
        assert list(atom.refusals) == ["because"]
        assert "head" in atom.marks


def test_a_refusal_reaches_parts_that_were_found_before() -> None:
    rows = leaf(12)
    heads, _ = split_axis(rows, 4)
    _, right = split_at(heads, 1)
    refuse(rows, "late")
    assert list(resolve(right)[0].refusals) == ["late"]
