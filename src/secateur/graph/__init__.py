"""Discovering what can be cut: one recorded forward pass with symbolic axes."""

from secateur.graph.replay import Replayed, replay
from secateur.graph.trace import Trace, record, trace

__all__ = ["Replayed", "Trace", "record", "replay", "trace"]
