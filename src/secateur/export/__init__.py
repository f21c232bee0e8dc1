"""Writes the result of a run: a standard folder, verified in a fresh process, with model card and report."""

from secateur.export.adopt import Architecture, adopt_config, check_describable, check_describes_itself
from secateur.export.agreement import check_finite
from secateur.export.analysis import write_analysis
from secateur.export.artefacts import read_scores, write_artefacts
from secateur.export.card import licence_of
from secateur.export.convert import FORMS, Form
from secateur.export.huggingface import (
    ARTEFACTS,
    StandardForm,
    check_output,
    rehearse_saving,
    save_folder,
    standard_form,
    verify_saved,
)
from secateur.export.story import Comparison, Story, compare_states, mean_perplexity
from secateur.export.sums import SUMS, check_sums
from secateur.export.verify import Verification, holds_only_our_code, needs_trust, verify_folder
from secateur.export.weights import ExportSettings, written_bytes, written_dtype

__all__ = [
    "ARTEFACTS",
    "FORMS",
    "SUMS",
    "Architecture",
    "Comparison",
    "ExportSettings",
    "Form",
    "StandardForm",
    "Story",
    "Verification",
    "adopt_config",
    "check_describable",
    "check_describes_itself",
    "check_finite",
    "check_output",
    "check_sums",
    "compare_states",
    "holds_only_our_code",
    "licence_of",
    "mean_perplexity",
    "needs_trust",
    "read_scores",
    "rehearse_saving",
    "save_folder",
    "standard_form",
    "verify_folder",
    "verify_saved",
    "write_analysis",
    "write_artefacts",
    "written_bytes",
    "written_dtype",
]
