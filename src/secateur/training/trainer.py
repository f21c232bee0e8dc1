"""Every training loop is ``transformers.Trainer``, with its accumulation, mixed precision and multi-GPU support."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from peft import PeftModel
from pydantic import Field, model_validator
from safetensors.torch import load_model, save_model
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from secateur import progress
from secateur.data.order import ReadingOrder
from secateur.errors import ModelError
from secateur.precision import Precision, autocast_dtype
from secateur.training.checkpoints import SaveStates, last_checkpoint
from secateur.types import Settings

Schedule = Literal["cosine", "linear", "constant"]
Penalty = Callable[[Any, int], torch.Tensor | None]
"""Model with adapters and number of the step, from 0 → a scalar with a gradient, or None for no penalty."""

Loss = Callable[[Any, torch.Tensor, int], torch.Tensor]
"""Model, ids ``[n, window]`` of a micro-batch and number of the step, from 0 → their mean loss, with a gradient."""

_WEIGHTS = "model.safetensors"


class TrainingSettings(Settings):
    """How weights are trained, during pruning and during recovery."""

    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate of A and B. Recovery can have its own, recovery.learning_rate."""
    batch_size: int = Field(default=1, ge=1)
    """Windows per optimiser step."""
    micro_batch_size: int = Field(default=2, ge=1)
    """Windows per forward pass: a divisor of the batch size, or more than it. The rest of a batch is accumulated."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser. ``sgd`` needs another learning rate, hundreds of times that of ``adamw``; with the same rate it hardly
    changes anything."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Fraction of the steps at the start in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; of norms and biases, none."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm; 0 switches clipping off."""
    precision: Precision = "auto"
    """``bf16``: autocast over fp32 master weights; ``auto``: bf16 where the processor supports it; or ``fp32``."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    checkpoint_steps: int = Field(default=50, ge=1)
    """Optimiser steps between checkpoints for ``--resume``, in methods that train for long."""

    @model_validator(mode="after")
    def _batches_add_up(self) -> Self:
        if self.batch_size > self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size ({self.micro_batch_size}) must divide batch_size ({self.batch_size}), or a step "
                "would read another number of windows"
            )
        return self


_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant_with_warmup",
}


class _Blocks(Dataset[dict[str, torch.Tensor]]):
    """Token blocks as the Trainer wants them: the labels are the ids themselves."""

    def __init__(self, ids: torch.Tensor, order: Callable[[int], int] | None, positions: int) -> None:
        """With an ``order``, item i is block ``order(i)``, for ``positions`` items."""
        self.ids, self.order = ids, order
        self.length = len(ids) if order is None else positions

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = index if self.order is None else self.order(index)
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


class _Clip(TrainerCallback):
    """Clips gradients after the other callbacks have seen them.

    The Trainer would clip before it calls ``on_pre_optimizer_step``. Without clipping, the gradients are unscaled and
    all-reduced at that point, and the Trainer logs their norm.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], self.max_norm)


class _Penalty(TrainerCallback):
    """Adds the gradient of a penalty to that of the model's own loss, and its mean since the last entry to the log.

    It does so once in a step, when the gradients of the whole batch are accumulated: the penalty counts once beside the
    mean loss of all micro-batches.
    """

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty
        self.seen: list[float] = []

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        with torch.enable_grad():
            value = self.penalty(model, state.global_step)
        if value is None:
            return
        self.seen.append(float(value))
        if not math.isfinite(self.seen[-1]):
            raise ModelError(
                f"The penalty is {self.seen[-1]} in step {state.global_step + 1}. Lower its weight, or the learning "
                "rate."
            )
        value.backward()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs and self.seen:
            state.log_history[-1]["penalty"] = sum(self.seen) / len(self.seen)
            self.seen.clear()


class _Trainer(Trainer):
    """The Trainer, with a loss that may run the model itself, and with checkpoints of models without adapters that have
    each parameter under its name in memory.

    The Trainer's own checkpoints have the names of published files, which it would not find again in some families, and
    a config, which a model of uneven layers may not have.
    """

    own_loss: Loss | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Called by the Trainer for the loss of a micro-batch.

        It is divided by the number of micro-batches of a step. All steps have as many micro-batches, and all
        micro-batches as many windows (see ``train``).
        """
        if self.own_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.own_loss(model, inputs["input_ids"], self.state.global_step)
        return loss / self.args.gradient_accumulation_steps

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Called by the Trainer for the weights of a checkpoint."""
        if isinstance(self.model, PeftModel):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self._whole, str(folder / _WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called by the Trainer before it resumes."""
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(self._whole, str(Path(resume_from_checkpoint, _WEIGHTS)))

    @property
    def _whole(self) -> nn.Module:
        assert self.model is not None
        return self.model


class _Progress(TrainerCallback):
    """Shows the Trainer's steps on secateur's progress bar."""

    def __init__(self, bar: progress.Bar) -> None:
        self.bar = bar
        self.note = ""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"(loss {float(logs['loss']):.3f})"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.advance(note=self.note)


def train(
    model: nn.Module,
    ids: torch.Tensor,
    settings: TrainingSettings,
    *,
    steps: int,
    seed: int,
    description: str,
    callbacks: Sequence[TrainerCallback] = (),
    order: Callable[[int], int] | None = None,
    loss: Loss | None = None,
    penalty: Penalty | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    checkpoints: Path | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` on token blocks ``ids`` ([blocks, window], int64) for ``steps`` optimiser steps.

    Without an ``order``, blocks are shuffled by ``seed``, and shuffled again and repeated when they run out. Each step
    reads ``settings.batch_size`` of them. Returns the Trainer's log: step, loss, learning rate and gradient norm
    (before clipping), about twenty entries a run. The model is left in eval mode.

    Args:
        model: one with a config. Its parameters that require a gradient train: the adapters of ``attach_lora``, or all
            weights of a model in ``full_weights``.
        callbacks: in ``on_pre_optimizer_step`` they see the gradients accumulated over the whole batch, unscaled and
            unclipped. The state of each ``StatefulCallback`` is part of each checkpoint.
        order: position 0, 1, 2 … → block to read. It is called in this order, up to a micro-batch ahead of the
            training.
        loss: mean loss of a micro-batch, instead of the model's own. It runs the model as it likes.
        penalty: added to the loss of each step, beside all parts of the model's own loss (such as the routers' loss of
            a mixture of experts). The log contains its mean as ``penalty``. ``loss`` and the gradients that callbacks
            see are without it.
        optimizer: instead of that of the settings, with a learning rate for each of its groups; all follow
            ``settings.schedule``.
        checkpoints: folder for a checkpoint every ``settings.checkpoint_steps`` steps and after the last one. Training
            resumes from the last complete one, and finished training is not repeated. The caller removes the folder
            when the result is kept elsewhere. None keeps nothing.
    """
    if steps <= 0:
        return []
    device = next(model.parameters()).device
    with _folder(checkpoints) as folder, _config_kept(model), progress.Bar(description, steps) as bar:
        arguments = _arguments(settings, folder, steps, seed, device, keep=checkpoints is not None)
        last = last_checkpoint(folder)
        done = int(last.name.rpartition("-")[2]) if last is not None else 0
        positions = steps * settings.batch_size * arguments.world_size
        # an epoch of the Trainer would end with an incomplete batch, and a finished run would continue in a longer
        if order is None and (len(ids) < positions or done == steps):
            order = ReadingOrder(("all",) * len(ids), {"all": 1.0}, seed)
        if order is not None:
            arguments.train_sampling_strategy = "sequential"
        more: list[TrainerCallback] = [_Penalty(penalty)] if penalty is not None else []
        more += [_Clip(settings.max_grad_norm)] if settings.max_grad_norm > 0 else []
        states = SaveStates(callbacks)
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=_Blocks(ids, order, positions),
            compute_loss_func=loss,  # not called; with one, the Trainer does not divide by the micro-batches again
            callbacks=[*callbacks, *more, states, _Progress(bar)],
            optimizers=(optimizer, None),
        )
        trainer.own_loss = loss
        trainer.remove_callback(PrinterCallback)
        if last is not None:
            progress.say(f"  {description}: resuming after step {done} of {steps}")
            states.restore(last)
            bar.advance(done)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def _arguments(
    settings: TrainingSettings, folder: Path, steps: int, seed: int, device: torch.device, *, keep: bool
) -> TrainingArguments:
    """Our settings as the Trainer's; with ``keep``, checkpoints are kept in the folder."""
    micro = min(settings.micro_batch_size, settings.batch_size)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        warmup_steps=round(settings.warmup * steps),
        optim="adamw_torch" if settings.optimizer == "adamw" else "sgd",
        weight_decay=settings.weight_decay,
        max_grad_norm=0.0,  # see _Clip
        bf16=autocast_dtype(settings.precision, device) is torch.bfloat16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=settings.gradient_checkpointing,
        logging_steps=max(1, steps // 20),
        save_strategy="steps" if keep else "no",
        save_steps=settings.checkpoint_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        seed=seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel over all visible GPUs would silently multiply the batch
    return arguments


@contextmanager
def _folder(checkpoints: Path | None) -> Iterator[Path]:
    """The Trainer's output folder: ``checkpoints``, or a temporary folder."""
    if checkpoints is None:
        with tempfile.TemporaryDirectory(prefix="secateur-trainer-") as scratch:
            yield Path(scratch)
        return
    checkpoints.mkdir(parents=True, exist_ok=True)
    yield checkpoints


@contextmanager
def _config_kept(model: Any) -> Iterator[None]:
    """Restore the keys of the model's config that the Trainer changes (it switches caches off)."""
    config: dict[str, Any] = vars(model.config)
    before = dict(config)
    try:
        yield
    finally:
        config.clear()
        config.update(before)
