"""Running calibration text through a model, whole or layer by layer, while collectors look at it."""

from __future__ import annotations

from secateur.walk.borrow import borrowed, input_device, recomputed
from secateur.walk.calibration import Calibration, CalibrationSettings, calibration_for, mean_loss_backward
from secateur.walk.inputs import EnoughError, Inputs, Moments, Statistic, watched
from secateur.walk.layers import Walker
from secateur.walk.stack import LayerStack

__all__ = [
    "Calibration",
    "CalibrationSettings",
    "EnoughError",
    "Inputs",
    "LayerStack",
    "Moments",
    "Statistic",
    "Walker",
    "borrowed",
    "calibration_for",
    "input_device",
    "mean_loss_backward",
    "recomputed",
    "watched",
]
