"""The only room that changes shapes; masking, which computes the same without changing any."""

from secateur.surgery.mask import masked, zero_units
from secateur.surgery.slice import apply_plan, sharing_copy, slice_model
from secateur.surgery.verify import Check, verify

__all__ = ["Check", "apply_plan", "masked", "sharing_copy", "slice_model", "verify", "zero_units"]
