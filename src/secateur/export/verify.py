"""Proves that a saved folder opens without secateur and computes what the model in memory computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file

from secateur.errors import VerificationError
from secateur.export import fresh_process
from secateur.export.runtimes import Verdict, runtimes_of

_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference of logits by dtype, as a fraction of the largest logit (kernels may differ in rounding)."""


class Verification(BaseModel):
    """What a fresh process found; written to ``verification.json``. Numbers in units of logits."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    class_name: str
    """Class that transformers built."""
    trust_remote_code: bool
    """Whether the folder needs it."""
    note: str
    dtype: str
    parameters: int
    """Counted in the opened model, tied ones once."""
    logits_difference: float
    """Largest difference between the opened model and the one in memory, both in ``dtype``."""
    logits_scale: float
    """Largest logit, for comparison."""
    same_top_token: float
    """Fraction of positions where both predict the same token."""
    dynamic_cache_difference: float | None = None
    """Largest difference between generating with a cache and one pass without; None where that does not work,
    neither in the folder nor in memory."""
    dynamic_cache_error: str | None = None
    """Why it does not."""
    static_cache_difference: float | None = None
    """The same for a static cache, which many families lack."""
    static_cache_error: str | None = None
    generated: list[int] = []
    """Token ids that were generated greedily."""
    sample: str | None = None
    """What it writes greedily after "The quick brown fox"; None without a tokenizer or a cache to generate with."""
    tokenizer: str | None
    tokens_in_a_sentence: int | None = None
    """Of "The quick brown fox jumps over the lazy dog."."""
    seconds_to_open: float
    versions: dict[str, str]
    runtimes: list[Verdict]

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")


class Reference(NamedTuple):
    """A folder, with what the model in memory answers."""

    folder: Path
    ids: torch.Tensor
    """``[batch, length]``"""
    logits: torch.Tensor
    """``[batch, length, vocabulary]``, float32, computed in the type that the folder's weights have."""
    cache_difference: float | None = 0.0
    """Difference that a cache makes to the model in memory; None when that cannot generate with one."""
    static_difference: float | None = 0.0
    """The same for a static cache, which some families have got wrong (GPT-Neo in transformers 5.23)."""
    note: str = ""


def verify_folder(reference: Reference) -> Verification:
    """Open a folder in a fresh process without secateur and compare it with the model in memory.

    Code from the folder is executed only when its config names some. Raises VerificationError.
    """
    return judge(reference, open_folders([reference])[0])


def open_folders(references: Sequence[Reference]) -> list[dict[str, Any]]:
    """What one fresh process finds in each folder, for ``judge``; raises VerificationError when the process dies."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for number, reference in enumerate(references):
            file = Path(scratch) / f"{number}.safetensors"
            save_file({"ids": reference.ids.contiguous(), "logits": reference.logits.float().contiguous()}, file)
            folder = reference.folder.absolute()
            jobs.append({"folder": str(folder), "reference": str(file), "trust": needs_trust(folder)})
        return _run(jobs, Path(scratch))


def needs_trust(folder: Path) -> bool:
    """Whether the folder names code of its own."""
    return "auto_map" in json.loads((folder / "config.json").read_text())


def _run(jobs: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    (scratch / "jobs.json").write_text(json.dumps({"threads": torch.get_num_threads(), "jobs": jobs}))
    # The folder's code is cached by transformers per path: a new cache, so that nothing old is found.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-I", fresh_process.__file__, str(scratch / "jobs.json"), str(scratch / "answers.json")]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (scratch / "answers.json").is_file():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise VerificationError(f"The fresh process that should open the folder ended with {done.returncode}:\n{last}")
    answers: list[dict[str, Any]] = json.loads((scratch / "answers.json").read_text())
    return answers


def judge(reference: Reference, answer: dict[str, Any]) -> Verification:
    """The verdict over what ``open_folders`` found; raises VerificationError unless everything agrees."""
    name, answer = reference.folder.name, dict(answer)
    if "error" in answer:
        raise VerificationError(f"{name} does not open in a fresh process: {answer['error']}")
    wrong = answer.pop("missing_keys") + answer.pop("unexpected_keys")
    if wrong:
        raise VerificationError(f"{name} opens, but not all weights find their place: {', '.join(wrong[:3])}.")
    if "dynamic_cache_error" in answer and reference.cache_difference is not None:
        raise VerificationError(f"{name} opens, but cannot generate: {answer['dynamic_cache_error']}")
    allowed = _TOLERANCE.get(answer["dtype"], 1e-4) * max(answer["logits_scale"], 1.0)
    differences = {
        "logits_difference": 0.0,
        "dynamic_cache_difference": reference.cache_difference,
        "static_cache_difference": reference.static_difference,
    }
    in_order = [what for what, before in differences.items() if before is not None and before <= allowed]
    for what in in_order:  # what was not right in memory cannot be asked of the folder
        if not answer.get(what, 0.0) <= allowed:  # also true for NaN
            raise VerificationError(
                f"{name} opens, but computes something else: {what.replace('_', ' ')} is {answer[what]:.3g}, allowed "
                f"is {allowed:.3g} in {answer['dtype']}. Nothing was written under that name."
            )
    versions = {library: answer.pop(library) for library in ("transformers", "torch")}
    return Verification(
        **answer,
        trust_remote_code=needs_trust(reference.folder),
        note=reference.note,
        versions=versions,
        runtimes=runtimes_of(json.loads((reference.folder / "config.json").read_text())),
    )
