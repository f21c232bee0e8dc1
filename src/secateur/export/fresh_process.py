"""Opens model folders without secateur: run as a script in a new interpreter, where secateur cannot be imported.

``python -I fresh_process.py JOBS RESULTS``: both are JSON files. A job is ``{"folder", "reference", "trust"}``; the
reference is a safetensors file with ``ids`` and ``logits``. A result is a flat dict of facts, or ``{"error": ...}``.
Nothing is judged here.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any


class _NoSecateur:
    """The first finder of modules. It refuses secateur."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "secateur":
            raise ModuleNotFoundError(f"{name} must not be needed to open the folder")


def _open(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    started = time.monotonic()
    opened: Any = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        trust_remote_code=job["trust"],
        dtype="auto",
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = opened
    model.eval()
    seconds = time.monotonic() - started
    reference = load_file(job["reference"])
    ids = reference["ids"]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        facts = generate(model, ids[:1], ("dynamic", "static"))
    if logits.shape != reference["logits"].shape:
        raise ValueError(f"logits have shape {list(logits.shape)} instead of {list(reference['logits'].shape)}")
    return {
        "class_name": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "seconds_to_open": round(seconds, 3),
        "logits_scale": float(reference["logits"].abs().max()),
        "logits_difference": float((logits - reference["logits"]).abs().max()),
        "same_top_token": float((logits.argmax(-1) == reference["logits"].argmax(-1)).float().mean()),
        **facts,
        **_tokenize(job, model, "generated" in facts),
    }


def generate(model: Any, ids: Any, caches: tuple[str, ...], steps: int = 6) -> dict[str, Any]:
    """Generate greedily with each kind of cache, and compare the logits with one forward pass that uses none."""
    import torch

    facts: dict[str, Any] = {}
    for cache in caches:
        options: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
        try:
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                disable_compile=True,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
            stepwise = torch.stack(made.logits, dim=1).float()
            at_once = model(input_ids=made.sequences[:, :-1], use_cache=False).logits[:, -steps:].float()
        except Exception as error:  # whatever a family raises that has no such cache
            facts[f"{cache}_cache_error"] = f"{type(error).__name__}: {error}"
            continue
        facts[f"{cache}_cache_difference"] = float((stepwise - at_once).abs().max())
        facts["generated"] = made.sequences[0, -steps:].tolist()
    return facts


def _tokenize(job: dict[str, Any], model: Any, generates: bool) -> dict[str, Any]:
    """Open the tokenizer, when the folder has one, and send a sentence through it; let the model write some text."""
    from transformers import AutoTokenizer

    folder = Path(job["folder"])
    if not any(list(folder.glob(name)) for name in ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")):
        return {"tokenizer": None}
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=job["trust"], local_files_only=True)
    ids = tokenizer("The quick brown fox jumps over the lazy dog.")["input_ids"]
    facts = {"tokenizer": type(tokenizer).__name__, "tokens_in_a_sentence": len(ids)}
    start = tokenizer("The quick brown fox", return_tensors="pt", add_special_tokens=False)["input_ids"]
    if generates and int(start.max()) < model.get_input_embeddings().weight.shape[0]:
        options = {"max_new_tokens": 24, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
        made = model.generate(start, attention_mask=start.new_ones(start.shape), **options)
        facts["sample"] = tokenizer.decode(made[0, start.shape[1] :], skip_special_tokens=True)
    return facts


def main(jobs: str, results: str) -> None:
    sys.meta_path.insert(0, _NoSecateur())
    import torch
    import transformers

    plan = json.loads(Path(jobs).read_text())
    torch.set_num_threads(plan["threads"])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answers = []
    for job in plan["jobs"]:
        try:
            answer = _open(job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answer |= {"transformers": transformers.__version__, "torch": torch.__version__}
        answers.append(answer)
    Path(results).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
