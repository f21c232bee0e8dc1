"""From a recipe's text section to blocks of token ids: sources are read, split, packed and mixed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from random import Random
from typing import Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import Packer, TokenBlocks, cut_document, pieces_of_split, read_ids
from secateur.data.builtin import SOURCES
from secateur.data.marks import marks_of
from secateur.data.sources import FILES, OWN_TEXT, check_source, read_documents
from secateur.data.splits import SHARES, Split
from secateur.errors import DataError, InputError
from secateur.progress import say
from secateur.types import Settings

_CHARACTERS_PER_TOKEN = 16  # generous: English has about 4; the surplus is what the random order chooses from
_FEWEST_CHARACTERS = 2_000_000
_FEWEST_BLOCKS = 8  # below this a number says more about the choice of text than about the model
# What configurations call the longest sequence; attribute maps translate most other names to the first.
_CONTEXT = ("max_position_embeddings", "max_seq_len", "max_target_positions")


class TextSettings(Settings):
    """The text, its amount, and its windows."""

    text: list[str] = Field(default=["wikipedia", "news", "python-docs", "python-code"])
    """Source names (see `secateur data`), files (.txt, .jsonl, .parquet), or hub datasets as id:config:split."""
    window: int = Field(default=512, ge=2)
    """Tokens per block. Every block begins with the tokens that the tokenizer puts before a text (BOS); they count."""
    tokens: int = Field(default=16_384, ge=2)
    """Tokens in all, in whole windows. If the text has less, but at least 8 windows, all of it is used."""
    weights: dict[str, float] | None = None
    """Share of each source in ``text``. By default all sources have equal shares, and the others make up for a source
    with too little text. Given shares are kept exactly, or the run is refused."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.text or len(set(self.text)) != len(self.text):
            raise ValueError("text must name at least one source, and each only once")
        if self.tokens < self.window:
            raise ValueError(f"tokens ({self.tokens}) must be at least one window ({self.window})")
        if self.weights is not None:
            fine = all(weight > 0 for weight in self.weights.values()) and math.isfinite(sum(self.weights.values()))
            if set(self.weights) != set(self.text) or not fine:
                raise ValueError(
                    f"weights must give each of {', '.join(self.text)} a positive, finite number, and nothing else"
                )
        return self


class TooLittleTextError(DataError):
    """The sources have too little text for a split."""


def load_blocks(
    settings: TextSettings,
    split: Split,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    own_text: Sequence[str] = (),
    taken: set[str] | None = None,
) -> TokenBlocks:
    """``tokens // window`` blocks of the split's text, mixed by weight, in random order.

    Without ``weights`` there may be fewer, down to 8, when the sources have too little text for the split. A message
    says so, and names sources without any text.

    The split of a document depends on its text only (``split_of``): blocks of different splits share no document, for
    any sources, settings and seeds. After every document follows the token between documents of pre-training
    (``document_end``). Every block, and every document within it, begins with the tokens that the tokenizer puts before
    a text (BOS), if any (``Packer``). A block has one source.

    Args:
        own_text: documents of the source ``self``, from ``write_own_text``.
        taken: parts of text that another purpose reads from the same split (a document, or a part of a long one). They
            are read only when there is too little other text, with a message. Text that is read here is added.

    Raises:
        DataError: no tokenizer, or a source that cannot be read.
        TooLittleTextError: too little text.
    """
    tokenizer = _needed(tokenizer)
    check_sources(settings)
    wanted = settings.tokens // settings.window
    packers = _open(settings, split, tokenizer, seed, own_text, taken or set())
    counts = _share_out(packers, wanted, settings.weights)
    blocks = sum(counts.values())
    if blocks < (wanted if settings.weights else min(wanted, _FEWEST_BLOCKS)):
        raise _too_little(packers, settings, split)
    if blocks < wanted:
        say(
            f"For {split} there are {blocks * settings.window:,} tokens of text in {', '.join(settings.text)}, less "
            f"than the {settings.tokens:,} asked for. All of them are used."
        )
    left_out = [name for name, count in counts.items() if count == 0]
    if left_out:
        say(
            f"Nothing is read of {', '.join(left_out)} for {split}: there are fewer windows than sources, or this "
            "split has less than a window of its text, because a document is in one split only. Ask for more tokens, "
            "or give more, shorter documents."
        )
    if taken is not None:
        _take(packers, counts, split, taken)
    ids = torch.cat([packer.take(counts[name]) for name, packer in packers.items()])
    sources = [name for name in packers for _ in range(counts[name])]
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return TokenBlocks(ids[order], tuple(sources[row] for row in order), marks_of(tokenizer).before)


def load_whole(
    settings: TextSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    max_tokens: int | None = None,
    trained_on: Collection[str] = (),
) -> TokenBlocks:
    """The text for measuring a finished model: whole files, and the held-out part of sources.

    A ``.txt`` file is one string (``read_ids``). Between records of ``.jsonl`` and ``.parquet`` files is the token of a
    document's end. Every window begins with the tokens that the tokenizer puts before a text. Of built-in sources and
    hub datasets, the evaluation split is used, ``tokens`` of it together.

    Args:
        max_tokens: number of tokens to use from the start of each file; None for all. It does not limit sources.
        trained_on: files that are also read for another purpose. Of these, the evaluation split is used, as of
            sources.

    Raises:
        DataError: no tokenizer, a source that cannot be read, or too little text.
    """
    tokenizer = _needed(tokenizer)
    check_sources(settings)
    files = [name for name in settings.text if Path(name).suffix in FILES and name not in trained_on]
    parts = {name: _whole_file(name, tokenizer, settings.window, max_tokens) for name in files}
    ids, names = list(parts.values()), [name for name, rows in parts.items() for _ in rows]
    others = [name for name in settings.text if name not in parts]
    if others:
        weights = {name: settings.weights[name] for name in others} if settings.weights else None
        held_out = settings.model_copy(update={"text": others, "weights": weights})
        blocks = load_blocks(held_out, "evaluation", tokenizer, seed)
        ids.append(blocks.ids)
        names += blocks.sources
    return TokenBlocks(torch.cat(ids), tuple(names), marks_of(tokenizer).before)


def check_sources(settings: TextSettings) -> None:
    """Raise DataError when a name in ``text`` cannot be a source. Opens none, and does not access the hub."""
    for name in settings.text:
        check_source(name)


def check_window(settings: TextSettings, model: PreTrainedModel, section: str) -> None:
    """Raise InputError when a window is longer than the context of ``model``.

    Args:
        section: the recipe's section of the settings, such as ``evaluation``; for the message.
    """
    context = context_of(model)
    if context is not None and settings.window > context:
        raise InputError(
            f"{section}.window = {settings.window} is longer than the context of "
            f"{model.config._name_or_path or 'the model'}, {context} tokens. Set {section}.window to at most {context}."
        )


def context_of(model: PreTrainedModel) -> int | None:
    """The context of ``model`` in tokens; None when its config does not say."""
    config = model.config.get_text_config()
    sizes = [size for name in _CONTEXT if isinstance(size := getattr(config, name, None), int) and size > 0]
    # RoBERTa and its relatives number positions after that of padding, which is in the same table
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [index for table in tables if isinstance(index := getattr(table, "padding_idx", None), int)]
    return sizes[0] - max(padding, default=-1) - 1 if sizes else None


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise DataError("The model has no tokenizer, which text needs. Add its files to the folder.")
    return tokenizer


def _whole_file(name: str, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int | None) -> torch.Tensor:
    """All windows of a file in order, int64 ``[blocks, window]``."""
    if Path(name).suffix == ".txt":
        return read_ids(name, tokenizer, window, max_tokens)
    documents = (text for text in read_documents(name, tokenizer) if text.strip())
    return Packer((piece for text in documents for piece in cut_document(text)), tokenizer, window).first(
        max_tokens, name
    )


def _open(
    settings: TextSettings,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    own_text: Sequence[str],
    taken: Set[str],
) -> dict[str, Packer]:
    characters = max(_FEWEST_CHARACTERS, settings.tokens * _CHARACTERS_PER_TOKEN) + sum(map(len, taken))
    seen: set[bytes] = set()
    packers = {}
    for name in settings.text:
        if name == OWN_TEXT and not own_text:
            raise DataError(
                f"The source {OWN_TEXT} needs text written by the model (write_own_text) before the blocks."
            )
        documents = own_text if name == OWN_TEXT else read_documents(name, tokenizer)
        pieces = pieces_of_split(documents, split, characters, seen, Random(f"{seed}/{name}"))
        pieces.sort(key=lambda piece: piece.text in taken)  # stable: random among themselves
        packers[name] = Packer(pieces, tokenizer, settings.window)
    return packers


def _take(packers: Mapping[str, Packer], counts: Mapping[str, int], split: Split, taken: set[str]) -> None:
    """Add the text of the first ``counts`` windows of each source to ``taken``; report text that was already there."""
    used = {name: {piece.text for piece in packer.pieces(counts[name])} for name, packer in packers.items()}
    twice = [name for name, texts in used.items() if texts & taken]
    if twice:
        say(
            f"There is too little {split} text in {', '.join(twice)} for two separate purposes: some of it is read for "
            "both. Ask for fewer tokens, or name more text."
        )
    taken.update(*used.values())


def _share_out(packers: Mapping[str, Packer], blocks: int, weights: Mapping[str, float] | None) -> dict[str, int]:
    """Blocks of each source, by weight. Without weights they are equal, and others make up for a small source.

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


def _too_little(packers: Mapping[str, Packer], settings: TextSettings, split: Split) -> TooLittleTextError:
    blocks = settings.tokens // settings.window if settings.weights else _FEWEST_BLOCKS
    wanted = _proportional(blocks, settings.weights) if settings.weights else dict.fromkeys(packers, blocks)
    short = [name for name, packer in packers.items() if packer.available(wanted[name]) < wanted[name]]
    have = ", ".join(f"{name} {packers[name].tokens:,}" for name in short)
    least = "" if settings.weights else f" (at least {min(_FEWEST_BLOCKS, settings.tokens // settings.window)} windows)"
    what = "these shares of " if settings.weights else ""
    return TooLittleTextError(
        f"Too little text for {split}: {what}{settings.tokens:,} tokens in windows of {settings.window}{least} were "
        f"asked for, and there are: {have}. {SHARES[split]:.0%} of the documents of every source are for {split}, and "
        "copies count once. Ask for fewer tokens or a smaller window, or name more text; built in are "
        f"{', '.join(SOURCES)}."
    )
