"""The architecture contract over the model families that secateur names, all from tiny random models."""

from __future__ import annotations

from secateur.testing.contracts import ArchitectureContract
from secateur.testing.tiny import TINY

ONLY_FFN = {"bloom"}
"""ALiBi constants depend on the index of the head: no head can go."""


def _contract(family: str) -> type[ArchitectureContract]:
    kinds = ("ffn",) if family in ONLY_FFN else ("attention", "ffn")
    name = "Test" + "".join(part.capitalize() for part in family.split("-"))
    return type(name, (ArchitectureContract,), {"build": lambda self: TINY[family](), "kinds": kinds})


for _family in TINY:
    _class = _contract(_family)
    globals()[_class.__name__] = _class
