"""Reads, writes and sums the rows of units in the weights of a model, and differentiates them through ``W + s B A``."""

from __future__ import annotations

from secateur.units.adapter import Adapter, adapter_of
from secateur.units.rows import Rows, UnitRows, rows_of, squared_norms, zeroed
from secateur.units.sums import base_members, base_parameters, other_axes, sum_rows, sum_units
from secateur.units.weights import (
    active_adapters,
    adapter_delta,
    dequantised,
    effective_weight,
    is_adapter_parameter,
    lora_layer,
    stored_weight,
    tensor_at,
    tensors_of,
)

__all__ = [
    "Adapter",
    "Rows",
    "UnitRows",
    "active_adapters",
    "adapter_delta",
    "adapter_of",
    "base_members",
    "base_parameters",
    "dequantised",
    "effective_weight",
    "is_adapter_parameter",
    "lora_layer",
    "other_axes",
    "rows_of",
    "squared_norms",
    "stored_weight",
    "sum_rows",
    "sum_units",
    "tensor_at",
    "tensors_of",
    "zeroed",
]
