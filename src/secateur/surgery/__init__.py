"""The only room that changes shapes; also masking, which computes the same without changing them."""

from secateur.surgery.input_gates import InputGates, folded
from secateur.surgery.input_masks import InputMasks
from secateur.surgery.mask import MASKABLE, masked, unproduced, zero_units
from secateur.surgery.norms import norms_over, scales_with_zeros, set_epsilon
from secateur.surgery.slice import sharing_copy, slice_model
from secateur.surgery.updates import apply_updates, check_updates, updated
from secateur.surgery.verify import Check, checked_trace, protect_failing, verify_cuts

__all__ = [
    "MASKABLE",
    "Check",
    "InputGates",
    "InputMasks",
    "apply_updates",
    "check_updates",
    "checked_trace",
    "folded",
    "masked",
    "norms_over",
    "protect_failing",
    "scales_with_zeros",
    "set_epsilon",
    "sharing_copy",
    "slice_model",
    "unproduced",
    "updated",
    "verify_cuts",
    "zero_units",
]
