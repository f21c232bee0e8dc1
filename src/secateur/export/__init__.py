"""What a run leaves behind: a standard folder, proved to open, with its model card and report."""

from secateur.export.adopt import Architecture, adopt_config, check_describable, check_describes_itself
from secateur.export.analysis import write_analysis
from secateur.export.artefacts import write_artefacts
from secateur.export.card import licence_of
from secateur.export.convert import FORMS, Form
from secateur.export.huggingface import (
    ARTEFACTS,
    ExportSettings,
    StandardForm,
    check_output,
    save,
    standard_form,
    verify_saved,
    written_dtype,
)
from secateur.export.story import Comparison, Story, compare_states
from secateur.export.verify import Verification, needs_trust, verify_folder

__all__ = [
    "ARTEFACTS",
    "FORMS",
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
    "check_output",
    "compare_states",
    "licence_of",
    "needs_trust",
    "save",
    "standard_form",
    "verify_folder",
    "verify_saved",
    "write_analysis",
    "write_artefacts",
    "written_dtype",
]
