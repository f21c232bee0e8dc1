"""LoRAShear on tiny models: exact zeros that can be cut, plans that only shrink, and runs that resume."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.data import TokenBlocks
from secateur.graph import trace
from secateur.methods.base import PruningTask
from secateur.methods.lorashear import LoRAShear, LoRAShearSettings
from secateur.planning import Budget, make_plan
from secateur.surgery import slice_model
from secateur.testing.tiny import TINY, VOCAB
from secateur.training import TrainingSettings
from secateur.types import removed_to_kept


def _blocks(count: int, seed: int) -> TokenBlocks:
    ids = torch.randint(0, VOCAB, (count, 12), generator=torch.Generator().manual_seed(seed))
    return TokenBlocks(ids, ("random",) * count)


def _task(name: str = "llama-gqa", **changes: Any) -> PruningTask:
    model = TINY[name]()
    task = PruningTask(
        model=model,
        tokenizer=None,
        graph=trace(model),
        budget=Budget(ratio=0.2),
        calibration=_blocks(4, 1),
        training_blocks=_blocks(16, 2),
        training=TrainingSettings(batch_size=2, micro_batch_size=2, precision="fp32"),
        seed=3,
    )
    return dataclasses.replace(task, **changes)


SHORT = LoRAShearSettings(periods=3, period_steps=3, warmup_steps=1)


@pytest.mark.parametrize("projection", ["decay", "half-space"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gpt2", "mixtral"])
def test_what_goes_is_exactly_zero_so_that_cutting_changes_nothing(name: str, projection: Any) -> None:
    task = _task(name)
    decision = LoRAShear(SHORT.model_copy(update={"projection": projection})).run(task)
    parameters = dict(task.model.named_parameters())
    for group, units in decision.removed.items():
        for member in task.graph[group].members:
            assert not parameters[member.parameter].movedim(member.axis, 0)[member.rows(units)].any()
    ids = _blocks(2, 5).ids
    with torch.no_grad():
        before = task.model(ids).logits
        slice_model(task.model, task.graph, removed_to_kept(task.graph, decision.removed))
        after = task.model(ids).logits
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)


def test_the_target_is_met_and_the_important_units_have_learned() -> None:
    task = _task()
    dense = copy.deepcopy(task.model.state_dict())
    decision = LoRAShear(SHORT).run(task)
    plan = make_plan(task.graph, decision.removed, task.budget, method="lorashear")
    smallest = min(task.graph.unit_cost(group) for group in task.graph.prunable)
    assert abs(plan.ratio_reached - 0.2) * plan.parameters_before <= smallest
    kept = removed_to_kept(task.graph, decision.removed)
    mlp = next(group for group in task.graph.prunable if group.kind == "ffn" and group.name in kept)
    member = mlp.members[0]
    rows = member.rows(kept[mlp.name]).flatten()
    now, was = (state[member.parameter].movedim(member.axis, 0)[rows] for state in (task.model.state_dict(), dense))
    assert not torch.equal(now, was)


def test_same_seed_same_plan() -> None:
    assert LoRAShear(SHORT).run(_task()).removed == LoRAShear(SHORT).run(_task()).removed


class _KilledError(Exception):
    pass


def test_resuming_after_a_kill_gives_the_plan_and_the_weights_of_the_undisturbed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = _task(work=tmp_path / "whole")
    expected = LoRAShear(SHORT).run(undisturbed)

    calls = []

    def dies_in_the_third_training(self: LoRAShear, task: PruningTask, *args: Any, **options: Any) -> Any:
        calls.append(options["description"])
        if len(calls) == 3:
            raise _KilledError
        return train_one_period(self, task, *args, **options)

    train_one_period = LoRAShear._train
    monkeypatch.setattr(LoRAShear, "_train", dies_in_the_third_training)
    with pytest.raises(_KilledError):
        LoRAShear(SHORT).run(_task(work=tmp_path / "killed"))
    monkeypatch.undo()
    resumed = _task(work=tmp_path / "killed")
    decision = LoRAShear(SHORT).run(resumed)
    assert decision.removed == expected.removed
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)
