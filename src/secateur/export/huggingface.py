"""Writes a pruned model as a standard Hugging Face folder. The folder gets its name after it is verified."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from secateur.errors import InputError, ModelError, VerificationError
from secateur.export.agreement import check_finite, sample_ids
from secateur.export.fresh_process import generate
from secateur.export.layers import LayerSizes
from secateur.export.listed import NOT_BUILT, changed_scales, listed_config
from secateur.export.uneven import added_biases, uneven_config
from secateur.export.verify import Reference, Verification, verify_folder
from secateur.export.weights import ExportSettings, written_bytes, written_dtype, written_weights
from secateur.export.words import words_of, write_words
from secateur.finite import all_finite
from secateur.loading import quiet_transformers
from secateur.loading.places import promise_nothing_absent
from secateur.progress import say
from secateur.surgery import slice_model
from secateur.surgery.blocks import without_layers
from secateur.surgery.rebuild import family_of, is_listed, is_uneven, pruned_class
from secateur.surgery.tokens import kept_tokens
from secateur.types import Cut, DependencyGraph, Kept
from secateur.whole import open_permissions, place_of, whole

ARTEFACTS = "secateur"
"""Subfolder with secateur's artefacts."""


_EVEN = "All layers have the same sizes: a plain config, opened without remote code."
_UNEVEN = "Its config has a size for each layer, which no plain one supports: opened with trust_remote_code=True."
_LISTED = "Its config lists the cut tensors, which no family's own config supports: opened with trust_remote_code=True."


@dataclass(frozen=True)
class StandardForm:
    """The class and config by which transformers builds the pruned model."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    note: str
    """A note for the user: how the folder is opened, and why a plain config was not possible."""

    @property
    def uneven(self) -> bool:
        return is_uneven(self.config)


def check_output(folder: str | os.PathLike[str]) -> Path:
    """Raise InputError early for a path that cannot become a model folder. Returns its absolute path, without links.

    Writes nothing. The folder may exist if it is empty. Files are first written beside it, therefore its parent must be
    writable.
    """
    path = place_of(folder)
    if path in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(path):
        raise InputError(f"{path} cannot be replaced by the finished folder. Give the name of a new folder in it.")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file. Give a new folder for the pruned model.")
    parent = next(parent for parent in path.parents if parent.exists())
    if not parent.is_dir():
        raise InputError(f"{path} cannot be created: {parent} is a file. Give another folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: no permission for {parent}. Give another folder.")
    if path.is_dir() and not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: no permission. Give another folder.")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"{path} is not empty. Give a new folder, or empty this one first.")
    return path


def standard_form(model: PreTrainedModel, graph: DependencyGraph, kept: Kept) -> StandardForm:
    """Find the config that describes ``model`` after a cut to ``kept``.

    Args:
        model: the sliced model. Its config describes the model before the cut (after ``slice_model``), or the cut model
            (after ``adopt_config``).
        graph: the graph from before the cut.

    A plain config is preferred, then one with a size for each layer, then one that lists the smaller tensors. Raises
    ModelError when none of them gives the shapes of the model, and for a model with adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "The model still has adapters. Merge them first (merge_and_unload), then save the merged model."
        )
    graph, kept = without_layers(graph, kept)
    _check_cut_by(model, graph, kept)
    family, narrowed = family_of(model), any(group.kind == "hidden" for group, _ in Cut.keeping(graph, kept).groups)

    def fits(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
        if _shapes(model_class, config) != shapes_of(model):
            return False
        return not (narrowed and changed_scales(model, on_meta(model_class, config)))

    if fits(type(model), model.config) and _opens_plainly(family, model.config):
        return StandardForm(type(model), model.config, _UNEVEN if is_uneven(model.config) else _EVEN)
    try:
        form = _by_sizes(model, graph, kept, family)
    except ModelError:
        form = None
    if form is None or not fits(form.model_class, form.config):
        form = StandardForm(pruned_class(family), listed_config(model, family, graph, kept), _LISTED)
        _check_built(form.config.model_type, shapes_of(model), _shapes(form.model_class, form.config))
    return form


def _check_cut_by(model: PreTrainedModel, graph: DependencyGraph, kept: Kept) -> None:
    """Raise ModelError when tensors of ``model`` have other sizes than after a cut to ``kept``."""
    if any(graph[name].modules for name in kept):  # the kept modules have other names now
        return
    here = shapes_of(model)
    members = {member.parameter for name in kept for member in graph[name].members}
    for parameter in members & here.keys() & graph.shapes.keys():  # buffers are not counted
        if math.prod(here[parameter]) != graph.numel(parameter, kept):
            raise ModelError(
                f"{parameter} has shape {list(here[parameter])}, which is not what the plan leaves. Save a model with "
                "the graph from before the cut, and the plan that it was cut by."
            )


def _by_sizes(
    model: PreTrainedModel, graph: DependencyGraph, kept: Kept, family: type[PreTrainedModel]
) -> StandardForm | None:
    """The class and config with the kept sizes, one for all layers or one for each; None when a list is needed."""
    if is_listed(model.config):
        return None
    text = model.config.get_text_config()  # in a model of several parts (text, vision), the part that generates
    sizes = LayerSizes(text, graph, kept)
    even = sizes.even()
    even = None if even is None else _in_whole(model.config, even)
    if (
        even is not None
        and _is_valid(even)
        and _shapes(family, even) == shapes_of(model)
        and _opens_plainly(family, even)
    ):
        return StandardForm(family, even, _EVEN)
    if text is not model.config or not sizes.names:
        return None
    before_class = pruned_class(family) if is_uneven(model.config) else family
    config = uneven_config(family, sizes, on_meta(before_class, model.config))
    built = _shapes(pruned_class(family), config)
    if biases := added_biases(config, shapes_of(model).keys() - built.keys()):
        config.pruned_layers["biases"] = biases
    return StandardForm(pruned_class(family), config, _UNEVEN) if _reads_layers(pruned_class(family), config) else None


def _opens_plainly(family: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether ``AutoModelForCausalLM`` can build a model from ``config``, or a list of tensors would not help."""
    ours = family.__module__.startswith("transformers.")
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or is_uneven(config) or not ours


def _reads_layers(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """False when the family's code, while it runs, reads from the whole config a size that differs between layers."""
    try:
        with torch.no_grad():
            on_meta(model_class, config)(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"), use_cache=False)
    except AmbiguousGlobalPerLayerAttributeError:
        return False
    except Exception:  # any error of a family without weights: the saved model is opened and run later
        return True
    return True


def _in_whole(whole: PreTrainedConfig, text: PreTrainedConfig) -> PreTrainedConfig:
    """``whole`` with its text part replaced by ``text``; ``text`` itself when there is only one part."""
    old = whole.get_text_config()
    if old is whole:
        return text
    name = next(name for name in whole.sub_configs if getattr(whole, name, None) is old)
    whole = copy.deepcopy(whole)
    setattr(whole, name, text)
    return whole


def _check_built(model_type: str, shapes: Mapping[str, tuple[int, ...]], built: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ModelError when a config gives other shapes than those of the model."""
    wrong = sorted(name for name in shapes.keys() | built.keys() if shapes.get(name) != built.get(name))
    if wrong:
        raise ModelError(
            f"The cut {model_type} model cannot be described by a config: {wrong[0]} has shape {shapes.get(wrong[0])} "
            f"and would be built as {built.get(wrong[0])} ({len(wrong)} such tensors). Slice the model with this graph "
            "and these units, and merge its adapters first."
        )


def describes_itself(model: PreTrainedModel) -> bool:
    """Whether class and config of ``model`` give the shapes of its weights."""
    return _shapes(type(model), model.config) == shapes_of(model)


def empty_model(form: StandardForm, like: PreTrainedModel) -> PreTrainedModel:
    """A model in standard form without weights, with the expert kernels that ``like`` needs.

    Its config names no parts that the model does not have.
    """
    config = copy.deepcopy(form.config)
    config._experts_implementation = None  # a reader would get the default
    standard = on_meta(form.model_class, config)
    if standard.config._experts_implementation != "eager" and any(map(_has_eager_experts, like.modules())):
        standard.config.experts_implementation = "eager"
    promise_nothing_absent(standard)
    return standard


def save_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    graph: DependencyGraph,
    kept: Kept,
    settings: ExportSettings | None = None,
    complete: Callable[[Path, Verification], None] | None = None,
) -> Verification:
    """Write a sliced model. The folder gets its name after a fresh process has opened it and computed the same.

    Args:
        model: sliced in place, adapters merged; it is not changed.
        folder: see ``check_output``. Until the proof succeeds the files are in ``.NAME.saving`` beside it.
        graph: the graph from before the cut.
        kept: the kept units, as in ``PruningPlan.kept``; empty for a model that lost nothing. If tokens were removed,
            ``secateur/tokens.json`` maps each new id to its old one.
        complete: adds its own files to the folder (under its temporary name) after verification.

    Returns:
        The verification, which is also written to ``secateur/verification.json`` in the folder.

    Raises:
        InputError: the folder is not empty or cannot be written; or there is a tokenizer and tokens were cut; or the
            tokenizer or the generation settings cannot be saved.
        ModelError: the model cannot be described by a config, or its weights or logits are not finite.
        VerificationError: the folder does not open, or computes something else.
    """
    target, settings = check_output(folder), settings or ExportSettings()
    check_finite(model, written_dtype(model, settings))
    check_room(target, written_bytes(model, settings))
    try:
        with whole(target) as scratch:
            scratch.mkdir(parents=True)
            say(f"Writing {target}")
            reference = write(model, tokenizer, scratch, graph=graph, kept=kept, settings=settings)
            say("Opening the folder in a fresh process, without secateur")
            verification = verify_folder(reference)
            (scratch / ARTEFACTS).mkdir()
            verification.save(scratch / ARTEFACTS / "verification.json")
            tokens = kept_tokens(graph, kept)
            if tokens is not None:
                (scratch / ARTEFACTS / "tokens.json").write_text(json.dumps(tokens.tolist()) + "\n")
            if complete is not None:
                complete(scratch, verification)
            open_permissions(scratch)
    except OSError as error:
        raise InputError(
            f"{target} cannot be written: {error.strerror or error}. Free some space, or name another folder."
        ) from error
    return verification


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    graph: DependencyGraph,
    kept: Kept,
    settings: ExportSettings | None = None,
) -> Reference:
    """The writing part of ``save_folder``, without verification; returns the input of the verification."""
    settings = settings or ExportSettings()
    if tokenizer is not None and kept_tokens(graph, kept) is not None:
        raise InputError(
            "Tokens were removed from the vocabulary, and ids no longer match this tokenizer. Save without a "
            "tokenizer: secateur/tokens.json in the folder maps each new id to its old one."
        )
    try:
        form = standard_form(model, graph, kept)
        standard = empty_model(form, like=model)  # its config also names the kernels for its experts
        words = words_of(model, tokenizer, form.model_class, standard.config, written_dtype(model, settings))
        written, computed = written_weights(model, settings)
        standard.tie_weights()
        _refuse_broken_ties(standard, model)
        standard.load_state_dict(_as_tied_by(standard, written), strict=True, assign=True)
        standard.tie_weights()
        if model.can_generate():
            standard.generation_config = GenerationConfig()  # what was said of it is among the words
        with quiet_transformers():
            standard.save_pretrained(folder, max_shard_size=settings.max_shard_size)
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error)
        raise ModelError(f"The config of {model.config.model_type} models refuses what is left: {reason}") from error
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_words(folder, words)
    ids = sample_ids(model.config)
    return Reference(folder, ids, *_answers(model, computed, ids), form.note, form.model_class.is_remote_code())


def rehearse_saving(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    graph: DependencyGraph,
    kept: Kept,
    settings: ExportSettings,
    beside: int = 0,
) -> None:
    """Do all of ``write`` but the weights, and read it back, for ``model`` cut to ``kept``.

    Args:
        model: not sliced yet; only its shapes are used.
        folder: folder of the result; its disk needs space for it and for ``beside`` more bytes.

    Raises the errors of ``write``, and InputError for a disk that is too small.
    """
    outline = on_meta(type(model), model.config)
    slice_model(outline, graph, kept)
    if kept_tokens(graph, kept) is not None:
        tokenizer = None
    try:
        form = standard_form(outline, graph, kept)
        standard = empty_model(form, like=outline)
        words = words_of(model, tokenizer, form.model_class, standard.config, written_dtype(model, settings))
        with tempfile.TemporaryDirectory(prefix="secateur-rehearsal-") as scratch, quiet_transformers():
            write_words(Path(scratch), words)
            config = type(form.config).from_pretrained(scratch, local_files_only=True)
    except StrictDataclassError as error:
        reason = str(error.__cause__ or error)
        raise ModelError(f"The config of {model.config.model_type} models refuses what is left: {reason}") from error
    read = on_meta(form.model_class, config)
    read.tie_weights()
    _check_built(config.model_type, shapes_of(outline), shapes_of(read))
    _refuse_broken_ties(read, model)
    share = sum(weight.numel() for weight in outline.parameters()) / sum(w.numel() for w in model.parameters())
    check_room(folder, round(share * written_bytes(model, settings)) + beside)


def check_room(folder: Path, needed: int) -> None:
    """Raise InputError when ``needed`` bytes do not fit on the disk of ``folder``, which need not exist."""
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if not needed <= free:
        raise InputError(
            f"{folder} needs about {needed / 1e9:.2f} GB, including the files beside it until it is finished, and "
            f"{free / 1e9:.2f} GB are free there. Free some space, or name a folder on another disk."
        )


def _refuse_broken_ties(standard: PreTrainedModel, model: PreTrainedModel) -> None:
    """Raise ModelError when ``model`` has two tensors and ``standard``, built from its config, has one tied tensor."""
    own = model.state_dict(keep_vars=True)
    for names in _tied(standard):
        first, *others = [name for name in names if name in own] or names[:1]
        for other in others:
            if own[first] is not own[other] and not torch.equal(own[first], own[other]):
                raise ModelError(
                    f"The config ties {other} to {first}, and the two differ in this model: one of them would be lost. "
                    "Set model.config.tie_word_embeddings = False."
                )


def _as_tied_by(standard: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``weights``, with a copy for each name of a tensor that ``standard`` has several tensors for."""
    tied = {name for names in _tied(standard) for name in names}
    seen: set[int] = set()
    apart = {}
    for name, tensor in weights.items():
        apart[name] = tensor.clone() if id(tensor) in seen and name not in tied else tensor
        seen.add(id(tensor))
    return apart


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """Names of the state dict that stand for one tensor."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [same for same in names.values() if len(same) > 1]


def verify_saved(model: PreTrainedModel, folder: Path, trusted: bool = False) -> Verification:
    """Open ``folder`` in a fresh process and compare it with ``model``, which was loaded from there.

    Code from the folder is executed only if secateur wrote it, or if it is ``trusted``. Raises ModelError when the
    model's weights or logits are not finite, and VerificationError unless they agree.
    """
    check_finite(model)
    _, computed = written_weights(model, ExportSettings())
    ids = sample_ids(model.config)
    return verify_folder(Reference(folder, ids, *_answers(model, computed, ids), trusted=trusted))


@torch.no_grad()
def _answers(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> tuple[torch.Tensor, float | None, float | None]:
    """Logits of the model in memory with ``weights`` of the written type, and the differences with a cache."""
    training, ids = model.training, ids.to(model.device)
    model.eval()
    try:
        inputs = {"input_ids": ids, "use_cache": False}
        logits = torch.func.functional_call(model, dict(weights), kwargs=inputs).logits
        cached = generate(model, ids[:1], ("dynamic", "static")) if model.can_generate() else {}
    except RuntimeError as error:
        raise VerificationError(f"The model in memory does not compute, and was not saved: {error}") from error
    finally:
        model.train(training)
    if not all_finite(logits):
        raise VerificationError(
            "In the written type the logits are not finite (NaN or infinite), and cannot be compared. Write another "
            "type: --set export.dtype=float32."
        )
    return logits.float().cpu(), cached.get("dynamic_cache_difference"), cached.get("static_cache_difference")


def _has_eager_experts(module: nn.Module) -> bool:
    """Whether experts have a width after the cut that only the eager implementation supports."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without weights, from a copy of ``config``."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in a checkpoint of ``model``."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _is_valid(config: PreTrainedConfig) -> bool:
    """Whether the family's validators accept the config (Llama's requires hidden size / heads to be whole)."""
    try:
        type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError):
        return False
    return True


def _shapes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a model of ``config``; empty when the family cannot build one with such sizes."""
    try:
        return shapes_of(on_meta(model_class, config))
    except NOT_BUILT:
        return {}
