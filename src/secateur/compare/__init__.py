"""Methods side by side under one recipe: same groups, same text, same training budget, same evaluation."""

from __future__ import annotations

from secateur.compare.report import columns_of, shown
from secateur.compare.rows import Leaderboard, Row
from secateur.compare.run import compare, schedule_of, split_overrides

__all__ = ["Leaderboard", "Row", "columns_of", "compare", "schedule_of", "shown", "split_overrides"]
