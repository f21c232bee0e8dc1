"""The text of a whole run: blocks for each purpose, without shared text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import TokenBlocks, check_blocks
from secateur.data.builtin import SOURCES
from secateur.data.mixture import TextSettings, TooLittleTextError, check_sources, check_window, load_blocks
from secateur.data.own_text import write_own_text
from secateur.data.sources import OWN_TEXT
from secateur.data.splits import SHARES, Split
from secateur.errors import DataError
from secateur.progress import say

_MARGIN = 1.2
"""Factor for the text that the model writes, because documents are split unevenly."""


Purpose = Literal["calibration", "repair", "reconstruct", "recovery", "instructions", "validation", "evaluation"]

_SPLITS: Mapping[Purpose, Split] = {
    "calibration": "calibration",
    "repair": "calibration",
    "reconstruct": "calibration",
    "recovery": "recovery",
    "instructions": "recovery",
    "validation": "calibration",
    "evaluation": "evaluation",
}
"""Purpose → split. Recovery is measured on text that is neither trained on nor evaluated.

It is also other text than calibration reads from the same split, unless there is too little."""
_SECTIONS: Mapping[Purpose, str] = {
    "repair": "calibration",
    "reconstruct": "calibration",
    "instructions": "recovery",
    "validation": "recovery",
}
"""Purpose → section of the recipe, where their names differ."""
_SWITCHES: Mapping[Purpose, str] = {"repair": "recovery.repair", "reconstruct": "recovery.reconstruct"}
"""Purpose → the key that switches off what needs the text."""


@dataclass(frozen=True)
class Texts:
    """Blocks for each purpose; None when a run does not need them."""

    calibration: TokenBlocks | None = None
    repair: TokenBlocks | None = None
    """Text for refitting consumers."""
    reconstruct: TokenBlocks | None = None
    """Text for training single blocks."""
    recovery: TokenBlocks | None = None
    """Also the training text of progressive methods."""
    instructions: TokenBlocks | None = None
    """Training text of the second stage of recovery."""
    validation: TokenBlocks | None = None
    """Text for measurements during recovery."""
    evaluation: TokenBlocks | None = None


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: Mapping[Purpose, TextSettings],
    seed: int,
    spare: Collection[Purpose] = (),
) -> Texts:
    """Token blocks for each purpose in ``wanted``; none without a tokenizer.

    Everything is checked before anything is read. ``model`` is the dense one; it writes the text of the source
    ``self``. A purpose in ``spare`` with too little text is left out, with a message. Raises DataError and InputError
    as ``load_blocks`` and ``check_window`` do.
    """
    if tokenizer is None:
        return Texts()
    for purpose, settings in wanted.items():
        check_sources(settings)
        check_window(settings, model, _SECTIONS.get(purpose, purpose))
    _mention_licences(wanted)
    own = _own_tokens(wanted)
    written = write_own_text(model, tokenizer, own, seed) if own else []
    taken: set[str] = set()  # by calibration: recovery is measured on other text, which is read afterwards
    first = sorted(wanted, key=lambda purpose: purpose != "calibration")
    blocks: dict[str, TokenBlocks] = {}
    for purpose in first:
        split = _SPLITS[purpose]
        others = taken if split == "calibration" else None
        try:
            found = load_blocks(wanted[purpose], split, tokenizer, seed, written, others)
        except TooLittleTextError as error:
            if purpose in spare:
                say(f"Without {purpose}: {error}")
                continue
            switch = f" Or set {_SWITCHES[purpose]}=false." if purpose in _SWITCHES else ""
            raise DataError(f"{error}{switch}") from error
        check_blocks(found, model, tokenizer)
        blocks[purpose] = found
    return Texts(**blocks)


def _mention_licences(wanted: Mapping[Purpose, TextSettings]) -> None:
    """Tell the user which built-in training text is not free for every use."""
    trained_on = [
        name for purpose in ("recovery", "instructions") if purpose in wanted for name in wanted[purpose].text
    ]
    for name in trained_on:
        if name in SOURCES and "non-commercial" in SOURCES[name].licence:
            free = ",".join(other for other in trained_on if other != name)
            say(f"Training reads {name}: {SOURCES[name].licence}. Without it: --set recovery.text=[{free}]")


def _own_tokens(wanted: Mapping[Purpose, TextSettings]) -> int:
    """Number of tokens that the model must write for all splits."""
    needs = dict.fromkeys(SHARES, 0.0)  # purposes of one split read different text
    for purpose, text in wanted.items():
        if OWN_TEXT in text.text:
            weights = text.weights or dict.fromkeys(text.text, 1.0)
            needs[_SPLITS[purpose]] += text.tokens * weights[OWN_TEXT] / sum(weights.values())
    return round(_MARGIN * max(tokens / SHARES[split] for split, tokens in needs.items()))
