"""Blocks of token ids: documents cut, encoded and packed into windows of equal length."""

from __future__ import annotations

import hashlib
import re
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.data.marks import encode, marks_of
from secateur.data.splits import Split, fingerprint, split_of
from secateur.errors import DataError
from secateur.reading import open_text, path_of

_PIECE_CHARACTERS = 8000
_LONGEST_PIECE = 100_000
"""Longest text without a blank line that is encoded as one piece, in characters."""
_PIECES_PER_BATCH = 32
_BATCH_CHARACTERS = 100_000
_WHOLE_UP_TO = 100_000
"""Characters of a ``.txt`` file that are always read, for any number of tokens."""
_CHARACTERS_PER_TOKEN = 16  # generous: English has about 4
_SURPLUS = 64
"""Tokens beyond those needed: the last tokens of a part may differ from those of the whole text."""
# Names of the token between documents in pre-training. Instruction-tuned models have another end-of-sequence token (the
# end of a turn), which has another meaning.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class TokenBlocks:
    """Windows of token ids, each from one source."""

    ids: torch.Tensor
    """int64, ``[blocks, window]``, on the CPU."""
    sources: tuple[str, ...]
    """The source of each block."""
    marks: tuple[int, ...] = ()
    """Tokens at the start of every window, counted within it: the marks that the tokenizer puts before a text (BOS)."""

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64 or len(self.sources) != self.ids.shape[0]:
            raise DataError(
                f"Token blocks need int64 ids [blocks, window] and one source per block; got {self.ids.dtype} "
                f"{tuple(self.ids.shape)} and {len(self.sources)} sources."
            )
        begin = self.ids[:, : len(self.marks)]
        if not bool((begin == torch.tensor(self.marks, dtype=torch.int64)).all()):
            raise DataError(f"Not every token block begins with the marks {list(self.marks)}.")

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def window(self) -> int:
        return self.ids.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources of the blocks, sorted."""
        return tuple(sorted(set(self.sources)))

    @property
    def digest(self) -> str:
        """The first 16 digits of a SHA-256 of ids, window and sources."""
        found = hashlib.sha256(repr((self.window, self.sources)).encode())
        found.update(self.ids.numpy().tobytes())
        return found.hexdigest()[:16]

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """The ids in order, at most ``size`` blocks at a time."""
        yield from self.ids.split(size)

    def of_source(self, name: str) -> TokenBlocks:
        """Only the blocks of one source; empty when there are none."""
        return self.rows([row for row, source in enumerate(self.sources) if source == name])

    def rows(self, rows: Sequence[int]) -> TokenBlocks:
        """The blocks with these numbers, in this order."""
        return TokenBlocks(self.ids[list(rows)], tuple(self.sources[row] for row in rows), self.marks)


@dataclass(frozen=True)
class Piece:
    """A part of a document; long documents are cut at paragraphs."""

    text: str
    last: bool
    """Whether the document ends here."""
    first: bool = True
    """Whether a text begins here: a document, or a part that does not continue the piece before it."""


def document_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token put after every document; None when the tokenizer has no such token."""
    vocabulary = tokenizer.get_vocab()
    for mark in _DOCUMENT_ENDS:
        if mark in vocabulary:
            return int(vocabulary[mark])
    end = tokenizer.eos_token_id
    return end if isinstance(end, int) else None


def pieces_of_split(
    documents: Iterable[str], split: Split, characters: int, seen: set[bytes], random: Random
) -> list[Piece]:
    """Pieces of the documents of one split, in random order.

    Reads until there are about ``characters`` characters (not to the end, which a stream may not have). Documents in
    ``seen`` are copies, and are left out; new ones are added to it.
    """
    pieces: list[Piece] = []
    length = 0
    for document in documents:
        mark = fingerprint(document)
        if not document.strip() or mark in seen or split_of(document) != split:
            continue
        seen.add(mark)
        pieces += cut_document(document)
        length += len(document)
        if length >= characters:
            break
    random.shuffle(pieces)
    return [replace(piece, first=True) for piece in pieces]


def cut_document(document: str, size: int = _PIECE_CHARACTERS) -> list[Piece]:
    """Cut a document before blank lines into pieces of about ``size`` characters; together they are the document."""
    if len(document) <= size:
        return [Piece(document, True)]
    parts, start = [], 0
    for paragraph in re.finditer(r"\n\s*\n", document):
        if paragraph.end() - start >= size:
            parts.append(document[start : paragraph.end()])
            start = paragraph.end()
    parts.append(document[start:])
    parts = [short for part in parts for short in _shortened(part) if short.strip()]
    return [Piece(part, index == len(parts) - 1, index == 0) for index, part in enumerate(parts)]


def _shortened(part: str) -> Iterator[str]:
    """``part`` itself, or where it is longer than ``_LONGEST_PIECE``, parts of it that end with a space if they can."""
    start = 0
    while len(part) - start > _LONGEST_PIECE:
        space = part.rfind(" ", start, start + _LONGEST_PIECE)
        end = space + 1 if space >= start else start + _LONGEST_PIECE
        yield part[start:end]
        start = end
    yield part[start:]


class Packer:
    """Packs pieces of one source into windows. It reads and encodes only as many pieces as needed.

    Every window begins with the marks that the tokenizer puts before a text, if any; they are counted within it. From
    one window to the next no token of the text is lost. Where a text begins within a window, the marks are put there
    as well, as in pre-training, and are tokens like others. After its end follow the marks that the tokenizer puts
    after a text, or else the token between documents of pre-training (``document_end``).
    """

    def __init__(self, pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        """Raises DataError when a window has no room for text beside the marks, or the tokenizer encodes nothing."""
        self._waiting, self._tokenizer, self._window = iter(pieces), tokenizer, window
        self.marks = marks_of(tokenizer)
        if window <= len(self.marks.before):
            raise DataError(
                f"A window of {window} has no room for text: the tokenizer begins each with {len(self.marks.before)} "
                "tokens of its own. Give a larger window."
            )
        end = document_end(tokenizer)
        self._end = self.marks.after or (() if end is None else (end,))
        self._pieces: list[Piece] = []  # that have been encoded
        self._starts: list[int] = []  # of each of them in the ids
        self._ids: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._used: list[int] = [0]  # of the ids, by the first so many windows

    @property
    def tokens(self) -> int:
        """Number of tokens encoded so far."""
        return len(self._ids)

    def available(self, blocks: int) -> int:
        """Number of windows, at most ``blocks``, that the text can fill."""
        while len(self._rows) < blocks and (self._fill() or self._read()):
            pass
        return min(blocks, len(self._rows))

    def take(self, blocks: int) -> torch.Tensor:
        """The first ``blocks`` windows, int64 ``[blocks, window]``."""
        rows = self._rows[: self.available(blocks)]
        return torch.stack(rows) if rows else torch.empty(0, self._window, dtype=torch.int64)

    def first(self, tokens: int | None, name: str) -> torch.Tensor:
        """All windows, or those of the first ``tokens``. Raises DataError about the file ``name`` when there is
        none."""
        rows = self.take((sys.maxsize if tokens is None else tokens) // self._window)
        if len(rows) == 0:
            raise DataError(
                f"{name} has {self.tokens} tokens, of which {tokens or 'all'} may be used: too few for a window of "
                f"{self._window}."
            )
        return rows

    def pieces(self, blocks: int) -> list[Piece]:
        """The pieces in the first ``blocks`` windows, whole or in part."""
        return list(self._pieces[: bisect_left(self._starts, self._used[self.available(blocks)])])

    def _fill(self) -> bool:
        """Make the next window; False when there are too few ids for it."""
        start, before = self._used[-1], self.marks.before
        # marks that are here already, or began at the end of the window before, are not repeated
        places = range(min(len(before), start + 1))
        there = (n for n in places if tuple(self._ids[start - n : start - n + len(before)]) == before)
        missing = next(there, len(before))
        end = start + self._window - missing
        if end > len(self._ids):
            return False
        self._rows.append(torch.tensor([*before[:missing], *self._ids[start:end]], dtype=torch.int64))
        self._used.append(end)
        return True

    def _read(self) -> bool:
        """Encode the next pieces; False when there are none."""
        batch: list[Piece] = []
        characters = 0
        for piece in self._waiting:
            batch.append(piece)
            characters += len(piece.text)
            if len(batch) == _PIECES_PER_BATCH or characters >= _BATCH_CHARACTERS:
                break
        for piece, ids in zip(batch, encode([piece.text for piece in batch], self._tokenizer, self.marks), strict=True):
            self._pieces.append(piece)
            self._starts.append(len(self._ids))
            before = self.marks.before
            if before and piece.first and before not in (tuple(ids[: len(before)]), tuple(self._ids[-len(before) :])):
                self._ids += before
            self._ids += ids
            if piece.last and self._end and tuple(ids[-len(self._end) :]) != self._end:
                self._ids += self._end
        return bool(batch)


def read_ids(
    file: str | Path, tokenizer: PreTrainedTokenizerBase, window: int = 512, max_tokens: int | None = None
) -> torch.Tensor:
    """A whole text file as evaluation windows: encoded as one string, cut without overlap, the rest dropped.

    WikiText-2 is measured in this way in the literature. There is no mark between documents. Each window begins with
    the marks that the tokenizer puts before a text.

    Args:
        window: tokens per window, marks included.
        max_tokens: number of tokens to use from the start, in whole windows; None for all. With a number, only the
            beginning of a long file is read and encoded: 100,000 characters, or 16 for each token if that is more. It
            is doubled until it gives these tokens and 64 more. The 64 are not used, because the end of a part may be
            encoded in another way than in the whole text.

    Returns:
        int64 ``[blocks, window]``.

    Raises:
        DataError: the file cannot be read or does not fill one window.
    """
    path = path_of(file, "The text", DataError)
    size = -1 if max_tokens is None else max(_WHOLE_UP_TO, max_tokens * _CHARACTERS_PER_TOKEN)
    text = ""
    with open_text(path, error=DataError) as opened:
        while True:
            more = opened.read(size)
            text += more
            packer = Packer([Piece(text, last=False)], tokenizer, window)
            packer.available(1)
            if max_tokens is None or len(more) < size or packer.tokens >= max_tokens + _SURPLUS:
                return packer.first(max_tokens, str(path))
            size = len(text)


def check_blocks(blocks: TokenBlocks, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError when a source has tokens without a row in ``model``, because its tokenizer has more tokens.

    A tokenizer that is larger than the model is allowed if the text does not use the surplus tokens.
    """
    for name in blocks.names:
        check_ids(blocks.of_source(name).ids, model, f"{name}, read by a tokenizer of {len(tokenizer):,} tokens,")


def check_ids(ids: torch.Tensor, model: nn.Module, what: str) -> None:
    """Raise DataError when a token of ``ids`` has no row in the embedding or the head of ``model``.

    Args:
        what: start of the message, such as ``The text news.txt``.
    """
    highest = int(ids.max()) if ids.numel() else -1
    for layer, name in ((_get(model, "input"), "embedding"), (_get(model, "output"), "output head")):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and highest >= weight.shape[0]:
            raise DataError(
                f"{what} has tokens up to id {highest}, and the model's {name} has {weight.shape[0]} rows (ids 0 to "
                f"{weight.shape[0] - 1}): the tokenizer knows tokens that the model does not. Use the tokenizer that "
                f"the model was trained with, or text without these tokens."
            )


def _get(model: nn.Module, which: str) -> nn.Module | None:
    """The ``input`` or ``output`` embeddings of a model of transformers; None when they are not known."""
    try:
        found = getattr(model, f"get_{which}_embeddings")()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None
