"""The settings of recovery."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from secateur.compensation import Reconstruction, Target
from secateur.data import TextSettings
from secateur.recovery.cache import cache_bytes
from secateur.training import TrainingSettings

_FULL_RATE = 1e-4


class RecoverySettings(TextSettings):
    """The training text of progressive pruning and of recovery, and the schedule of recovery.

    Blocks are drawn at random from ``tokens`` tokens, training.batch_size in each step, and repeat when they run out.
    """

    tokens: int = Field(default=262_144, ge=2)
    """Tokens to draw from, in whole windows. If the text has less, but at least 8 windows, all of it is used. Of more
    tokens than the small sources have, the large ones are a larger part."""

    steps: int = Field(default=220, ge=0)
    """Optimiser steps of the recovery after the cut; 0 switches recovery off."""

    between: float = Field(default=0.3, ge=0, lt=1)
    """Share of the steps between several rounds of pruning (budget.rounds), equally many after each round but the last.
    They train with constant shares, in one stage and one link. With 0, there is no training before the last cut."""

    finetuning: Literal["lora", "full"] = "lora"
    """``lora``: adapters train, and are merged at the end. ``full``: all weights train, embeddings, output head and
    norms included. Gradients and the two moments of AdamW then take three times the memory of the small model."""
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Peak learning rate of recovery. By default that of ``training`` for ``lora``, and 1e-4 for ``full``."""

    links: int = Field(default=1, ge=1)
    """Parts of the steps with fresh adapters, optimiser and learning-rate schedule each, merged at the end of each part
    (Chain of LoRA, arXiv 2401.04151). For ``lora``, without rounds and instructions."""

    repair: bool | None = None
    """Refit the weights that consume the kept units in closed form, before any training, and also without training. It
    changes nothing after lorashear, because the removed units are already zero there. `null`: on for methods that
    neither train nor compensate, where the model and the kinds to cut allow it, and the text is enough."""
    repair_tokens: int | None = Field(default=None, ge=10)
    """Calibration tokens for repair. `null`: 20 for each input of the widest matrix that is refitted, at most 65,536.
    Fewer fit the noise."""
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
    in memory as the teacher, and a step takes about 1.4 times as long. With 1, the small model learns from the dense
    model's predictions alone."""
    skew: float = Field(default=0.0, ge=0, lt=1)
    """Part of the dense model's probabilities in the distribution that is compared with them: KL(p || skew p + (1 -
    skew) q), skew KL of DistiLLM. Gradients stay bounded where the small model gives a likely token almost no
    probability, as after a large cut. With 0, it is KL(p || q)."""
    hidden_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the relative squared error of the small model's hidden states against the dense model's, in every
    fourth layer and the first half of the steps. Not for cuts of hidden width or of whole layers."""

    teacher_cache: int = Field(default=0, ge=0)
    """Tokens of which the dense model's predictions are computed before the cut and kept on disk, with the mass of all
    others: the likeliest at each position, such as 512. The dense model then need not stay in memory, and windows that
    repeat cost nothing. With 0, the dense model itself is the teacher."""

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
        taught = {
            name: getattr(self, name) for name in ("skew", "hidden_weight", "teacher_cache") if getattr(self, name)
        }
        if taught and self.teacher == 0:
            name, value = next(iter(taught.items()))
            raise ValueError(f"{name} ({value:g}) compares with a teacher; set teacher above 0, such as 1, or {name}=0")
        if self.hidden_weight > 0 and self.teacher_cache > 0:
            raise ValueError("a cached teacher has no hidden states; set hidden_weight=0 or teacher_cache=0")
        if self.links > 1 and (self.finetuning == "full" or self.changes_shares):
            raise ValueError(
                f"links ({self.links}) are parts of a training of adapters with constant shares; set links=1, or "
                "finetuning=lora, round_steps=0 and no instructions"
            )
        if self.links > max(1, self.steps):
            raise ValueError(f"links ({self.links}) must be at most steps ({self.steps}), one step for each")
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

    def steps_between(self, rounds: int) -> int:
        """Steps after each but the last of so many rounds of pruning."""
        return 0 if rounds == 1 else int(self.steps * self.between + 1e-9) // (rounds - 1)

    def of_round(self, number: int, rounds: int) -> Self:
        """The recovery after the cut of round ``number``, from 1 on, of ``rounds``."""
        between = self.steps_between(rounds)
        if number < rounds:
            plain = {"links": 1, "round_steps": 0, "instructions": []}
            return self.model_copy(update={"steps": between, **plain})
        return self.model_copy(update={"steps": self.steps - (rounds - 1) * between})

    def schedule(self, training: TrainingSettings) -> TrainingSettings:
        """``training`` with the learning rate of recovery."""
        own = _FULL_RATE if self.finetuning == "full" else training.learning_rate
        return training.model_copy(update={"learning_rate": self.learning_rate or own})

    def disk_bytes(self, parameters: int, training: TrainingSettings) -> int:
        """Most bytes that the recovery of a model with so many parameters keeps on disk meanwhile.

        These are up to three checkpoints, with two moments in each, and the teacher's predictions. Adapters are not
        counted.
        """
        kept = 0
        if self.finetuning == "full":
            kept += min(3, math.ceil(self.steps / training.checkpoint_steps)) * 3 * 4 * parameters
        if self.teacher_cache > 0:
            windows = self.tokens // self.window
            if self.changes_shares:
                windows += len(self.instructions[:1]) * (self.instruction_tokens // self.window)
            else:
                windows = min(windows, self.steps * training.batch_size)
            kept += cache_bytes(windows, self.window, self.teacher_cache)
        return kept

    @property
    def changes_shares(self) -> bool:
        """Whether the windows that are read depend on the training: in rounds, or in two stages."""
        return self.round_steps > 0 or bool(self.instructions)

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
