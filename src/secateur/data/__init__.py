"""Text in, blocks of token ids out; nothing overlaps between calibration, recovery and evaluation."""

from __future__ import annotations

from secateur.data.blocks import TokenBlocks, document_end, read_ids
from secateur.data.builtin import SOURCES, Source
from secateur.data.mixture import TextSettings, check_sources, check_window, load_blocks, load_whole
from secateur.data.own_text import write_own_text
from secateur.data.sources import OWN_TEXT
from secateur.data.splits import SHARES, SPLITS, Split, split_of

__all__ = [
    "OWN_TEXT",
    "SHARES",
    "SOURCES",
    "SPLITS",
    "Source",
    "Split",
    "TextSettings",
    "TokenBlocks",
    "check_sources",
    "check_window",
    "document_end",
    "load_blocks",
    "load_whole",
    "read_ids",
    "split_of",
    "write_own_text",
]
