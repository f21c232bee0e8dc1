"""Blocks of token ids: documents cut, encoded and packed into windows of equal length."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedTokenizerBase

from secateur.data.splits import Split, fingerprint, split_of
from secateur.errors import DataError

_PIECE_CHARACTERS = 8000
_PIECES_PER_BATCH = 32
# Names under which vocabularies keep the mark that stood between documents in pre-training. Instruction-tuned models
# have another end-of-sequence token (the end of a turn), which would say something else.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class TokenBlocks:
    """Windows of token ids, each from one source."""

    ids: torch.Tensor
    """int64, ``[blocks, window]``, on the CPU."""
    sources: tuple[str, ...]
    """The source of each block."""

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.ids.dtype != torch.int64 or len(self.sources) != self.ids.shape[0]:
            raise DataError(
                f"Token blocks need int64 ids [blocks, window] and one source per block; got {self.ids.dtype} "
                f"{tuple(self.ids.shape)} and {len(self.sources)} sources."
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    @property
    def window(self) -> int:
        return self.ids.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The sources that occur, sorted."""
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
        """Only the blocks of one source (none when it does not occur)."""
        rows = [row for row, source in enumerate(self.sources) if source == name]
        return TokenBlocks(self.ids[rows], (name,) * len(rows))


@dataclass(frozen=True)
class Piece:
    """A stretch of a document, cut at a paragraph where the document is long."""

    text: str
    last: bool
    """Whether the document ends here."""


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

    Reads until there are about ``characters`` of them (not until the end, which a stream need not have), and leaves
    out documents that are already in ``seen`` (copies), to which it adds.
    """
    pieces: list[Piece] = []
    length = 0
    for document in documents:
        mark = fingerprint(document)
        if not document.strip() or mark in seen or split_of(document) != split:
            continue
        seen.add(mark)
        pieces += cut(document)
        length += len(document)
        if length >= characters:
            break
    random.shuffle(pieces)
    return pieces


def cut(document: str, size: int = _PIECE_CHARACTERS) -> list[Piece]:
    """Cut a document before blank lines into pieces of about ``size`` characters; together they are the document."""
    if len(document) <= size:
        return [Piece(document, True)]
    parts, start = [], 0
    for paragraph in re.finditer(r"\n\s*\n", document):
        if paragraph.end() - start >= size:
            parts.append(document[start : paragraph.end()])
            start = paragraph.end()
    parts.append(document[start:])
    parts = [part for part in parts if part.strip()]
    return [Piece(part, index == len(parts) - 1) for index, part in enumerate(parts)]


class Packer:
    """Packs pieces of one source into windows, encoding only as many as are asked for."""

    def __init__(self, pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase, window: int) -> None:
        self._pieces, self._tokenizer, self._window = pieces, tokenizer, window
        self._end = document_end(tokenizer)
        self._next = 0
        self._ids: list[int] = []
        self._starts: list[int] = []  # of each encoded piece in the ids

    @property
    def tokens(self) -> int:
        """How many tokens have been encoded so far."""
        return len(self._ids)

    def available(self, blocks: int) -> int:
        """How many of ``blocks`` windows there is text for."""
        while len(self._ids) < blocks * self._window and self._next < len(self._pieces):
            batch = self._pieces[self._next : self._next + _PIECES_PER_BATCH]
            self._next += len(batch)
            for piece, ids in zip(batch, encode([piece.text for piece in batch], self._tokenizer), strict=True):
                self._starts.append(len(self._ids))
                self._ids += ids
                if piece.last and self._end is not None and ids[-1:] != [self._end]:
                    self._ids.append(self._end)
        return min(blocks, len(self._ids) // self._window)

    def take(self, blocks: int) -> torch.Tensor:
        """The first ``blocks`` windows, int64 ``[blocks, window]``."""
        flat = self._ids[: self.available(blocks) * self._window]
        return torch.tensor(flat, dtype=torch.int64).reshape(-1, self._window)

    def pieces(self, blocks: int) -> list[Piece]:
        """The pieces, whole or in part, that the first ``blocks`` windows are made of."""
        tokens = self.available(blocks) * self._window
        return list(self._pieces[: bisect_left(self._starts, tokens)])


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each text, with the special tokens that the tokenizer adds by itself (often a BOS, once)."""
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=True, truncation=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    # A text rendered by a chat template may spell out the BOS that the tokenizer adds as well.
    return [row[1:] if start is not None and row[:2] == [start, start] else row for row in rows]


def read_ids(
    file: str | Path, tokenizer: PreTrainedTokenizerBase, window: int = 512, max_tokens: int | None = None
) -> torch.Tensor:
    """A whole text file as evaluation windows: encoded as one string, cut without overlap, the rest dropped.

    This is how WikiText-2 is measured in the literature. No mark is put between documents.

    Args:
        window: tokens per window.
        max_tokens: use only the first so many tokens (whole windows of them); None for all.

    Returns:
        int64 ``[blocks, window]``.

    Raises:
        DataError: the file cannot be read or does not fill one window.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}).") from error
    ids = encode([text], tokenizer)[0]
    blocks = min(len(ids), max_tokens or len(ids)) // window
    if blocks == 0:
        raise DataError(
            f"{path} has {len(ids)} tokens, of which {max_tokens or 'all'} may be used: too few for a window of "
            f"{window}."
        )
    return torch.tensor(ids[: blocks * window], dtype=torch.int64).reshape(blocks, window)
