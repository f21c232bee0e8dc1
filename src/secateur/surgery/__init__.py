"""The only room that changes shapes; masking, which computes the same without changing any."""

from secateur.surgery.mask import masked, zero_units
from secateur.surgery.slice import apply_plan, slice_model

__all__ = ["apply_plan", "masked", "slice_model", "zero_units"]
