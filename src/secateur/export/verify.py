"""Verifies that a saved folder opens without secateur and computes the same as the model in memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from secateur.errors import VerificationError
from secateur.export import fresh_process
from secateur.export.agreement import is_small
from secateur.export.runtimes import Verdict, runtimes_of
from secateur.finite import all_finite
from secateur.reading import read_json
from secateur.surgery.rebuild import MODELING_FILE, auto_map_of, modeling_source

_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference of logits by dtype, as a fraction of the largest logit (kernels may differ in rounding)."""
_FACTS = ("missing_keys", "unexpected_keys", "dtype", "parameters", "logits_scale", "logits_difference")
"""Keys of an answer that a verdict needs."""


class Verification(BaseModel):
    """The results of a fresh process; written to ``verification.json``. Numbers are in units of logits."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    class_name: str
    """Class that transformers built."""
    trust_remote_code: bool
    """Whether the folder needs ``trust_remote_code=True``."""
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
    """Largest difference of logits between generation with a cache and one pass without. None when generation with a
    cache works neither in the folder nor in memory."""
    dynamic_cache_error: str | None = None
    """Why it does not work."""
    static_cache_difference: float | None = None
    """The same for a static cache, which many families lack."""
    static_cache_error: str | None = None
    generated: list[int] = []
    """Token ids that were generated greedily."""
    sample: str | None = None
    """Its greedy continuation of "The quick brown fox"; None without a tokenizer, or when a cache does not work."""
    tokenizer: str | None
    tokens_in_a_sentence: int | None = None
    """Token ids of "The quick brown fox jumps over the lazy dog."."""
    seconds_to_open: float
    versions: dict[str, str]
    runtimes: list[Verdict]

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")


class Reference(NamedTuple):
    """A folder, with the answers of the model in memory."""

    folder: Path
    ids: torch.Tensor
    """``[batch, length]``"""
    logits: torch.Tensor
    """``[batch, length, vocabulary]``, float32, computed in the type that the folder's weights have."""
    cache_difference: float | None = 0.0
    """Difference of logits with a cache for the model in memory; None when it cannot generate with one."""
    static_difference: float | None = 0.0
    """The same for a static cache, which some families have got wrong (GPT-Neo in transformers 5.23)."""
    note: str = ""
    trusted: bool = False
    """Whether foreign code in the folder may be run: it already runs in this process, or the user trusts it."""


def verify_folder(reference: Reference) -> Verification:
    """Open a folder in a fresh process without secateur and compare it with the model in memory.

    Code from the folder is executed only if secateur wrote it, or if it is trusted. Raises VerificationError.
    """
    return judge(reference, open_folders([reference])[0])


def open_folders(references: Sequence[Reference]) -> list[dict[str, Any]]:
    """The answers of one fresh process for each folder, for ``judge``; raises VerificationError when it dies."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = []
        for number, reference in enumerate(references):
            file = Path(scratch) / f"{number}.safetensors"
            save_file({"ids": reference.ids.contiguous(), "logits": reference.logits.float().contiguous()}, file)
            folder = reference.folder.absolute()
            if needs_trust(folder) and not (reference.trusted or holds_only_our_code(folder)):
                raise VerificationError(
                    f"{folder} names code that secateur did not write (auto_map), and was not opened. If you trust it, "
                    "add --trust-remote-code."
                )
            jobs.append({"folder": str(folder), "reference": str(file), "trust": needs_trust(folder)})
        answers = _run(jobs, Path(scratch))
    if len(answers) != len(references):
        raise VerificationError(f"The fresh process answers for {len(answers)} of {len(references)} folders.")
    return answers


def needs_trust(folder: Path) -> bool:
    """Whether the folder names code, its own or another's, which runs with ``trust_remote_code=True``."""
    return any("auto_map" in content for content in _named_in(folder))


def holds_only_our_code(folder: Path) -> bool:
    """Whether all code named in the folder is the modelling file of secateur, byte for byte."""
    config, *others = _named_in(folder)
    name = str((config.get("auto_map") or {}).get("AutoModelForCausalLM"))
    family = getattr(transformers, name.removeprefix(f"{Path(MODELING_FILE).stem}.Pruned"), None)
    if any("auto_map" in other for other in others) or not isinstance(family, type):
        return False
    if not issubclass(family, PreTrainedModel) or config["auto_map"] != auto_map_of(family):
        return False
    code = list(folder.rglob("*.py"))
    return code == [folder / MODELING_FILE] and code[0].read_bytes() == modeling_source(family).encode()


def _named_in(folder: Path) -> list[dict[str, Any]]:
    """config.json, and the other files that may name code: tokenizer and processors."""
    files = [folder / "config.json", *sorted(path for path in folder.glob("*_config.json") if path.is_file())]
    contents = [read_json(file) for file in files]
    return [content if isinstance(content, dict) else {} for content in contents]


def _run(jobs: list[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    (scratch / "jobs.json").write_text(json.dumps({"threads": torch.get_num_threads(), "jobs": jobs}))
    # transformers caches the folder's code by path: a new cache avoids old code.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
    command = [sys.executable, "-I", fresh_process.__file__, str(scratch / "jobs.json"), str(scratch / "answers.json")]
    done = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (scratch / "answers.json").is_file():
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise VerificationError(f"The fresh process that should open the folder ended with {done.returncode}:\n{last}")
    answers: list[dict[str, Any]] = json.loads((scratch / "answers.json").read_text())
    return answers


def judge(reference: Reference, answer: dict[str, Any]) -> Verification:
    """The verdict for an answer of ``open_folders``; raises VerificationError unless everything agrees."""
    name, answer = reference.folder.name, dict(answer)
    if "error" in answer:
        raise VerificationError(f"{name} does not open in a fresh process: {answer['error']}")
    lost = [fact for fact in _FACTS if answer.get(fact) is None]
    if lost or not reference.logits.numel() or not all_finite(reference.logits):
        what = (
            f"the fresh process does not report its {', '.join(lost)}" if lost else "the model's logits are not finite"
        )
        raise VerificationError(f"{name} cannot be verified: {what}.")
    wrong = answer.pop("missing_keys") + answer.pop("unexpected_keys")
    if wrong:
        raise VerificationError(f"{name} opens, but not all weights have a place in the model: {', '.join(wrong[:3])}.")
    allowed = _TOLERANCE.get(answer["dtype"], 1e-4) * max(answer["logits_scale"], 1.0)
    _check_difference(name, answer, "logits_difference", allowed)
    if reference.cache_difference is not None and not math.isfinite(reference.cache_difference):
        raise VerificationError(f"{name} cannot be verified: what the model in memory generates is not finite.")
    before = {"dynamic": reference.cache_difference, "static": reference.static_difference}
    for cache, difference in before.items():
        if is_small(difference, allowed):  # a fault in memory cannot be blamed on the folder
            if f"{cache}_cache_error" in answer:
                raise VerificationError(f"{name} opens, but cannot generate: {answer[f'{cache}_cache_error']}")
            _check_difference(name, answer, f"{cache}_cache_difference", allowed)
        elif not math.isfinite(answer.get(f"{cache}_cache_difference", 0.0)):
            answer[f"{cache}_cache_error"] = "Its generated logits are not finite, neither in the folder nor in memory."
            del answer[f"{cache}_cache_difference"]
    versions = {library: answer.pop(library) for library in ("transformers", "torch")}
    return Verification(
        **answer,
        trust_remote_code=needs_trust(reference.folder),
        note=reference.note,
        versions=versions,
        runtimes=runtimes_of(json.loads((reference.folder / "config.json").read_text())),
    )


def _check_difference(name: str, answer: dict[str, Any], what: str, allowed: float) -> None:
    """Raise VerificationError unless the difference exists, is a number, and is at most ``allowed``."""
    found = answer.get(what)
    if not is_small(found, allowed):
        shown = "missing" if found is None else f"{found:.3g}"
        raise VerificationError(
            f"{name} opens, but computes something else: {what.replace('_', ' ')} is {shown}, allowed is {allowed:.3g} "
            f"in {answer['dtype']}. Nothing was written under that name."
        )
