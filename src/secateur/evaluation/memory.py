"""Peak memory of a piece of work: what CUDA counts, or else the resident memory of this process, looked at often."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading

import psutil
import torch

_SECONDS = 0.005
"""How often the resident memory is read: a tensor that lives for a shorter time may be missed."""


class PeakMemory:
    """A context manager; afterwards ``peak`` and ``start`` hold bytes.

    On CUDA these are the bytes that torch has allocated on ``device``. Elsewhere they are the resident memory of the
    process, interpreter and libraries included, so that ``extra``, what came on top of the start, says more. What is
    free is handed back to the system first: glibc keeps what earlier work has freed, and memory taken from there
    would not be counted. Where the C library is another one, earlier work may still hide some.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.peak = 0
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    @property
    def extra(self) -> int:
        """Bytes on top of what was there at the start."""
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
    """Let go of what nothing refers to, and of the pages that glibc keeps of it."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
