"""Peak memory of a piece of work: CUDA's own count, or else samples of the resident memory of this process."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading

import psutil
import torch

_SECONDS = 0.005
"""Seconds between two samples of the resident memory. A tensor with a shorter life may be missed."""


class PeakMemory:
    """A context manager; afterwards ``peak`` and ``start`` are bytes.

    On CUDA these are the bytes that torch has allocated on ``device``. Elsewhere they are the resident memory of the
    process, interpreter and libraries included; ``extra``, the bytes on top of the start, is then more useful. Freed
    memory is first returned to the system: glibc keeps the memory that earlier work has freed, and reusing it would not
    be counted. With another C library, earlier work may still hide some.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def extra(self) -> int:
        """Bytes on top of those at the start."""
        return self.peak - self.start

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start = torch.cuda.memory_allocated(self.device)
            return self
        _give_back()
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._watcher is None:
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self._stop.set()
        self._watcher.join()
        self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(_SECONDS):
            self._look()


def _give_back() -> None:
    """Release unreferenced objects, and return the pages that glibc keeps of them."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
