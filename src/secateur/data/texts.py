"""The text of a whole run: blocks for each purpose, none of which shares a document with another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import TokenBlocks
from secateur.data.mixture import TextSettings, check_sources, check_window, load_blocks
from secateur.data.own_text import write_own_text
from secateur.data.sources import OWN_TEXT
from secateur.data.splits import SHARES, Split

_MARGIN = 1.2
"""How much more the model writes than the splits need, because documents fall to them unevenly."""


@dataclass(frozen=True)
class Texts:
    """Blocks for each purpose; None where a run does not need them."""

    calibration: TokenBlocks | None = None
    recovery: TokenBlocks | None = None
    """Also what progressive methods train on."""
    evaluation: TokenBlocks | None = None


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    wanted: Mapping[Split, TextSettings],
    seed: int,
) -> Texts:
    """Token blocks for each purpose in ``wanted``; none at all without a tokenizer.

    Everything is checked before anything is read. ``model`` is the dense one: where the source ``self`` is named, it
    writes that text. Raises DataError and InputError as ``load_blocks`` and ``check_window`` do.
    """
    if tokenizer is None:
        return Texts()
    for split, settings in wanted.items():
        check_sources(settings)
        check_window(settings, model, split)
    own = _own_tokens(wanted)
    written = write_own_text(model, tokenizer, own, seed) if own else []
    return Texts(**{split: load_blocks(wanted[split], split, tokenizer, seed, written) for split in wanted})


def _own_tokens(wanted: Mapping[Split, TextSettings]) -> int:
    """How much the model must write itself so that every split has its share."""
    needs = [0.0]
    for split, text in wanted.items():
        if OWN_TEXT in text.text:
            weights = text.weights or dict.fromkeys(text.text, 1.0)
            needs.append(text.tokens * weights[OWN_TEXT] / sum(weights.values()) / SHARES[split])
    return round(_MARGIN * max(needs))
