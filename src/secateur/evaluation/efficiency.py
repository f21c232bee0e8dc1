"""Size and speed of a model: parameters, bytes, and tokens per second on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.progress import track


@dataclass(frozen=True)
class Speed:
    """Tokens per second, the median of several runs."""

    prefill_tokens_per_s: float
    """Tokens of a prompt that are read in one pass."""
    decode_tokens_per_s: float
    """Tokens that are written one by one, with a cache; all sequences of the batch counted."""


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of the model; tied parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def compare_speed(
    models: Mapping[str, PreTrainedModel],
    *,
    batch_sizes: tuple[int, ...] = (1, 4),
    prompt: int = 128,
    written: int = 8,
    repeats: int = 3,
) -> dict[str, Any]:
    """Time prefill and decoding of several models in turns, which gives fair ratios on a noisy machine.

    Args:
        models: by name; each is timed in the type and on the device that it has.
        batch_sizes: sequences at once.
        prompt: tokens of each prompt.
        written: tokens written after it.
        repeats: rounds after one that warms up; every model has its turn in each.

    Returns:
        JSON-able: ``{"batch 1": {name: {"prefill_tokens_per_s": …, "decode_tokens_per_s": …}}, …}`` with the settings
        under ``settings``.
    """
    results: dict[str, Any] = {
        "settings": {"prompt": prompt, "written": written, "repeats": repeats, "machine": machine()},
    }
    rounds = len(batch_sizes) * (repeats + 1)
    turns = track([batch for batch in batch_sizes for _ in range(repeats + 1)], "timing", rounds)
    samples: dict[int, dict[str, list[tuple[float, float]]]] = {batch: {} for batch in batch_sizes}
    for batch in turns:
        for name, model in models.items():
            samples[batch].setdefault(name, []).append(_one_turn(model, batch, prompt, written))
    for batch, by_name in samples.items():
        results[f"batch {batch}"] = {name: asdict(_median(turns[1:])) for name, turns in by_name.items()}
    return results


def as_written(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """``model`` itself, with its floating-point tensors in the type ``dtype`` and on ``device``."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    return model


def machine() -> dict[str, Any]:
    """The machine and the versions for a measurement."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


@torch.inference_mode()
def _one_turn(model: PreTrainedModel, batch: int, prompt: int, written: int) -> tuple[float, float]:
    """Tokens per second of one prefill and of the decoding after it."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    output, prefill = _timed(model, lambda: model(input_ids=ids, use_cache=True))

    def write() -> None:
        cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
        for _ in range(written):
            step = model(input_ids=token, past_key_values=cache, use_cache=True)
            cache, token = step.past_key_values, step.logits[:, -1:].argmax(-1)

    _, decode = _timed(model, write)
    return batch * prompt / prefill, batch * written / decode


def _timed(model: PreTrainedModel, work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``work`` and its seconds, the device's queue included."""
    accelerator = model.device.type != "cpu"
    if accelerator:
        torch.accelerator.synchronize()
    started = time.perf_counter()
    result = work()
    if accelerator:
        torch.accelerator.synchronize()
    return result, time.perf_counter() - started


def _median(turns: list[tuple[float, float]]) -> Speed:
    prefill, decode = (statistics.median(turn[index] for turn in turns) for index in (0, 1))
    return Speed(round(prefill, 1), round(decode, 1))
