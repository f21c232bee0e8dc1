"""How much a run may spend, in time or in tokens, instead of steps: which part of it each stage gets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from secateur.errors import InputError
from secateur.types import Settings

Part = Literal["calibration", "repair", "reconstruction", "recovery"]
"""A part of a run that can read more text or less."""

SHARES: Mapping[Part, float] = {"calibration": 0.2, "repair": 0.15, "reconstruction": 0.15, "recovery": 0.5}
"""Share of each part, of the time or of the tokens; a part that a run does not have leaves its share to recovery."""
CAPS: Mapping[Part, int] = {"calibration": 131_072, "repair": 131_072, "reconstruction": 262_144}
"""Tokens beyond which a part gains little; what it does not use is recovery's."""

ON_A_GPU = "30m"
"""``within`` of a run on a device that is no CPU, where the recipe names neither a limit nor steps."""

_UNITS = {"s": 1, "m": 60, "h": 3600}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])", re.IGNORECASE)
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmb]?)", re.IGNORECASE)
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class Effort(Settings):
    """How much a run may spend. Amounts that the recipe names itself stay as they are."""

    within: str | None = None
    """Time for the whole run, such as `30m`, `2h` or `90s`. A step is measured on this machine before the run, and the
    time is divided between scoring, repair, reconstruction and recovery. `null`: no limit on a CPU, and 30m on any
    other device, unless the recipe names tokens, recovery.steps or steps of the method."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens that all these stages read together, such as `1.6M`. At most one of the two."""

    @field_validator("within", mode="before")
    @classmethod
    def _is_a_time(cls, value: object) -> object:
        if value is None:
            return None
        seconds_of(str(value))
        return str(value)

    @field_validator("tokens", mode="before")
    @classmethod
    def _is_a_count(cls, value: object) -> object:
        return count_of(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.within is not None and self.tokens is not None:
            raise ValueError("give a time (within) or tokens, not both")
        return self

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self.within is not None or self.tokens is not None

    @property
    def twice(self) -> str:
        """The option of the command line for twice as much."""
        if self.within is None:
            return f"--tokens {2 * (self.tokens or 0)}"
        text = self.within.strip()
        return f"--within {2 * float(text[:-1]):g}{text[-1].lower()}"

    def shared(self, runs: int) -> Effort:
        """The limit of each of so many runs that share this one."""
        if runs == 1:
            return self
        if self.within is not None:
            return Effort(within=f"{max(seconds_of(self.within) / runs, 1.0):.10g}s")
        return self if self.tokens is None else Effort(tokens=max(1, self.tokens // runs))


def seconds_of(text: str) -> float:
    """Seconds in ``30m``, ``2h`` or ``90s``; ValueError for anything else, and for no time at all."""
    found = _TIME.fullmatch(text.strip())
    if found is None or not float(found[1]) > 0:
        raise ValueError("a time is a number above 0 with s, m or h, such as 90s, 30m or 1.5h")
    return float(found[1]) * _UNITS[found[2].lower()]


def count_of(text: str) -> int:
    """The number in ``1.6M``, ``200k`` or ``6500000``; ValueError for anything else, and for less than one."""
    found = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    count = round(float(found[1]) * _THOUSANDS[found[2].lower()]) if found else 0
    if count < 1:
        raise ValueError("tokens are a number above 0, with k, M or B if you like, such as 200k or 1.6M")
    return count


def divide(
    total: float,
    costs: Mapping[Part, float],
    least: Mapping[Part, int],
    given: str,
    *,
    unit: Literal["seconds", "tokens"] = "seconds",
    taken: float = 0.0,
    by: str = "the rest of the run",
) -> dict[Part, int]:
    """Tokens for each part of a run, by ``SHARES``.

    Args:
        total: the limit, in seconds or tokens.
        costs: part → what one of its tokens costs, in the unit of ``total``; only parts that the run has.
        least: the fewest tokens of each part.
        given: the limit in the user's words, for the message.
        unit: that of ``total``, for the message.
        taken: what is taken from ``total`` before the parts.
        by: what takes it, for the message.

    Raises InputError when ``total`` does not suffice for the fewest tokens of all parts.
    """
    needed = sum(least[part] * cost for part, cost in costs.items())
    total -= taken
    if not total >= needed:
        takes = f"{by} takes {taken:,.0f} {unit}, and " if taken > 0 else ""
        raise InputError(
            f"{given} is too little: {takes}{', '.join(costs)} need at least {needed:,.0f} {unit}. Give at least "
            f"{_least_limit(taken + needed, unit)}, or switch a part off (recovery.steps=0, recovery.repair=false)."
        )
    amounts: dict[Part, int] = {}
    left = total - needed
    for part, cost in costs.items():
        if part != "recovery":
            wanted = min(int(SHARES[part] * total / cost), CAPS[part])
            amounts[part] = min(max(least[part], wanted), least[part] + int(left / cost))
            left -= (amounts[part] - least[part]) * cost
    if "recovery" in costs:
        amounts["recovery"] = least["recovery"] + int(left / costs["recovery"])
    return amounts


def _least_limit(amount: float, unit: str) -> str:
    """The option of the command line for so much, rounded up."""
    return f"--within {math.ceil(amount)}s" if unit == "seconds" else f"--tokens {math.ceil(amount)}"
