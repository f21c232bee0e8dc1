"""From a recipe's text section to blocks of token ids: sources read, split, packed and mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedTokenizerBase

from secateur.data.blocks import Packer, TokenBlocks, pieces_of_split
from secateur.data.builtin import SOURCES
from secateur.data.sources import OWN_TEXT, check_source, read_documents
from secateur.data.splits import SHARES, Split
from secateur.errors import DataError
from secateur.types import Settings

_CHARACTERS_PER_TOKEN = 16  # generous: English has about 4; the surplus is what the random order chooses from
_FEWEST_CHARACTERS = 2_000_000


class TextSettings(Settings):
    """Which text, how much of it, and how it is cut."""

    text: list[str] = Field(default=["wikipedia", "news", "python-docs", "python-code"])
    """Source names (see `secateur data`), files (.txt, .jsonl, .parquet), or hub datasets as id:config:split."""
    window: int = Field(default=512, ge=2)
    """Tokens per block."""
    tokens: int = Field(default=65_536, ge=2)
    """Tokens in all; a multiple of the window is taken."""
    weights: dict[str, float] | None = None
    """Share of each source in ``text``. Left out, all get the same, and what a small source cannot fill goes to the
    others; written down, the shares are kept exactly or the run is refused."""

    @field_validator("text", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.text or len(set(self.text)) != len(self.text):
            raise ValueError("text must name at least one source, and each only once")
        if self.tokens < self.window:
            raise ValueError(f"tokens ({self.tokens}) must be at least one window ({self.window})")
        if self.weights is not None and (
            set(self.weights) != set(self.text) or not all(weight > 0 for weight in self.weights.values())
        ):
            raise ValueError(f"weights must give each of {', '.join(self.text)} a positive number, and nothing else")
        return self


def load_blocks(
    settings: TextSettings,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    own_text: Sequence[str] = (),
) -> TokenBlocks:
    """Exactly ``tokens // window`` blocks of the split's text, mixed by weight, in random order.

    The split of a document follows from its text alone (``split_of``): blocks of different splits share no document,
    whatever the sources, settings and seeds. After every document stands the mark that stood there in pre-training
    (``document_end``); what the tokenizer adds by itself at the start (BOS) is kept. A block has one source.

    Args:
        own_text: documents of the source ``self``, from ``write_own_text``.

    Raises:
        DataError: no tokenizer, a source that cannot be read, or too little text.
    """
    if tokenizer is None:
        raise DataError(
            "The model has no tokenizer, so text cannot be turned into tokens. Put its files into the folder."
        )
    for name in settings.text:
        check_source(name)
    blocks = settings.tokens // settings.window
    packers = _open(settings, split, tokenizer, seed, own_text)
    counts = _share_out(packers, blocks, settings.weights)
    if sum(counts.values()) < blocks:
        raise _too_little(packers, settings, split)
    ids = torch.cat([packer.take(counts[name]) for name, packer in packers.items()])
    sources = [name for name in packers for _ in range(counts[name])]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenBlocks(ids[order], tuple(sources[row] for row in order))


def _open(
    settings: TextSettings, split: Split, tokenizer: PreTrainedTokenizerBase, seed: int, own_text: Sequence[str]
) -> dict[str, Packer]:
    characters = max(_FEWEST_CHARACTERS, settings.tokens * _CHARACTERS_PER_TOKEN)
    seen: set[bytes] = set()
    packers = {}
    for name in settings.text:
        if name == OWN_TEXT and not own_text:
            raise DataError(
                f"The source {OWN_TEXT} needs text written by the model (write_own_text) before the blocks."
            )
        documents = own_text if name == OWN_TEXT else read_documents(name, tokenizer)
        pieces = pieces_of_split(documents, split, characters, seen, Random(f"{seed}/{name}"))
        packers[name] = Packer(pieces, tokenizer, settings.window)
    return packers


def _share_out(packers: Mapping[str, Packer], blocks: int, weights: Mapping[str, float] | None) -> dict[str, int]:
    """Blocks of each source: by weight; without weights equal, a small source's lack being filled by the others.

    They add up to ``blocks`` unless there is too little text.
    """
    if weights is not None:
        counts = _proportional(blocks, weights)
        return {name: packers[name].available(count) for name, count in counts.items()}
    counts, not_full = {}, list(packers)
    while not_full:
        share = _proportional(blocks - sum(counts.values()), dict.fromkeys(not_full, 1.0))
        full = [name for name in not_full if packers[name].available(share[name]) < share[name]]
        if not full:
            return counts | share
        counts |= {name: packers[name].available(share[name]) for name in full}
        not_full = [name for name in not_full if name not in full]
    return counts


def _proportional(blocks: int, weights: Mapping[str, float]) -> dict[str, int]:
    """``blocks`` divided by weight into whole numbers that add up to it (largest remainders, ties in order)."""
    total = sum(weights.values())
    exact = {name: blocks * weight / total for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: blocks - sum(counts.values())]:
        counts[name] += 1
    return counts


def _too_little(packers: Mapping[str, Packer], settings: TextSettings, split: Split) -> DataError:
    blocks = settings.tokens // settings.window
    wanted = _proportional(blocks, settings.weights) if settings.weights else dict.fromkeys(packers, blocks)
    short = [name for name, packer in packers.items() if packer.available(wanted[name]) < wanted[name]]
    have = ", ".join(f"{name} {packers[name].tokens:,}" for name in short)
    what = "these shares of " if settings.weights else ""
    return DataError(
        f"Too little text for {split}: {what}{settings.tokens:,} tokens were asked for, and there are: {have}. "
        f"{SHARES[split]:.0%} of the documents of every source go to {split}, and copies count once. Ask for fewer "
        f"tokens, or name more text; built in are {', '.join(SOURCES)}."
    )
