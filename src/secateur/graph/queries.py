"""Units that are the pairs of two atoms: query heads within their KV heads, experts within their groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from secateur.types import Member


def of_pairs(member: Member, outer: int, inner: int) -> Member | None:
    """The rows of each of ``outer x inner`` units, where ``member`` has those of each of the ``inner`` ones.

    None when the units do not lie next to each other, in row-major order.
    """
    run = inner * member.width
    starts = sorted(member.offsets)
    firsts = starts[::outer]
    if starts != [first + number * run for first in firsts for number in range(outer)]:
        return None
    return replace(member, offsets=tuple(firsts))


def within_heads(queries: Sequence[Member], heads: Sequence[Member], outer: int, inner: int) -> list[Member] | None:
    """The rows of each query head, of which each of the ``outer`` KV heads has ``inner``.

    ``queries`` has the rows of the n-th query head of all KV heads together, ``heads`` those of each KV head with all
    its query heads. None when some tensor does not hold them as KV head after KV head, or has more in between.
    """
    found = []
    for member in queries:
        pairs = of_pairs(member, outer, inner)
        around = [head for head in heads if (head.parameter, head.axis) == (member.parameter, member.axis)]
        if pairs is None or not any(
            head.width == inner * member.width and set(pairs.offsets) <= set(head.offsets) for head in around
        ):
            return None
        found.append(pairs)
    return found
