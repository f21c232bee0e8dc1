"""Learnt gates: the contract, the soft budget, what the gates find out, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from pydantic import ValidationError

from secateur.errors import InputError, ModelError, PlanError
from secateur.methods.ddp import DDP, DDPSettings
from secateur.methods.gated import Gated, GateSteps, kept_score, threshold_at
from secateur.surgery import InputGates
from secateur.testing.method_contract import MethodContract
from secateur.training import TrainingSettings
from secateur.types import Scores

QUICK = DDPSettings(steps=6, saliency={"magnitude": 1.0})


class TestDDP(MethodContract):
    method = DDP
    settings = QUICK
    # the first allocation says where gates start, and they may decide otherwise
    test_every_choice_on_the_way_only_shrinks = None  # type: ignore[assignment]


class OfFamily(MethodContract):
    """Any other family or settings, for single tests."""

    method = DDP
    settings = QUICK

    def __init__(self, family: str = "llama-gqa", **settings: Any) -> None:
        self.family = family  # type: ignore[misc]
        self.settings = DDPSettings.model_validate({**QUICK.model_dump(), **settings})  # type: ignore[misc]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "olmo2", "phi3"])
def test_slice_equals_mask_in_other_families(family: str) -> None:
    OfFamily(family, steps=2, settle=0.5).test_slice_equals_mask_afterwards()


def test_adapters_are_merged_into_the_new_values() -> None:
    case = OfFamily(lora=True, steps=4)
    case.test_slice_equals_mask_afterwards()
    task = case.task()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    decision = case.decide(task)
    assert any("up_proj" in name for name in decision.updates)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not any(isinstance(module, LoraLayer) for module in task.model.modules())


def test_the_model_is_as_it_was() -> None:
    task = OfFamily().task()
    task.model.train()
    OfFamily().decide(task)
    assert all(module.training for module in task.model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in task.model.parameters())
    assert not any(module._forward_pre_hooks for module in task.model.modules())


@pytest.mark.parametrize("settings", [{}, {"amplify": False, "highest": 1.5}])
def test_gates_start_by_the_rank_of_a_score(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = OfFamily(lowest=0.2, **settings)
    task = case.task(0.3)
    scores = Scores({group.name: torch.randn(group.size) for group in task.prunable}, on_one_scale=True)
    monkeypatch.setattr("secateur.methods.saliency.Saliency.scores", lambda *_: scores)
    found, removed = DDP(case.settings)._start(task), task.allocate(scores)
    units = sorted((float(scores[name][unit]), name, unit) for name in scores for unit in range(len(scores[name])))
    for goes, first, last in ((True, 0.2, 0.7), (False, 0.7, 1.0)):
        part = [(name, unit) for _, name, unit in units if (unit in removed.get(name, ())) == goes]
        gates = [float(found[name][unit]) for name, unit in part]
        assert gates == torch.linspace(first, last, len(part)).tolist()


@pytest.mark.parametrize("settings", [{}, {"settle": 0.0}])
def test_kept_columns_are_multiplied_and_removed_ones_are_as_they_were(settings: dict[str, Any]) -> None:
    case = OfFamily(amplify=False, **settings)
    task = case.task(0.4)
    decision = case.decide(task)
    for layer in (0, 1):
        gone = decision.removed[f"layers.{layer}.mlp"]
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        factors = (decision.updates[name] / task.model.get_parameter(name)).detach()
        torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-4, atol=1e-5)
        assert torch.equal(factors[0, gone], torch.ones(len(gone)))
        kept = [unit for unit in range(40) if unit not in gone]
        assert (factors[0, kept] <= 1 + 1e-5).all()
        assert (factors[0, kept] < 0.999).any()


def test_a_unit_without_effect_goes_and_one_with_much_stays() -> None:
    """Whatever they start with: the scores are random."""
    case = OfFamily(steps=40, saliency={"random": 1.0}, lowest=0.7, settle=0.0, distillation=50.0)
    task = case.task(0.3, kinds=("ffn",))
    with torch.no_grad():
        for layer in task.model.model.layers:
            layer.mlp.down_proj.weight[:, :8] = 0.0
            layer.mlp.down_proj.weight[:, 8:12] *= 6.0
    decision = case.decide(task)
    for layer in (0, 1):
        gone = set(decision.removed[f"layers.{layer}.mlp"])
        assert set(range(8)) <= gone
        assert len(set(range(8, 12)) & gone) <= 1  # of 40 units, 3 or 4 are kept


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_soft_budget_is_met(ratio: float) -> None:
    case = OfFamily(steps=40)
    decision = case.decide(case.task(ratio))
    assert decision.metrics["removed_share"] == pytest.approx(decision.metrics["target_share"], abs=0.1)
    shares = [entry["removed_share"] for entry in decision.metrics["training"] if "removed_share" in entry]
    assert len(shares) > 5


def test_scores_and_threshold_are_those_of_the_paper() -> None:
    assert threshold_at(0.0, 0.1) == 0.5
    assert threshold_at(0.25, 0.1) == pytest.approx(0.3)
    assert threshold_at(1.0, 0.1) == pytest.approx(0.1)
    multiplier = torch.tensor([0.0, 0.2, 1.0], requires_grad=True)
    score = kept_score(multiplier, 0.2)
    torch.testing.assert_close(score.detach(), torch.tensor([0.0, 0.5, 1.0]))
    score.sum().backward()
    assert multiplier.grad is not None
    assert (multiplier.grad > 0).all()  # also where the score is clamped


def _gated(z: float, target: float) -> Gated:
    task = OfFamily().task()
    start = {group.name: torch.full((group.size,), z) for group in task.prunable}
    costs = {name: task.graph.unit_cost(task.graph[name]) for name in start}
    gates = InputGates(task.model, task.graph, start)
    return Gated(task.model, gates, start, costs, target=target, distillation=2.0, last_threshold=0.1)


def test_multipliers_ascend_and_gates_descend() -> None:
    gated = _gated(0.5, target=0.9)
    assert 0 < float(gated.removed_share(gated.scores())) < 0.9
    gated.constraint().backward()
    assert gated.lambdas.grad is not None
    assert gated.quadratic.grad is not None
    assert float(gated.lambdas.grad[0]) > 0  # q is below ρ: λ₁ falls below zero, and rewards a larger q
    assert float(gated.lambdas.grad[1]) < 0
    assert float(gated.quadratic.grad) < 0
    with torch.no_grad():
        gated.quadratic += 1.0
    gated.zero_grad()
    gated.constraint().backward()
    assert all((z.grad > 0).all() for z in gated.z if z.grad is not None)


def test_units_count_by_their_parameters() -> None:
    gated = _gated(1.0, target=0.2)
    with torch.no_grad():
        gated.z[gated.names.index("layers.0.attention")][0] = 0.0
    graph = OfFamily().task().graph
    total = sum(graph.unit_cost(group) * group.size for group in graph.prunable)
    expected = graph.unit_cost(graph["layers.0.attention"]) / total
    assert float(gated.removed_share(gated.scores())) == pytest.approx(expected, rel=1e-2)


def test_the_loss_of_the_ungated_model_has_no_divergence() -> None:
    gated = _gated(1.0, target=0.2)
    ids = OfFamily().task().training_blocks.ids[:2]  # type: ignore[union-attr]
    with torch.no_grad():
        loss = gated(ids, ids)["loss"]
        own = gated.frozen(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=1e-5)  # the λ are zero
    with torch.no_grad():
        for z in gated.z:
            z.fill_(0.5)
        without = Gated(
            gated.frozen, gated.inputs, dict(zip(gated.names, gated.z, strict=True)), dict.fromkeys(gated.names, 1),
            target=0.2, distillation=0.0, last_threshold=0.1,
        )  # fmt: skip
        assert float(gated(ids, ids)["loss"]) > float(without(ids, ids)["loss"]) + 0.01


@pytest.mark.parametrize("micro", [1, 4])
def test_the_size_of_a_pass_does_not_change_the_answer(micro: int) -> None:
    case = OfFamily()
    task = case.task()
    task.training = TrainingSettings(batch_size=4, micro_batch_size=micro, precision="fp32")
    whole = case.task()
    whole.training = TrainingSettings(batch_size=4, precision="fp32", gradient_checkpointing=True)
    one, other = case.decide(task), case.decide(whole)
    assert one.removed == other.removed
    for name, value in one.updates.items():
        torch.testing.assert_close(value, other.updates[name], rtol=1e-3, atol=1e-4)


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(("killed", "lora"), [(4, False), (8, True)])  # before the choice, and after it
def test_a_killed_run_goes_on_to_the_same_answer(
    killed: int, lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OfFamily(steps=10, settle=0.4, lora=lora)
    expected = case.decide(case.task(0.4))

    def task() -> Any:
        made = case.task(0.4)
        made.work = tmp_path / "method"
        made.training = TrainingSettings(batch_size=4, precision="fp32", checkpoint_steps=3)
        return made

    own = GateSteps.on_step_begin

    def watched(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == killed:
            raise KilledError
        own(self, args, state, control, **more)

    with monkeypatch.context() as patch:
        patch.setattr(GateSteps, "on_step_begin", watched)
        with pytest.raises(KilledError):
            case.decide(task())
    checkpoint = tmp_path / "method" / f"checkpoint-{killed // 3 * 3}"
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert 0 < weights < sum(4 * parameter.numel() for parameter in task().model.parameters()) / (1 if lora else 10)
    monkeypatch.setattr("secateur.methods.saliency.Saliency.scores", lambda *_: pytest.fail("scored again"))
    for _ in range(2):  # the second time: a kill before the decision was kept
        decision = case.decide(task())
        assert decision.removed == expected.removed
        assert decision.metrics["removed_share"] == pytest.approx(expected.metrics["removed_share"], rel=1e-4)
        for name, value in decision.updates.items():
            torch.testing.assert_close(value, expected.updates[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", ["int8", "nf4"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_quantised_base(base: str, lora: bool) -> None:
    pytest.importorskip("bitsandbytes")
    case = OfFamily(base=base, lora=lora)
    task = case.task(0.3)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    assert sum(map(len, case.decide(task).removed.values())) > 0
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    case.test_slice_equals_mask_afterwards()


def test_what_cannot_be_done_is_refused_early() -> None:
    with pytest.raises(ModelError, match="not the weight of a linear"):
        DDP().check(OfFamily("mixtral").task(0.1))
    DDP().check(OfFamily("mixtral").task(0.01, kinds=("attention",)))
    with pytest.raises(ModelError, match="kind hidden"):
        DDP().check(OfFamily().task(0.1, kinds=("hidden",)))
    with pytest.raises(InputError, match="trains no adapters"):
        DDP(DDPSettings(saliency={"lora": 1.0})).check(OfFamily().task())
    with pytest.raises(PlanError, match="cannot be reached"):
        OfFamily().decide(OfFamily().task(0.95))
    for keys in ({"settle": 1.0}, {"lowest": 0.0}, {"highest": 0.5}, {"threshold": 0.6}):
        with pytest.raises(ValidationError):
            DDPSettings.model_validate(keys)
