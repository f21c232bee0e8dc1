"""The stages of a run: each callable alone (``making``), and in order (``STAGES``)."""

from __future__ import annotations

from secateur.stages.making import (
    cut,
    decide,
    keep_teacher,
    losses,
    measure,
    measure_dense,
    reconstruct_weights,
    recover_weights,
    repair_weights,
    save,
    size,
)
from secateur.stages.order import STAGES, Stage, make, take_up
from secateur.stages.refusals import refuse_what_cannot_work
from secateur.stages.rehearsal import contents, rehearse, rehearse_output
from secateur.stages.result import Baseline, Measured, Metrics, Result, plan_for
from secateur.stages.sizing import (
    effort_for,
    is_sized,
    sized,
    spare_texts,
    texts_of,
    with_more_time,
    with_possible_repair,
    with_text,
)

__all__ = [
    "STAGES",
    "Baseline",
    "Measured",
    "Metrics",
    "Result",
    "Stage",
    "contents",
    "cut",
    "decide",
    "effort_for",
    "is_sized",
    "keep_teacher",
    "losses",
    "make",
    "measure",
    "measure_dense",
    "plan_for",
    "reconstruct_weights",
    "recover_weights",
    "refuse_what_cannot_work",
    "rehearse",
    "rehearse_output",
    "repair_weights",
    "save",
    "size",
    "sized",
    "spare_texts",
    "take_up",
    "texts_of",
    "with_more_time",
    "with_possible_repair",
    "with_text",
]
