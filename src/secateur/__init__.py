"""secateur: cut whole structures out of language models, guided by LoRA, and grow the lost knowledge back."""

from __future__ import annotations
