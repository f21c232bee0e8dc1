"""LoRAPrune: the contract, and what its callback must do in a training loop."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

from secateur.errors import InputError, ModelError
from secateur.graph import trace
from secateur.importance.lora import AdapterGradients
from secateur.methods.guided import GuidedPruning
from secateur.methods.loraprune import LoRAPrune, LoRAPruneSettings
from secateur.planning import Budget, cubic
from secateur.surgery import slice_model
from secateur.testing.method_contract import MethodContract, noise
from secateur.testing.tiny import build
from secateur.training import LoraSettings, TrainingSettings, attach_lora, train
from secateur.types import Cut
from secateur.walk import Calibration

QUICK = LoRAPruneSettings(steps=6, every=2)


class TestLoRAPrune(MethodContract):
    method = LoRAPrune
    settings = QUICK


class Watch(TrainerCallback):
    """Looks at the pruning callback and at the gradients, step by step."""

    def __init__(self, pruning: GuidedPruning) -> None:
        self.pruning = pruning
        self.removed: list[dict[str, list[int]]] = []
        self.outputs: list[torch.Tensor] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.removed.append({name: list(units) for name, units in self.pruning.removed.items()})


def pruning_of(model: Any, ratio: float = 0.3, steps: int = 12, **options: Any) -> GuidedPruning:
    return GuidedPruning(trace(model), Budget(ratio=ratio), partial(cubic, steps=steps), **{"every": 1, **options})


def adapted(family: str = "llama-gqa") -> Any:
    return attach_lora(build(family), LoraSettings(rank=4), seed=0)


def run(model: Any, pruning: GuidedPruning, steps: int = 12, watch: Any = None, **settings: Any) -> None:
    train(
        model,
        noise(16, 2).ids,
        TrainingSettings(**{"batch_size": 4, "precision": "fp32", **settings}),
        steps=steps,
        seed=0,
        description="",
        callbacks=[pruning, *([watch] if watch else [])],
    )


def test_masks_never_grow_back_and_follow_the_schedule() -> None:
    model = adapted()
    pruning = pruning_of(model)
    watch = Watch(pruning)
    run(model, pruning, watch=watch)
    sizes = [sum(map(len, removed.values())) for removed in watch.removed]
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 4
    assert sizes[-2] == sizes[-1]  # the cool-down
    for earlier, later in zip(watch.removed, watch.removed[1:], strict=False):
        assert all(set(units) <= set(later[name]) for name, units in earlier.items())


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "gpt2", "phi3", "olmo2"])
def test_the_masked_model_with_its_adapters_is_the_sliced_one(family: str) -> None:
    model = adapted(family)
    pruning = pruning_of(model)
    run(model, pruning)
    ids = noise(2, 3).ids
    with torch.no_grad():
        masked = model(ids).logits
        pruning.release()
        assert not torch.allclose(model(ids).logits, masked, atol=1e-3)
        slice_model(model, pruning.graph, Cut.removing(pruning.graph, pruning.removed))
        torch.testing.assert_close(model(ids).logits, masked, rtol=1e-4, atol=1e-4)


def test_removed_units_get_no_gradient() -> None:
    model = adapted()
    pruning = pruning_of(model)
    watch = Watch(pruning)
    run(model, pruning, watch=watch)
    units = watch.removed[-2]["layers.0.mlp"]
    last = {name: value for name, value in watch.gradients[-1].items() if "layers.0.mlp" in name}
    for name, gradient in last.items():
        if "down_proj.lora_A" in name:
            assert (gradient[:, units] == 0).all()
        if "up_proj.lora_B" in name or "gate_proj.lora_B" in name:
            assert (gradient[units] == 0).all()
    assert any(value.abs().sum() > 0 for value in last.values())


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 1}, {"max_grad_norm": 1e-4}, {"max_grad_norm": 0.0}])
def test_gradients_are_those_of_the_whole_batch_unclipped(settings: dict[str, Any]) -> None:
    """Neither accumulation nor clipping changes what is read: it is what one backward pass over the batch gives."""
    model, blocks = adapted(), noise(4, 2)
    pruning = pruning_of(model, moving_average=0.0)
    Calibration(blocks).backward(model)
    expected = AdapterGradients(model, pruning.graph, pruning.criterion).scores()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    watch = Watch(pruning)
    train(
        model,
        blocks.ids,
        TrainingSettings(batch_size=4, precision="fp32", **settings),
        steps=1,
        seed=0,
        description="",
        callbacks=[pruning, watch],
    )
    for name, value in watch.gradients[0].items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-3, atol=1e-7)
    for name in expected:
        torch.testing.assert_close(pruning.scores[name], expected[name], rtol=1e-3, atol=1e-6)


def test_clipping_happens_after_reading() -> None:
    norms = []

    class Last(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

    model = adapted()
    run(model, pruning_of(model), steps=2, watch=Last(), max_grad_norm=1e-3)
    assert all(float(norm) == pytest.approx(1e-3, rel=1e-2) for norm in norms)


def begun(pruning: GuidedPruning, model: Any, max_grad_norm: float = 0.0) -> None:
    arguments: Any = SimpleNamespace(max_grad_norm=max_grad_norm)
    pruning.on_train_begin(arguments, Any, Any, model=model)  # type: ignore[arg-type]


def test_a_trainer_that_clips_first_is_refused() -> None:
    model = adapted()
    with pytest.raises(InputError, match="max_grad_norm"):
        begun(pruning_of(model), model, max_grad_norm=1.0)


def test_the_moving_average_is_what_it_says() -> None:
    model = adapted()
    pruning = pruning_of(model, moving_average=0.75)
    seen: list[dict[str, torch.Tensor]] = []

    class Read(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.append(dict(AdapterGradients(model, pruning.graph, pruning.criterion).scores().values))

    run(model, pruning, steps=3, watch=Read())
    for name in pruning.scores:
        weights = [0.25 * 0.75**2, 0.25 * 0.75, 0.25]
        expected = sum(weight * now[name] for weight, now in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(pruning.scores[name], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("spoilt", [1, 5])  # the last: while the masks grow, and when all are there
@pytest.mark.parametrize("place", [0, -1])
def test_steps_without_finite_gradients_are_skipped(spoilt: int, place: int, max_grad_norm: float) -> None:
    """And the adapters survive them: neither the clip nor the optimiser sees what is not finite."""

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == spoilt:
                gradients = [p.grad for p in model.parameters() if p.grad is not None]
                gradients[place].view(-1)[-1] = float("nan") if place else float("inf")

    model = adapted()
    pruning = pruning_of(model, steps=4)
    train(
        model,
        noise(16, 2).ids,
        TrainingSettings(batch_size=4, precision="fp32", max_grad_norm=max_grad_norm),
        steps=6,
        seed=0,
        description="",
        callbacks=[Spoil(), pruning],
    )
    assert pruning.skipped == 1
    assert all(torch.isfinite(value).all() for value in pruning.average.values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_gradients_whose_squares_are_not_finite_are_read() -> None:
    model = adapted()
    pruning = pruning_of(model)
    begun(pruning, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e20) if parameter.requires_grad else None
    pruning.on_pre_optimizer_step(None, Any, Any)  # type: ignore[arg-type]
    assert (pruning.observed, pruning.skipped) == (1, 0)


def test_an_adapter_that_is_merged_while_it_trains_is_refused() -> None:
    model = adapted()
    pruning = pruning_of(model)
    begun(pruning, model)
    Calibration(noise(2, 2)).backward(model)
    model.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        pruning.on_pre_optimizer_step(None, Any, Any)  # type: ignore[arg-type]


def test_a_parameter_that_trains_later_is_looked_at() -> None:
    model = adapted()
    pruning = pruning_of(model)
    begun(pruning, model)
    Calibration(noise(2, 2)).backward(model)
    late = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    late.grad = torch.full_like(late, float("nan"))
    pruning.on_pre_optimizer_step(None, Any, Any)  # type: ignore[arg-type]
    assert pruning.skipped == 1
    assert not late.grad.any()


def test_no_gradient_of_a_frozen_weight_is_ever_there() -> None:
    seen = set()

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.update(name for name, p in model.named_parameters() if p.grad is not None or p.requires_grad)

    model = adapted()
    run(model, pruning_of(model), watch=Look())
    assert seen
    assert all(".lora_" in name for name in seen)


class KilledError(Exception):
    """Stands for a kill."""


class Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 7:
            raise KilledError


@pytest.mark.parametrize("family", ["llama-gqa"])
def test_a_killed_run_goes_on_to_the_same_answer(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Case(MethodContract):
        method = LoRAPrune
        settings = LoRAPruneSettings(steps=12, every=2)

    Case.family = family
    case = Case()
    whole = case.task(0.4)
    expected = case.decide(whole)

    task = case.task(0.4)
    task.work = tmp_path / "method"
    task.training = TrainingSettings(batch_size=4, precision="fp32", checkpoint_steps=3)
    original = GuidedPruning.on_step_end
    monkeypatch.setattr(GuidedPruning, "on_step_end", Kill().on_step_end, raising=False)
    with pytest.raises(KilledError):
        case.decide(task)
    monkeypatch.setattr(GuidedPruning, "on_step_end", original)
    shutil.copytree(tmp_path / "method" / "checkpoint-6", tmp_path / "method" / "checkpoint-9")
    (tmp_path / "method" / "checkpoint-9" / "callbacks.safetensors").unlink()  # a kill while it was written

    again = case.task(0.4)
    again.work, again.training = task.work, task.training
    decision = case.decide(again)
    assert decision.removed == expected.removed
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, whole.model.state_dict()[name], rtol=1e-4, atol=1e-6)
    final = case.task(0.4)
    final.work, final.training = task.work, task.training
    monkeypatch.setattr(GuidedPruning, "on_step_begin", lambda *_, **__: pytest.fail("trained again"), raising=False)
    assert case.decide(final).removed == expected.removed  # a kill before the decision was kept
    for name, value in final.model.state_dict().items():
        torch.testing.assert_close(value, again.model.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantised_base(base: Any) -> None:
    pytest.importorskip("bitsandbytes")

    class Case(MethodContract):
        method = LoRAPrune
        settings = QUICK.model_copy(update={"base": base})

    case = Case()
    task = case.task(0.3)
    frozen = task.model.model.embed_tokens.weight.clone()
    decision = case.decide(task)
    assert sum(map(len, decision.removed.values())) > 0
    assert torch.equal(task.model.model.embed_tokens.weight, frozen)
    assert all(p.dtype is torch.float32 for p in task.model.parameters())
    case.test_slice_equals_mask_afterwards()


def test_a_base_that_cannot_be_quantised_is_refused_early() -> None:
    pytest.importorskip("bitsandbytes")
    task = replace(TestLoRAPrune().task(), model=(model := build("gpt2")), graph=trace(model))
    with pytest.raises(InputError, match="plain linear"):
        LoRAPrune(LoRAPruneSettings(base="int8")).check(task)


def test_what_cannot_be_masked_is_refused_early() -> None:
    task = TestLoRAPrune().task()
    with pytest.raises(ModelError, match="kind hidden"):
        LoRAPrune().check(replace(task, budget=Budget(ratio=0.1, kinds=("hidden",))))
    LoRAPrune().check(task)


def test_recovery_reads_another_order_than_pruning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery trains with the run's seed: the same order again would show it the same first blocks twice."""
    seeds: list[int] = []

    def watched(*arguments: Any, seed: int, **settings: Any) -> Any:
        seeds.append(seed)
        return train(*arguments, seed=seed, **settings)

    monkeypatch.setattr("secateur.methods.loraprune.train", watched)
    task = TestLoRAPrune().task(seed=3)
    LoRAPrune(LoRAPruneSettings(steps=2)).run(task)
    assert seeds
    assert task.seed not in seeds


def test_settings_are_checked() -> None:
    for keys in ({"warm_up": 0.6, "cool_down": 0.5}, {"moving_average": 1.0}, {"form": "third"}, {"every": 0}):
        with pytest.raises(ValidationError):
            LoRAPruneSettings.model_validate(keys)


def test_a_model_whose_units_carry_no_adapter_is_refused() -> None:
    task = TestLoRAPrune().task(0.2)
    task.lora = LoraSettings(targets=("q_proj",))
    with pytest.raises(ModelError, match=r"lora\.targets"):
        LoRAPrune(QUICK).run(task)
