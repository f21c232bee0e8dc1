"""What a run leaves behind: a standard folder, proved to open, with its model card and report."""

from secateur.export.adopt import Architecture, adopt_config, check_describes_itself
from secateur.export.card import licence_of, model_card
from secateur.export.huggingface import (
    ARTEFACTS,
    ExportSettings,
    StandardForm,
    check_output,
    save,
    standard_form,
    written_dtype,
)
from secateur.export.report import html_report
from secateur.export.story import Story
from secateur.export.verify import Verification, verify_folder

__all__ = [
    "ARTEFACTS",
    "Architecture",
    "ExportSettings",
    "StandardForm",
    "Story",
    "Verification",
    "adopt_config",
    "check_describes_itself",
    "check_output",
    "html_report",
    "licence_of",
    "model_card",
    "save",
    "standard_form",
    "verify_folder",
    "written_dtype",
]
