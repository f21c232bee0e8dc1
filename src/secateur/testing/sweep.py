"""Every causal language model that transformers knows: trace, verify, cut, generate, adapt, save, reload.

``python -m secateur.testing.sweep --out FOLDER`` writes one line of JSON for each model type, and can be stopped and
started again; with ``--docs FILE`` the results become ``docs/architectures.md``.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from secateur.errors import SecateurError, VerificationError
from secateur.export.huggingface import write
from secateur.export.verify import Reference, judge, open_folders
from secateur.graph import Trace, record
from secateur.loading import quiet_transformers
from secateur.surgery import protect_failing, sharing_copy, slice_model
from secateur.surgery.verify import checks, legal_units
from secateur.testing.architectures import summary, table
from secateur.testing.contracts import with_adapters
from secateur.testing.zoo import MODEL_TYPES, UNBUILDABLE, build_any
from secateur.types import DependencyGraph, Kept, Kind

TOLERANCE = 1e-4


class TooSlow(Exception):  # noqa: N818
    """A model type takes longer than it may."""


def examine(model_type: str, seed: int, folder: Path) -> tuple[dict[str, Any], list[tuple[str, Reference]]]:
    """Everything about one type but reloading; returns the facts, and the folders in ``folder`` that wait for it."""
    started = time.process_time()
    facts: dict[str, Any] = {"type": model_type, "seed": seed}
    references: list[tuple[str, Reference]] = []
    if model_type in UNBUILDABLE:
        return {**facts, "built": False, "why": UNBUILDABLE[model_type]}, references
    try:
        model, shape = build_any(model_type, seed)
    except Exception as error:
        return {**facts, "built": False, "why": _line(error)}, references
    facts |= {"built": True, "form": shape.form, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        run = record(model)
        facts["found"] = _found(run.graph)
        graph = protect_failing(model, run.graph, seed=seed)
    except SecateurError as error:
        return {**facts, "refused": _line(error), "seconds": time.process_time() - started}, references
    except Exception as error:
        return {**facts, "crashed": _line(error), "seconds": time.process_time() - started}, references
    facts["kinds"], facts["protected"] = _kinds(graph), _reasons(graph)
    facts["on_request"] = {kind: on_request(model, run, kind, seed) for kind in _requestable(graph)}
    run = replace(run, graph=graph)
    verified = [
        check
        for again in range(3)
        for check in _seeded(seed + again, partial(checks, model, 0.5, run, alone=again == 0))
    ]
    facts["failures"] = {check.group: check.message for check in verified if not check.ok}
    facts["difference"] = max((check.max_difference for check in verified), default=0.0)
    facts["generate"] = generates_alike(model, graph, halves(graph, seed + 1, differing=True))
    facts["lora"] = adapts(model, run, seed)
    for name, opened, kept in _cuts(graph, facts["on_request"], seed):
        if kept:
            try:
                references.append((name, _write(model, opened, kept, folder / f"{model_type}-{name}")))
                facts[f"save_{name}"] = way(folder / f"{model_type}-{name}")
            except SecateurError as error:
                facts[f"save_{name}"] = f"refused: {_line(error)}"
            except Exception as error:
                facts[f"save_{name}"] = f"FAILED: {_line(error)}"
    facts["seconds"] = round(time.process_time() - started, 2)
    return facts, references


def _cuts(
    graph: DependencyGraph, on_request: Mapping[Kind, str], seed: int
) -> Iterator[tuple[str, DependencyGraph, Kept]]:
    """What is saved, and opened again: the name of the cut, the graph that allows it, and what stays."""
    yield "same", graph, halves(graph)
    yield "differing", graph, halves(graph, seed + 1, differing=True)
    exact = [kind for kind, answer in on_request.items() if answer == "exact"]
    for name, kinds in (
        ("query", [kind for kind in exact if kind == "query"]),
        ("asked", [kind for kind in exact if kind != "query"]),
    ):
        opened = graph.opened(kinds)
        yield name, opened, {group: units for group, units in halves(opened).items() if opened[group].kind in kinds}


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def way(folder: Path) -> str:
    """How a saved model is described: ``plain``, by sizes of layers (``uneven``), or by tensors (``listed``)."""
    pruned = json.loads((folder / "config.json").read_text()).get("pruned_layers")
    return "plain" if pruned is None else "listed" if "tensors" in pruned else "uneven"


def _seeded(seed: int, what: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return what()


def _found(graph: DependencyGraph) -> list[list[Any]]:
    return [[group.name, group.kind, group.size, group.protected] for group in graph]


def _kinds(graph: DependencyGraph) -> dict[str, list[int]]:
    """Kind → how many groups may be cut, and how many there are."""
    every, prunable = Counter(group.kind for group in graph), Counter(group.kind for group in graph.prunable)
    return {kind: [prunable[kind], every[kind]] for kind in sorted(every)}


def _reasons(graph: DependencyGraph) -> dict[str, list[str]]:
    """Kind → why groups of it are protected, other than by default."""
    reasons: dict[str, set[str]] = {}
    for group in graph:
        if group.protected is not None and not group.protected.startswith("protected by default"):
            reasons.setdefault(group.kind, set()).add(group.protected)
    return {kind: sorted(why) for kind, why in sorted(reasons.items())}


def _requestable(graph: DependencyGraph) -> list[Kind]:
    return sorted({group.kind for group in graph if group.on_request})


def on_request(model: PreTrainedModel, run: Trace, kind: Kind, seed: int) -> str:
    """What comes of cutting the groups of a kind that is protected by default."""
    run = replace(run, graph=only(run.graph, kind))
    failures = [check for check in _seeded(seed, partial(checks, model, 0.5, run)) if not check.ok]
    return f"{failures[0].group}: {failures[0].message}"[:200] if failures else "exact"


def only(graph: DependencyGraph, kind: Kind) -> DependencyGraph:
    """``graph`` with the groups of a kind open to be cut, and no others."""
    groups = (
        group if group.kind == kind or group.protected else replace(group, protected="")
        for group in graph.opened([kind])
    )
    return replace(graph, groups=tuple(groups))


def halves(graph: DependencyGraph, seed: int = 0, differing: bool = False) -> Kept:
    """About half of the units of every group that may be cut; ``differing``: another number in each group."""

    def choose() -> Kept:
        counts = {
            group: int(torch.randint(1, group.size + 1, ())) if differing else max(1, group.size // 2)
            for group in graph.prunable
        }
        return {group.name: legal_units(group, count) for group, count in counts.items()}

    return {name: units for name, units in _seeded(seed, choose).items() if len(units) < graph[name].size}


def sliced_copy(model: Any, graph: DependencyGraph, kept: Kept) -> Any:
    small = sharing_copy(model)
    slice_model(small, graph, kept)
    return small


def generates_alike(model: PreTrainedModel, graph: DependencyGraph, kept: Kept) -> str:
    """Whether greedy generation of the cut model agrees with and without a cache, as that of the whole one does."""
    if not model.can_generate():
        return "cannot generate"
    try:
        dense = _cache_difference(model)
    except Exception as error:
        return f"not even whole: {_line(error)}"
    if not dense <= TOLERANCE:
        return f"not even whole: the cache changes logits by {dense:.1e}"
    try:
        difference = _cache_difference(sliced_copy(model, graph, kept))
    except Exception as error:
        return f"FAILED: {_line(error)}"
    return "same" if difference <= TOLERANCE else f"FAILED: the cache changes logits by {difference:.1e}"


@torch.no_grad()
def _cache_difference(model: Any) -> float:
    ids = torch.arange(5)[None] + 5
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    made = [
        model.generate(
            ids, attention_mask=torch.ones_like(ids), use_cache=cache, return_dict_in_generate=True, **options
        )
        for cache in (True, False)
    ]
    one, two = (torch.stack(each.logits) for each in made)
    return float((one - two).abs().max() / max(1.0, float(two.abs().max())))


def adapts(model: PreTrainedModel, plain: Trace, seed: int) -> str:
    """Whether the model with LoRA on all linears has the same groups, and is cut as exactly."""
    try:
        adapted = _adapted(model)
        with torch.no_grad():
            adapted(input_ids=torch.arange(14).reshape(2, 7))
    except Exception as error:
        return f"peft: {_line(error)}"
    try:
        run = record(adapted)
        allowed = {group.name for group in plain.graph.prunable}
        if (
            not allowed <= {group.name for group in run.graph.prunable}
            or run.graph.fingerprint != plain.graph.fingerprint
        ):
            return "other groups than without adapters"
        groups = (g if g.name in allowed or g.protected else replace(g, protected="not checked") for g in run.graph)
        run = replace(run, graph=replace(run.graph, groups=tuple(groups)))
        failures = [check for check in _seeded(seed, partial(checks, adapted, 0.5, run, alone=False)) if not check.ok]
    except Exception as error:
        return f"FAILED: {_line(error)}"
    return f"FAILED: {failures[0].group}: {failures[0].message}" if failures else "same"


def _adapted(model: PreTrainedModel) -> PeftModel:
    try:
        return with_adapters(sharing_copy(model))
    except ValueError:  # peft leaves these alone in models with Mamba's kernels
        return with_adapters(sharing_copy(model), exclude=("out_proj", "conv1d"))


def _write(model: PreTrainedModel, graph: DependencyGraph, kept: Kept, folder: Path) -> Reference:
    with quiet_transformers():
        return write(sliced_copy(model, graph, kept), None, folder, graph=graph, kept=kept)


def reload(waiting: Sequence[tuple[dict[str, Any], str, Reference]]) -> None:
    """Open the folders of many types in one fresh process, and note the verdicts in the facts."""
    if not waiting:
        return
    answers = open_folders([reference for _, _, reference in waiting])
    for (facts, name, reference), answer in zip(waiting, answers, strict=True):
        try:
            facts[f"reload_{name}"] = judge(reference, answer).logits_difference
        except VerificationError as error:
            facts[f"reload_{name}"] = f"refused: {_line(error)}"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)  # of the processor, whatever else is running
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def sweep(model_types: Sequence[str], out: Path, seed: int = 0, batch: int = 16, limit: int = 60) -> None:
    """Examine the types that ``out/results.jsonl`` does not have yet, ``batch`` of them for each fresh process."""
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = {facts["type"] for facts in read(results)}
    todo = [model_type for model_type in model_types if model_type not in done]
    for start in range(0, len(todo), batch):
        with tempfile.TemporaryDirectory() as folder:
            found: list[dict[str, Any]] = []
            waiting: list[tuple[dict[str, Any], str, Reference]] = []
            for model_type in todo[start : start + batch]:
                try:
                    with at_most(limit):
                        facts, references = examine(model_type, seed, Path(folder))
                except TooSlow as error:
                    facts, references = {"type": model_type, "seed": seed, "built": True, "refused": str(error)}, []
                except Exception as error:
                    facts, references = {"type": model_type, "seed": seed, "built": True, "crashed": _line(error)}, []
                found.append(facts)
                waiting += [(facts, name, reference) for name, reference in references]
                print(model_type, facts.get("kinds") or facts.get("why") or facts.get("refused"), flush=True)
            reload(waiting)
            with results.open("a") as file:
                file.writelines(json.dumps(facts) + "\n" for facts in found)


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; what is there is not repeated")
    parser.add_argument("--seed", type=int, default=0, help="draws sizes, weights and units")
    parser.add_argument("--docs", type=Path, help="write the table of all results here")
    parser.add_argument("types", nargs="*", default=MODEL_TYPES, metavar="TYPE", help="model types (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet_transformers():
        sweep(options.types, options.out, options.seed)
    results = read(options.out / "results.jsonl")
    print(summary(results))
    if options.docs is not None:
        options.docs.write_text(table(results))


if __name__ == "__main__":
    main()
