"""LoRAPrune's callback in two processes that train on different text: every rank must take the same decision."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import torch

from secateur.graph import trace
from secateur.methods.guided import GuidedPruning
from secateur.planning import Budget, cubic
from secateur.testing.method_contract import noise
from secateur.testing.tiny import build
from secateur.training import LoraSettings, TrainingSettings, attach_lora, train


def rank(number: int, world: int, port: int, out: Path) -> None:
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    model = attach_lora(build("llama-gqa"), LoraSettings(rank=4), seed=0)
    pruning = GuidedPruning(trace(model), Budget(ratio=0.3), partial(cubic, steps=6), every=1)
    settings = TrainingSettings(batch_size=2, micro_batch_size=1, precision="fp32")
    train(model, noise(24, 2).ids, settings, steps=6, seed=0, description="", callbacks=[pruning])
    assert torch.distributed.get_world_size() == world
    average = {name: value.tolist() for name, value in pruning.average.items()}
    (out / f"{number}.json").write_text(json.dumps([pruning.removed, average]))
    torch.distributed.destroy_process_group()


def test_every_rank_decides_the_same(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a process that has run a backward pass cannot be forked
    processes = [context.Process(target=rank, args=(number, 2, port, tmp_path)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    assert [process.exitcode for process in processes] == [0, 0]
    (removed, average), (other, other_average) = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
    assert removed == other
    assert sum(map(len, removed.values())) > 0
    assert average == other_average
