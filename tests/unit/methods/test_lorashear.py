"""LoRAShear on tiny models: exact zeros that can be cut, plans that only shrink, and runs that resume."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.methods import periods
from secateur.methods.base import PruningTask
from secateur.methods.lhspg import Shrinking, still_consumed
from secateur.methods.lorashear import LoRAShear, LoRAShearSettings
from secateur.methods.saliency import combine
from secateur.planning import Budget, make_plan, restrict
from secateur.surgery import masked, slice_model
from secateur.testing.method_contract import MethodContract, noise
from secateur.testing.tiny import TINY
from secateur.training import LoraSettings, TrainingSettings
from secateur.types import Cut, Scores
from secateur.walk import Calibration


class TestLoRAShear(MethodContract):
    method = LoRAShear
    settings = LoRAShearSettings(periods=2, period_steps=1, warmup_steps=1)


def _task(name: str = "llama-gqa", **changes: Any) -> PruningTask:
    model = TINY[name]()
    task = PruningTask(
        model=model,
        tokenizer=None,
        graph=trace(model),
        budget=Budget(ratio=0.2),
        calibration=Calibration(noise(4, 1)),
        training_blocks=noise(16, 2),
        training=TrainingSettings(batch_size=2, micro_batch_size=2, precision="fp32"),
        seed=3,
    )
    return dataclasses.replace(task, **changes)


SHORT = LoRAShearSettings(periods=3, period_steps=3, warmup_steps=1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("projection", ["decay", "half-space"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gpt2", "mixtral", "olmo2"])
def test_what_goes_is_exactly_zero_so_that_cutting_changes_nothing(name: str, projection: Any, optimizer: Any) -> None:
    """Both modes, both optimisers; OLMo2 has a norm over all heads together, which counts the zeros as well."""
    rate = {"adamw": 1e-3, "sgd": 0.1}[optimizer]
    budget = Budget(ratio=0.15, kinds=("attention",)) if name == "olmo2" else Budget(ratio=0.2)
    training = TrainingSettings(precision="fp32", optimizer=optimizer, learning_rate=rate)
    task = _task(name, training=training, budget=budget)
    dense = copy.deepcopy(task.model.state_dict())
    decision = LoRAShear(SHORT.model_copy(update={"projection": projection})).run(task)
    parameters = dict(task.model.named_parameters())
    for group, units in decision.removed.items():
        for member in task.graph[group].members:
            assert not parameters[member.parameter].movedim(member.axis, 0)[member.rows(units)].any()
    assert sum(map(len, decision.removed.values())) > 1
    ids = noise(2, 5).ids
    kept = Cut.removing(task.graph, decision.removed)
    with torch.no_grad():
        before = task.model(ids).logits
        with masked(task.model, task.graph, kept):
            torch.testing.assert_close(task.model(ids).logits, before, atol=1e-4, rtol=0)
        slice_model(task.model, task.graph, kept)
        after = task.model(ids).logits
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)
    for path, weight in task.model.named_parameters():  # the norms that are left weigh what they did at first
        if "q_norm" in path or "k_norm" in path:
            owner = next(owner for owner in task.graph if any(m.parameter == path for m in owner.members))
            member = next(member for member in owner.members if member.parameter == path)
            rows = member.rows(kept.get(owner.name, range(owner.size))).flatten()
            torch.testing.assert_close(weight.detach(), dense[path][rows])


@pytest.mark.parametrize("projection", ["decay", "half-space"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama-gqa", "attention"),
        ("llama-gqa", "query"),
        ("llama-mqa", "attention"),
        ("gpt-bigcode", "attention"),
        ("falcon-mqa", "attention"),
        ("gpt2", "ffn"),
    ],
)
def test_a_period_ends_with_units_that_are_not_heard_any_more(
    name: str, kind: Any, projection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training sees the model without them: zeroing what consumes them afterwards changes nothing.

    Heads that share their values are consumed with queries of zero, so that they must shrink at the consuming end.
    """
    budget = Budget(ratio=0.06, kinds=(kind,), floor=0.0)
    task = _task(name, budget=budget, graph=restrict(trace(TINY[name]()), budget))
    ids, jumps, settle = noise(2, 5).ids, [], periods._settle

    def watched(task: PruningTask, adapted: Any, removed: Any) -> None:
        if adapted is None:
            return settle(task, adapted, removed)
        adapted.eval()
        with torch.no_grad():
            before = adapted(ids).logits
            settle(task, adapted, removed)
            jumps.append(float((task.model(ids).logits - before).abs().max()))

    monkeypatch.setattr(periods, "_settle", watched)
    decision = LoRAShear(LoRAShearSettings(periods=2, period_steps=3, projection=projection)).run(task)
    assert decision.removed
    assert len(jumps) == 2
    assert max(jumps) < 1e-4


def test_trying_what_is_heard_leaves_the_model_as_it_was() -> None:
    model = TINY["llama-mqa"]()
    before = copy.deepcopy(model.state_dict())
    consumed = still_consumed(model, trace(model))
    assert consumed == {f"layers.{layer}.attention" for layer in range(2)}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    model(noise(1, 1).ids)  # no hook is left that would hear
    assert still_consumed(TINY["llama-gqa"](), trace(TINY["llama-gqa"]())) == set()


def test_heads_in_a_norm_over_all_of_them_cannot_shrink_where_they_are_consumed() -> None:
    task = _task("olmo2", budget=Budget(ratio=0.05, kinds=("query",)))
    with pytest.raises(ModelError, match=r"shrink where they are consumed.*budget\.protect"):
        LoRAShear().check(task)


def test_the_target_is_met_and_the_important_units_have_learned() -> None:
    task = _task()
    dense = copy.deepcopy(task.model.state_dict())
    decision = LoRAShear(SHORT).run(task)
    plan = make_plan(task.graph, decision.removed, task.budget, method="lorashear")
    smallest = min(task.graph.unit_cost(group) for group in task.graph.prunable)
    assert abs(plan.ratio_reached - 0.2) * plan.parameters_before <= smallest
    kept = Cut.removing(task.graph, decision.removed)
    mlp = next(group for group in task.graph.prunable if group.kind == "ffn" and group.name in kept)
    member = mlp.members[0]
    rows = member.rows(kept[mlp.name]).flatten()
    now, was = (state[member.parameter].movedim(member.axis, 0)[rows] for state in (task.model.state_dict(), dense))
    assert not torch.equal(now, was)


def test_same_seed_same_plan() -> None:
    assert LoRAShear(SHORT).run(_task()).removed == LoRAShear(SHORT).run(_task()).removed


class _KilledError(Exception):
    pass


class _Kill:
    """Dies at one optimiser step of the run, counted over all periods."""

    def __init__(self, at: int) -> None:
        self.left = at

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise _KilledError


@pytest.mark.parametrize(
    ("family", "projection", "at"),
    [("llama-gqa", "decay", 1), ("llama-gqa", "decay", 9), ("olmo2", "half-space", 5), ("llama-gqa", "half-space", 13)],
)
def test_resuming_after_a_kill_inside_a_period_gives_the_plan_and_the_weights_of_the_undisturbed_run(
    family: str, projection: Any, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of warm-up and three periods of four, a checkpoint after every second step; dropout is random."""
    settings = LoRAShearSettings(periods=3, period_steps=4, warmup_steps=2, projection=projection)
    training = TrainingSettings(precision="fp32", checkpoint_steps=2)
    common: dict[str, Any] = {"training": training, "lora": LoraSettings(dropout=0.1)}
    if family == "olmo2":
        common["budget"] = Budget(ratio=0.15, kinds=("attention",))
    undisturbed = _task(family, **common)
    expected = LoRAShear(settings).run(undisturbed)

    monkeypatch.setattr(Shrinking, "on_step_begin", _Kill(at).on_step_begin)
    with pytest.raises(_KilledError):
        LoRAShear(settings).run(_task(family, work=tmp_path, **common))
    monkeypatch.undo()
    checkpoints = list(tmp_path.glob("training-*/checkpoint-*/callbacks.safetensors"))
    assert bool(checkpoints) == (at not in (1,))  # the others were killed after a checkpoint of their own period
    done = []

    class Count(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            done.append(1)

    monkeypatch.setattr(Shrinking, "on_step_begin", Count().on_step_begin)
    resumed = _task(family, work=tmp_path, **common)
    decision = LoRAShear(settings).run(resumed)
    assert decision.removed == expected.removed
    assert decision.scores is not None
    assert expected.scores is not None
    assert all(torch.equal(decision.scores[name], expected.scores[name]) for name in expected.scores)
    assert len(done) == 14 - 2 * (at // 2)  # nothing is trained again but what came after the checkpoint
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "saliency"), [("llama-mqa", "fisher"), ("olmo2", "hesso-lora-cosine")])
@pytest.mark.parametrize("period", [1, 2, 3])
def test_a_kill_while_a_period_is_scored_or_after_the_last_loses_no_training(
    family: str, saliency: str, period: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = LoRAShearSettings(periods=2, period_steps=3, warmup_steps=2, saliency={saliency: 1.0})
    common: dict[str, Any] = {"budget": Budget(ratio=0.1, kinds=("attention",))}
    undisturbed = _task(family, **common)
    expected = LoRAShear(settings).run(undisturbed)
    calls, settle = [0], periods._settle  # after each training, before scoring and in the end

    def dies(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == period:
            raise _KilledError
        settle(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(periods, "_settle", dies)
        with pytest.raises(_KilledError):
            LoRAShear(settings).run(_task(family, work=tmp_path, **common))
    trained: list[int] = []
    monkeypatch.setattr(Shrinking, "on_step_begin", lambda *_, **__: trained.append(1))
    resumed = _task(family, work=tmp_path, **common)
    assert LoRAShear(settings).run(resumed).removed == expected.removed
    assert len(trained) == 3 * (3 - period)
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=0)
    assert [path.name for path in tmp_path.glob("training-*")] == ["training-2"]


def test_saliency_that_reads_adapters_needs_a_warm_up_and_then_sees_what_was_trained() -> None:
    with pytest.raises(ValidationError, match="warmup_steps above 0"):
        LoRAShearSettings(saliency={"hesso-lora-cosine": 1.0})
    proxies = {f"hesso-{name}": 0.2 for name in ("magnitude", "average-magnitude")}
    proxies |= {f"hesso-lora-{name}": 0.2 for name in ("cosine", "first-order", "second-order")}
    settings = LoRAShearSettings(periods=2, period_steps=3, warmup_steps=2, saliency=proxies)
    task = _task()
    decision = LoRAShear(settings).run(task)
    assert make_plan(task.graph, decision.removed, task.budget, method="lorashear").ratio_reached > 0.15
    only = settings.model_copy(update={"saliency": {"hesso-lora-first-order": 1.0}})
    scores = LoRAShear(only).run(_task()).scores
    assert scores is not None
    assert all(bool((scores[name] > 0).any()) for name in scores)  # B = 0 would be 0 everywhere


@pytest.mark.parametrize(("name", "kind"), [("llama-gqa", "hidden"), ("llama-gqa", "layer")])
def test_what_zeroing_cannot_remove_is_refused_before_anything_is_trained(name: str, kind: Any) -> None:
    task = _task(name, budget=Budget(ratio=0.1, kinds=(kind,)))
    with pytest.raises(ModelError, match=f"kind {kind}"):
        LoRAShear().check(task)
    LoRAShear().check(_task(name))


def test_epsilon_without_a_half_space_is_refused() -> None:
    with pytest.raises(ValidationError, match="half-space"):
        LoRAShearSettings(epsilon=0.5)
    assert LoRAShearSettings(epsilon=0.5, projection="half-space").epsilon == 0.5


@pytest.mark.parametrize(
    "weights", [{"fisher": float("inf")}, {"fisher": float("nan")}, {"fisher": 1e308, "taylor": 1e308}]
)
def test_saliency_weights_are_finite(weights: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="finite"):
        LoRAShearSettings(saliency=weights)
    with pytest.raises(ValidationError, match="positive, finite number"):
        LoRAShearSettings(saliency={"fisher": 0.0})


def test_combined_saliency_is_the_weighted_sum_of_criteria_of_norm_one() -> None:
    one = Scores({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.0])}, of_loss=True)
    other = Scores({"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([2000.0])})
    both = combine({"one": one, "other": other}, {"one": 0.5, "other": 2.0})
    torch.testing.assert_close(both["a"], torch.tensor([0.3, 0.4]))
    torch.testing.assert_close(both["b"], torch.tensor([2.0]))
    assert not both.of_loss
