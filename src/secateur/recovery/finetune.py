"""Recovery by fine-tuning on a mixture of texts: adapters that are merged at the end, or all weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.data import TokenBlocks
from secateur.data.order import ReadingOrder
from secateur.errors import InputError
from secateur.evaluation import losses_by_source
from secateur.precision import autocast_dtype
from secateur.progress import say
from secateur.recovery.cache import CachedTeacher
from secateur.recovery.curriculum import Curriculum, Losses, RecoveryStage
from secateur.recovery.distill import Distillation, LiveTeacher, Teacher
from secateur.recovery.settings import RecoverySettings
from secateur.training import LoraSettings, TrainingSettings, attach_lora, full_weights, merge_lora, train


@dataclass(frozen=True)
class RecoveryTask:
    """The inputs of recovery beside the model."""

    text: TokenBlocks
    """Text of the first stage."""
    instructions: TokenBlocks | None = None
    """Text of the second stage, if there is one."""
    validation: TokenBlocks | None = None
    """Text to measure between rounds."""
    reference: Losses = field(default_factory=dict)
    """The dense model's loss on ``validation``, by source."""
    teacher: nn.Module | CachedTeacher | None = None
    """The dense model, or its predictions (``keep_predictions``), for recovery with a teacher."""
    checkpoints: Path | None = None
    """Folder for checkpoints, from which an interrupted recovery resumes; None keeps nothing."""
    begin: int | None = None
    """Steps of earlier recoveries in the same order of reading, which goes on after them; None for one recovery."""


@dataclass(frozen=True)
class Recovered:
    """The record of a recovery."""

    log: list[dict[str, float]]
    """The training log, as ``train`` returns it."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """``Curriculum.rounds``; empty when shares were constant and there was one stage."""


def source_losses(model: nn.Module, blocks: TokenBlocks, training: TrainingSettings) -> dict[str, float]:
    """Mean loss by source, nats, in the precision of the training; the model's mode is restored."""
    device = next(model.parameters()).device
    found = losses_by_source(
        model, blocks, batch_size=training.micro_batch_size, autocast=autocast_dtype(training.precision, device)
    )
    return {name: loss.loss for name, loss in found.items()}


def recover(
    model: PreTrainedModel,
    task: RecoveryTask,
    settings: RecoverySettings,
    *,
    lora: LoraSettings,
    training: TrainingSettings,
    seed: int,
) -> Recovered:
    """Fine-tune ``model`` in place: by LoRA, merged at the end, or all weights (``settings.finetuning``).

    One run of the Trainer, also with several rounds and two stages (see ``curriculum``). With ``settings.links`` there
    are several, which begin with fresh adapters on the merged weights and continue the order of reading. Their log
    counts steps from the beginning.
    """
    blocks = _together(task)
    curriculum = _curriculum(task, blocks, settings, training, seed)
    order, before = (curriculum.order, 0) if curriculum is not None else _order(blocks, settings, seed, task.begin)
    log: list[dict[str, float]] = []
    for link in range(settings.links):
        begin, end = (settings.steps * place // settings.links for place in (link, link + 1))
        with _trainable(model, settings, lora, seed + link) as trained:
            entries = train(
                trained,
                blocks.ids,
                settings.schedule(training),
                steps=end - begin,
                seed=seed,
                description="recovering",
                callbacks=[curriculum] if curriculum is not None else [],
                order=None if order is None else _from(order, (before + begin) * training.batch_size),
                loss=_distillation(model, task, settings, training, begin),
                checkpoints=None if task.checkpoints is None else task.checkpoints / f"link-{link + 1}",
            )
        log += [{**entry, "step": entry["step"] + begin} for entry in entries]
    return Recovered(log, curriculum.rounds if curriculum is not None else [])


def _from(order: ReadingOrder, position: int) -> Callable[[int], int]:
    return lambda place: order(position + place)


def _distillation(
    model: PreTrainedModel, task: RecoveryTask, settings: RecoverySettings, training: TrainingSettings, begin: int
) -> Distillation | None:
    """The loss against the teacher in a training from step ``begin`` on; None without one, for the model's own."""
    if task.teacher is None:
        return None
    teacher: Teacher
    if isinstance(task.teacher, nn.Module):
        teacher = LiveTeacher(task.teacher, autocast_dtype(training.precision, model.device))
    else:
        teacher = task.teacher
    return Distillation(
        teacher,
        settings.teacher,
        skew=settings.skew,
        hidden_weight=settings.hidden_weight,
        hidden_steps=settings.steps // 2 - begin,
    )


@contextmanager
def _trainable(
    model: PreTrainedModel, settings: RecoverySettings, lora: LoraSettings, seed: int
) -> Iterator[nn.Module]:
    """A context with the module to train. At its end the trained weights are those of ``model``."""
    if settings.finetuning == "full":
        with full_weights(model):
            yield model
        return
    adapted = attach_lora(model, lora, seed)
    yield adapted
    merge_lora(adapted)


def keep_predictions(
    model: PreTrainedModel,
    task: RecoveryTask,
    settings: RecoverySettings,
    *,
    training: TrainingSettings,
    seed: int,
    folder: Path | None,
) -> CachedTeacher:
    """Let the dense ``model`` read every window that ``recover`` will read, and keep ``settings.teacher_cache`` tokens.

    With rounds or two stages these may be all windows of the text. ``folder`` is that of ``CachedTeacher.make``.
    """
    blocks = _together(task)
    order, _ = _order(blocks, settings, seed)
    rows = list(range(len(blocks)))
    if order is not None and not settings.changes_shares:
        rows = sorted({order(position) for position in range(settings.steps * training.batch_size)})
    return CachedTeacher.make(
        model,
        blocks.ids[rows].unique(dim=0),
        settings.teacher_cache,
        folder=folder,
        batch=training.micro_batch_size,
        autocast=autocast_dtype(training.precision, model.device),
    )


def _order(
    blocks: TokenBlocks, settings: RecoverySettings, seed: int, begin: int | None = None
) -> tuple[ReadingOrder | None, int]:
    """An order of reading that is known before the training, and the step of it to begin at; no order where the
    training may choose its own."""
    if settings.teacher_cache == 0 and settings.links == 1 and begin is None:
        return None, 0
    return ReadingOrder(("all",) * len(blocks), {"all": 1.0}, seed), begin or 0


def _together(task: RecoveryTask) -> TokenBlocks:
    if task.instructions is None:
        return task.text
    ids = torch.cat([task.text.ids, task.instructions.ids])
    return TokenBlocks(ids, task.text.sources + task.instructions.sources, task.text.marks)


def _curriculum(
    task: RecoveryTask, blocks: TokenBlocks, settings: RecoverySettings, training: TrainingSettings, seed: int
) -> Curriculum | None:
    """The curriculum of stages and rounds; None when shares are constant and there is one stage."""
    if settings.round_steps == 0 and task.instructions is None:
        return None
    validation = task.validation
    second = task.instructions.names if task.instructions is not None else ()
    stages = _stages(task.text.names, second, settings)
    _mention_unwatched(stages, task, settings)
    shares = Counter(blocks.sources)
    return Curriculum(
        order=ReadingOrder(blocks.sources, {name: shares[name] for name in task.text.names}, seed),
        stages=stages,
        initial={name: float(count) for name, count in shares.items()},
        round_steps=settings.round_steps,
        floor=settings.floor,
        min_gain=settings.min_gain,
        patience=settings.patience,
        measure=(lambda model: source_losses(model, validation, training)) if validation is not None else None,
        reference=task.reference,
    )


def _stages(first: tuple[str, ...], second: tuple[str, ...], settings: RecoverySettings) -> list[RecoveryStage]:
    """One stage, or two where there are sources for a second; each has at least one step."""
    if not second:
        return [RecoveryStage("text", first, settings.steps)]
    if settings.steps < 2:
        raise InputError(
            f"recovery.steps = {settings.steps} is too few for two stages, text and instructions. Set it to at least "
            f"2, or leave recovery.instructions empty."
        )
    of_second = max(1, int(settings.steps * settings.instruction_share + 1e-9))
    first_ends = max(1, settings.steps - of_second)
    return [RecoveryStage("text", first, first_ends), RecoveryStage("instructions", second, settings.steps)]


def _mention_unwatched(stages: Sequence[RecoveryStage], task: RecoveryTask, settings: RecoverySettings) -> None:
    """Tell the user which sources no round can measure, because the held-out text has none of them."""
    if settings.round_steps == 0:
        return
    watched = set() if task.validation is None else set(task.validation.names)
    for stage in stages:
        missing = [name for name in stage.sources if name not in watched]
        if missing:
            say(
                f"  {', '.join(missing)}: no text to measure between rounds. Recovery treats it as not behind. Give "
                f"more documents, or recovery.validation_tokens above {settings.validation_tokens:,}."
            )
        if len(missing) == len(stage.sources) and settings.patience > 0:
            say(f"  The {stage.name} stage of recovery cannot end before step {stage.until}.")
