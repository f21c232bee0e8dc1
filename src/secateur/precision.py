"""The type of matrix products (weights are in float32), and the widths that their kernels support."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]
"""``bf16``: autocast over fp32 weights; ``fp32``: no autocast; ``auto``: bf16 where the processor supports it."""

GROUPED_MULTIPLE = 8
"""Every kernel of grouped matrix products supports widths of stacked experts that are multiples of this."""


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type to autocast to on this device, or None to compute in the weights' own type."""
    if precision == "bf16" or (precision == "auto" and _computes_in_bf16(device)):
        return torch.bfloat16
    return None


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which matrix products are computed in ``precision``."""
    dtype = autocast_dtype(precision, device)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def sums_device(device: torch.device) -> torch.device:
    """Where sums in float64 of tensors on ``device`` are kept: there, or on the CPU for mps, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def in_float64(x: torch.Tensor) -> torch.Tensor:
    """``x`` in float64, on ``sums_device`` of its device."""
    return x.to(sums_device(x.device)).double()
