"""Peak memory says the same of the same work, whatever was done before it."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from secateur.evaluation.memory import PeakMemory

PIECES, PIECE = 400, 1 << 18  # 100 MiB of tensors that come from the heap


def work() -> int:
    """Bytes of ``extra`` for tensors that are all alive at once."""
    with PeakMemory(torch.device("cpu")) as memory:
        tensors = [torch.ones(PIECE // 4) for _ in range(PIECES)]
        assert len(tensors) == PIECES
    return memory.extra


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the heap of glibc"
)
def test_the_same_work_takes_the_same_memory_again() -> None:
    found = [work() for _ in range(3)]
    assert min(found) > 0.9 * PIECES * PIECE
    assert max(found) < 1.1 * PIECES * PIECE


def test_what_is_freed_within_counts_in_the_peak() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        big = torch.ones(16 << 20)
        memory._look()
        del big
    assert memory.extra > 60 << 20
    assert memory.peak == memory.start + memory.extra
