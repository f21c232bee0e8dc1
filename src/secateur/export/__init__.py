"""What a run leaves behind: a standard folder, proved to open, with its model card and report."""

from secateur.export.huggingface import (
    ARTEFACTS,
    ExportSettings,
    StandardForm,
    check_output,
    save,
    standard_form,
    written_dtype,
)
from secateur.export.verify import Verification, verify_folder

__all__ = [
    "ARTEFACTS",
    "ExportSettings",
    "StandardForm",
    "Verification",
    "check_output",
    "save",
    "standard_form",
    "verify_folder",
    "written_dtype",
]
