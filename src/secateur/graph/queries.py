"""Units that are the pairs of two atoms: query heads within their KV heads, experts within their groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from secateur.types import Member


def of_pairs(member: Member, outer: int, inner: int) -> Member | None:
    """The rows of each of ``outer x inner`` units, where ``member`` has those of each of the ``inner`` ones.

    ``outer`` is more than 1. None when the units do not lie in row-major order, with the same gap after each run of
    ``inner``.
    """
    starts = sorted(member.offsets)
    if len(starts) < outer:  # one KV head after the other, over and over: no run of units belongs to one of them
        return None
    firsts, step = starts[::outer], starts[1] - starts[0]
    gap = step - inner * member.width
    if gap < 0 or starts != [first + number * step for first in firsts for number in range(outer)]:
        return None
    return replace(member, offsets=tuple(firsts), run=inner, gap=gap)


def within_heads(queries: Sequence[Member], heads: Sequence[Member], outer: int, inner: int) -> list[Member] | None:
    """The rows of each query head, of which each of the ``outer`` KV heads has ``inner``.

    ``queries`` has the rows of the n-th query head of all KV heads together, ``heads`` those of each KV head with all
    its query heads. None when some tensor does not hold them KV head by KV head.
    """
    found = []
    for member in queries:
        pairs = of_pairs(member, outer, inner)
        around = [head for head in heads if (head.parameter, head.axis) == (member.parameter, member.axis)]
        if pairs is None or not any(_encloses(head, pairs, inner) for head in around):
            return None
        found.append(pairs)
    return found


def _encloses(head: Member, queries: Member, inner: int) -> bool:
    """Whether a KV head's rows hold those of its ``inner`` query heads, in the same distance from one to the next."""
    begins = [offset for offset in head.offsets for query in queries.offsets if 0 <= query - offset < head.width]
    return head.stride == inner * queries.stride + queries.gap and len(begins) == len(queries.offsets)
