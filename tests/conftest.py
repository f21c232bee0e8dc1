"""What all tests share: every test draws the same random numbers each time."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _the_same_draw() -> None:
    torch.manual_seed(0)
