"""What the released LHSPG optimiser does differently from the paper, or does wrong: none of it here.

The list is that of a reading of its source; each test says which point it holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from secateur.data import TokenBlocks
from secateur.graph import trace
from secateur.importance import CRITERIA
from secateur.methods import periods
from secateur.methods.base import PruningTask
from secateur.methods.lorashear import LoRAShear, LoRAShearSettings
from secateur.planning import Budget, allocate, make_plan
from secateur.testing.method_contract import noise
from secateur.testing.tiny import TINY
from secateur.training import LoraSettings, TrainingSettings, train
from secateur.types import Scores
from secateur.walk import Calibration

RATE = 1e-2


def task(**changes: Any) -> PruningTask:
    model = TINY["llama-gqa"]()
    plain = PruningTask(
        model=model,
        tokenizer=None,
        graph=trace(model),
        budget=Budget(ratio=0.2),
        calibration=Calibration(noise(4, 1)),
        training_blocks=noise(16, 2),
        training=TrainingSettings(precision="fp32", learning_rate=RATE, warmup=0.0, max_grad_norm=0.0),
    )
    return dataclasses.replace(plain, **changes)


class Watch(TrainerCallback):
    """Sees the adapters at the beginning, after the first step and at the end of one stretch of training."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.optimiser_states: list[int] = []

    def look(self, model: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    def on_train_begin(self, *_: Any, model: Any = None, optimizer: Any = None, **__: Any) -> None:
        self.look(model)
        self.optimiser_states.append(len(optimizer.state))

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.look(model)


@pytest.fixture(scope="module")
def run() -> tuple[list[Watch], PruningTask, Any]:
    """One run of warm-up and two periods, watched, with every criterion at once."""
    watches: list[Watch] = []

    def watched(*args: Any, callbacks: Any, **options: Any) -> Any:
        watches.append(Watch())
        return train(*args, callbacks=[*callbacks, watches[-1]], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(periods, "train", watched)
        given = task()
        settings = LoRAShearSettings(
            warmup_steps=1,
            periods=2,
            period_steps=3,
            projection="half-space",
            saliency={name: 1.0 for name, one in CRITERIA.items() if not one.kinds},
        )
        decision = LoRAShear(settings).run(given)
    return watches, given, decision


def test_bug_1_no_merge_and_no_restart_between_periods(run: Any) -> None:
    """Here each period has fresh adapters (B = 0, another A) and a fresh optimiser; what was learned is merged."""
    watches, given, _ = run
    assert [watch.optimiser_states for watch in watches] == [[0]] * 3
    for watch in watches:
        assert not any(value.any() for name, value in watch.seen[0].items() if ".lora_B." in name)
    name = next(name for name in watches[0].seen[0] if ".lora_A." in name)
    assert len({float(watch.seen[0][name].sum()) for watch in watches}) == 3
    dense = TINY["llama-gqa"]().state_dict()
    for name, value in given.model.state_dict().items():
        if name.endswith("proj.weight"):
            assert not torch.equal(value, dense[name])


def test_bugs_2_and_3_criteria_that_were_never_imported_or_never_ran(run: Any) -> None:
    """All of them were scored and combined in the run above, each under its own name."""
    _, given, decision = run
    assert set(decision.scores) >= {group.name for group in given.graph.prunable}
    assert len({criterion.name for criterion in CRITERIA.values()}) == len(CRITERIA)


def test_bug_4_lora_a_of_attention_was_frozen_for_the_whole_period(run: Any) -> None:
    for watch in run[0][1:]:
        for name, value in watch.seen[-1].items():
            if ".lora_A." in name:
                assert not torch.equal(value, watch.seen[0][name]), name


def test_bug_6_the_first_step_of_adam_was_a_third_of_its_size(run: Any) -> None:
    """Bias-corrected moments make it the learning rate, wherever there is a gradient worth the name."""
    step = {name: (run[0][0].seen[1][name] - old).abs() for name, old in run[0][0].seen[0].items() if "lora_B" in name}
    sizes = torch.cat([value.flatten() for value in step.values()])
    assert float(sizes.quantile(0.5)) == pytest.approx(RATE, rel=0.02)


def test_bug_5_a_weight_without_an_adapter_never_reached_zero() -> None:
    """LoRA on the gate alone: the rows of the up projection, and all of attention, go to zero all the same."""
    given = task(lora=LoraSettings(targets=("gate_proj",)))
    decision = LoRAShear(LoRAShearSettings(period_steps=3)).run(given)
    parameters = dict(given.model.named_parameters())
    assert decision.removed
    for name, units in decision.removed.items():
        for member in given.graph[name].members:
            assert not parameters[member.parameter].movedim(member.axis, 0)[member.rows(units)].any()


def test_bug_7_when_there_were_too_many_candidates_the_earliest_layers_went() -> None:
    """The lowest scores go, wherever they are, and a period takes the lowest of what is left."""
    graph = trace(TINY["llama-gqa"]())
    scores = {group.name: torch.full((group.size,), 5.0) for group in graph.prunable}
    last = graph["layers.1.mlp"]
    scores[last.name] = torch.arange(last.size).flip(0).float() / last.size  # the lowest are the last units
    budget = Budget(ratio=0.1, kinds=("ffn",), normalise="none", protect_first=0, protect_last=0)
    half = allocate(graph, Scores(scores), budget, {}, ratio=0.05)
    assert set(half) == {last.name}
    assert half[last.name] == list(range(last.size - len(half[last.name]), last.size))
    whole = allocate(graph, Scores(scores), budget, half)
    assert set(half[last.name]) < set(whole[last.name])
    assert whole[last.name] == list(range(last.size - len(whole[last.name]), last.size))


@pytest.mark.parametrize("periods", [1, 3])
def test_bug_9_rounding_in_every_period_ended_below_the_target(periods: int) -> None:
    given = task()
    decision = LoRAShear(LoRAShearSettings(periods=periods, period_steps=2)).run(given)
    plan = make_plan(given.graph, decision.removed, given.budget, method="lorashear")
    unit = min(given.graph.unit_cost(group) for group in given.graph.prunable)
    assert abs(plan.ratio_reached - 0.2) * plan.parameters_before <= unit


def test_bug_10_what_consumes_a_unit_and_its_adapter_were_left_as_they_were(run: Any) -> None:
    """Columns of consumers are zero as well, and no adapter is left that could bring a unit back."""
    _, given, decision = run
    parameters = dict(given.model.named_parameters())
    assert not any("lora_" in name for name in parameters)
    consumers = [
        parameters[member.parameter].movedim(member.axis, 0)[member.rows(units)]
        for name, units in decision.removed.items()
        for member in given.graph[name].members
        if member.role == "in"
    ]
    assert consumers
    assert not any(rows.any() for rows in consumers)


def test_bug_8_sizes_and_devices_were_written_into_the_code() -> None:
    """Groups are known by names that do not change from run to run; sizes come from the model's tensors."""
    model = TINY["llama-odd"]()
    assert [group.name for group in trace(model)] == [group.name for group in trace(model)]
    blocks = TokenBlocks(noise(4, 1).ids, ("noise",) * 4)
    given = task(model=model, graph=trace(model), calibration=Calibration(blocks), budget=Budget(ratio=0.1))
    assert LoRAShear(LoRAShearSettings(period_steps=1)).run(given).removed
