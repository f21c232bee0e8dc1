"""Turns text into blocks of token ids. Calibration, recovery and evaluation share no document."""

from __future__ import annotations

from secateur.data.blocks import TokenBlocks, check_blocks, check_ids, document_end, read_ids
from secateur.data.builtin import SOURCES, Source
from secateur.data.mixture import TextSettings, check_sources, check_window, load_blocks, load_whole
from secateur.data.sources import OWN_TEXT
from secateur.data.splits import SHARES, SPLITS, Split, split_of
from secateur.data.texts import Purpose, Texts, read_texts

__all__ = [
    "OWN_TEXT",
    "SHARES",
    "SOURCES",
    "SPLITS",
    "Purpose",
    "Source",
    "Split",
    "TextSettings",
    "Texts",
    "TokenBlocks",
    "check_blocks",
    "check_ids",
    "check_sources",
    "check_window",
    "document_end",
    "load_blocks",
    "load_whole",
    "read_ids",
    "read_texts",
    "split_of",
]
