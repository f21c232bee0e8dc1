"""Recovery by LoRA fine-tuning: adapters on the small model, a mixture of texts, merged at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel

from secateur.compensation import Reconstruction, Target
from secateur.data import TextSettings, TokenBlocks
from secateur.data.order import ReadingOrder
from secateur.errors import InputError
from secateur.evaluation import losses_by_source
from secateur.precision import autocast_dtype
from secateur.progress import say
from secateur.recovery.curriculum import Curriculum, Losses, RecoveryStage
from secateur.recovery.distill import Distillation
from secateur.training import LoraSettings, TrainingSettings, attach_lora, merge_lora, train


class RecoverySettings(TextSettings):
    """The training text of progressive pruning and of recovery, and the schedule of recovery.

    Blocks are drawn at random from ``tokens`` tokens, training.batch_size in each step, and repeat when they run out.
    """

    tokens: int = Field(default=524_288, ge=2)
    """Tokens to draw from, in whole windows. If the text has less, but at least 8 windows, all of it is used."""

    steps: int = Field(default=70, ge=0)
    """Optimiser steps of the recovery after the cut; 0 switches recovery off."""

    repair: bool = False
    """Refit the weights that consume the kept units in closed form, before any training, and also without training. It
    changes nothing after lorashear, because the removed units are already zero there."""
    repair_tokens: int = Field(default=65_536, ge=10)
    """Calibration tokens for repair. 20 for each input of a consumer are enough; fewer fit the noise."""
    repair_target: Target = "own"
    """The target output of a refitted consumer. ``dense``: its output in the dense model. ``stream``: the output with
    which the residual stream equals the dense model's. ``own``: the dense weights times the pruned model's inputs."""
    reconstruct: bool = False
    """Train each attention block and each MLP block of the pruned model alone, one after the other, towards the dense
    block's output: after repair, before any other training, and also without any. It changes nothing after lorashear,
    because the removed units are already zero there."""
    reconstruct_tokens: int = Field(default=65_536, ge=10)
    """Calibration tokens for reconstruction. A fifth of them is for checking."""
    reconstruct_target: Target = "stream"
    """The target output of a block. ``dense``: the dense block's output, both for the dense model's inputs. ``stream``:
    the dense model's residual stream, for the pruned model's inputs. ``own``: the dense block's output, both for the
    pruned model's inputs."""
    reconstruct_learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate of reconstruction, which trains all weights of a block. It rises in the first 10 % of the
    steps, and then falls linearly."""
    reconstruct_batch_size: int = Field(default=2, ge=1)
    """Windows per step of reconstruction."""
    reconstruct_epochs: int = Field(default=1, ge=1)
    """How often reconstruction reads each window for each block."""
    round_steps: int = Field(default=0, ge=0)
    """Steps between two measurements of each source's loss against the dense model's. They set the sources' weights
    (LoRAShear's dynamic recovery). With 0, the shares are constant."""
    floor: float = Field(default=0.02, ge=0, lt=1)
    """Smallest share of a source with any measurement, also of the first stage's sources in the second stage; less than
    one over the number of sources."""
    validation_tokens: int = Field(default=4_096, ge=2)
    """Tokens that are measured between rounds, of all sources together. They are from the calibration split: neither
    trained on nor part of the evaluation. Text that calibration does not read is used first."""
    min_gain: float = Field(default=0.005, ge=0, lt=1)
    """A round is a gain when its mean loss is lower than the best of the stage by more than this fraction."""
    patience: int = Field(default=2, ge=0)
    """Rounds in a row without a gain, after which a stage ends. With 0, it continues to its last step."""
    instructions: list[str] = Field(default=[])
    """Sources of a second stage, such as `[self]`, text that an instruction-tuned model writes itself. Without any,
    there is one stage."""
    instruction_share: float = Field(default=0.25, gt=0, lt=1)
    """Fraction of the steps for the second stage. Both stages have at least one step."""
    instruction_tokens: int = Field(default=32_768, ge=2)
    """Tokens of instructions to draw from. Text of the model itself takes time: some hundred tokens a second for 135 M
    parameters on two CPU cores, and it writes 1.7 times as many tokens, for all splits."""
    teacher: float = Field(default=0.0, ge=0, le=1)
    """Weight of KL(dense model || small model) in the loss; the rest is cross-entropy. Above 0, the dense model is kept
    in memory as the teacher, and a step takes about 1.4 times as long."""

    @model_validator(mode="after")
    def _stages_differ(self) -> Self:
        both = sorted(set(self.text) & set(self.instructions))
        if both:
            raise ValueError(f"{', '.join(both)} is named in text and in instructions; name each source once")
        if len(set(self.instructions)) != len(self.instructions):
            raise ValueError("instructions must name each source only once")
        if self.validation_tokens < self.window:
            raise ValueError(
                f"validation_tokens ({self.validation_tokens}) must be at least one window ({self.window})"
            )
        if self.instructions and self.instruction_tokens < self.window:
            raise ValueError(
                f"instruction_tokens ({self.instruction_tokens}) must be at least one window ({self.window})"
            )
        if self.instructions and self.steps == 1:
            raise ValueError(
                "steps (1) must be at least 2 for two stages, one step for each; or leave instructions empty"
            )
        sources = len(self.text) + len(self.instructions)
        if self.round_steps > 0 and self.validation_tokens < sources * self.window:
            raise ValueError(
                f"validation_tokens ({self.validation_tokens}) must be at least one window ({self.window}) for each of "
                f"the {sources} sources, because a round measures all of them"
            )
        if (self.round_steps > 0 or self.instructions) and sources > 1 and self.floor * sources >= 1:
            raise ValueError(
                f"floor ({self.floor:g}) must be below 1 / {sources}, because each of the {sources} sources gets it; "
                f"at 1 / {sources} all shares are equal"
            )
        return self

    @property
    def reconstruction(self) -> Reconstruction:
        """How the blocks are trained."""
        return Reconstruction(
            target=self.reconstruct_target,
            learning_rate=self.reconstruct_learning_rate,
            epochs=self.reconstruct_epochs,
            batch_size=self.reconstruct_batch_size,
        )

    @property
    def instruction_text(self) -> TextSettings | None:
        """The text of the second stage; None when there is none."""
        if not self.instructions:
            return None
        return TextSettings(text=self.instructions, window=self.window, tokens=self.instruction_tokens)

    @property
    def validation_text(self) -> TextSettings | None:
        """The text to measure between rounds; None when nothing is measured."""
        if self.round_steps == 0:
            return None
        text = [*self.text, *self.instructions]
        return TextSettings(text=text, window=self.window, tokens=self.validation_tokens)


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
    teacher: nn.Module | None = None
    """The dense model, for recovery with a teacher."""
    checkpoints: Path | None = None
    """Folder for checkpoints, from which an interrupted recovery resumes; None keeps nothing."""


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
    """Fine-tune ``model`` in place by LoRA and merge the adapters.

    One run of the Trainer, also with several rounds and two stages (see ``curriculum``).
    """
    adapted = attach_lora(model, lora, seed)
    blocks = _together(task)
    curriculum = _curriculum(task, blocks, settings, training, seed)
    teacher = Distillation(task.teacher, settings.teacher) if task.teacher is not None else None
    log = train(
        adapted,
        blocks.ids,
        training,
        steps=settings.steps,
        seed=seed,
        description="recovering",
        callbacks=[curriculum] if curriculum is not None else [],
        order=curriculum.order if curriculum is not None else None,
        loss=teacher,
        checkpoints=task.checkpoints,
    )
    merge_lora(adapted)
    return Recovered(log, curriculum.rounds if curriculum is not None else [])


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
