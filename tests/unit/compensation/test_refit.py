"""Compensation: the function comes back where the kept units can carry it, and errors only fall where they cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from secateur.compensation import Gram, Target, check_refittable, compensate, solve_refit
from secateur.compensation import gram as gram_module
from secateur.compensation import obs as obs_module
from secateur.compensation.gram import RIDGES
from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.graph import trace
from secateur.precision import in_float64, sums_device
from secateur.surgery import apply_updates, slice_model
from secateur.testing.tiny import TINY
from secateur.walk import Calibration


def _blocks(seed: int = 0, count: int = 12) -> Calibration:
    ids = torch.randint(3, 97, (count, 12), generator=torch.Generator().manual_seed(seed))
    return Calibration(TokenBlocks(ids, ("noise",) * count))


def _logits(model: Any, seed: int = 9) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(_blocks(seed, 2).ids).logits
    return logits


def _with_redundant_units() -> tuple[Any, dict[str, list[int]]]:
    """A Llama in which FFN channels 10 to 15 are linear combinations of the others, and KV head 1 repeats head 0."""
    model = TINY["llama-gqa"]()
    kept: dict[str, list[int]] = {}
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            mlp, attention = layer.mlp, layer.self_attn
            mlp.gate_proj.weight[:16] = mlp.gate_proj.weight[0]  # the same gate, so that the values combine linearly
            mixing = torch.randn(6, 10, generator=torch.Generator().manual_seed(number))
            mlp.up_proj.weight[10:16] = mixing @ mlp.up_proj.weight[:10]
            for name, rows in (("q_proj", 24), ("k_proj", 12), ("v_proj", 12)):
                weight = getattr(attention, name).weight
                weight[rows:] = weight[:rows]
            kept[f"layers.{number}.mlp"] = [*range(10), *range(16, 40)]
            kept[f"layers.{number}.attention"] = [0]
    return model, kept


@pytest.mark.parametrize("target", ["dense", "stream"])
def test_what_the_kept_units_can_carry_is_restored(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = _with_redundant_units()
    graph, dense = trace(model), _logits(model)
    plain = copy.deepcopy(model)
    slice_model(plain, graph, kept)
    assert float((_logits(plain) - dense).abs().max()) > 0.1
    monkeypatch.setattr(gram_module, "RIDGES", (1e-9,))
    found = compensate(model, graph, kept, _blocks(count=60), target)
    assert found.step == 1.0
    assert found.loss_after < found.loss_before
    apply_updates(model, found.updates)
    slice_model(model, graph, kept)
    torch.testing.assert_close(_logits(model), dense, atol=2e-3, rtol=1e-3)
    assert len(found.refits) == 4
    assert all(refit.before > 1e-3 and refit.after < 1e-5 for refit in found.refits.values())


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi", "cohere", "granite", "gemma2", "olmo2", "glm4"])
def test_the_target_stream_is_for_layers_that_add_to_the_stream(name: str) -> None:
    model = TINY[name]()
    if name == "granite":
        for layer in model.model.layers:
            layer.residual_multiplier = 0.22
    graph = trace(model)
    groups = [group.name for group in graph.prunable]
    check_refittable(model, graph, groups, "dense")
    if name in ("granite", "gemma2", "olmo2", "glm4"):
        with pytest.raises(ModelError, match=r"norm or a multiplier.* dense or own"):
            check_refittable(model, graph, groups, "stream")
        with pytest.raises(ModelError, match="norm or a multiplier"):
            compensate(model, graph, {groups[0]: [0]}, _blocks(), "stream")
    else:
        check_refittable(model, graph, groups, "stream")


@pytest.mark.parametrize("target", ["dense", "own"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "olmo2", "gemma2"])
def test_errors_fall_and_columns_of_removed_units_keep_their_values(name: str, target: Target) -> None:
    model = TINY[name]()
    graph, dense = trace(model), _logits(model)
    kept = {group.name: list(range(group.size - max(1, group.size // 4))) for group in graph.prunable}
    before = copy.deepcopy(model.state_dict())
    plain = copy.deepcopy(model)
    slice_model(plain, graph, kept)
    found = compensate(model, graph, kept, _blocks(count=60), target)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # nothing is written yet
    assert any(refit.step > 0 for refit in found.refits.values())
    assert all(refit.after <= refit.before for refit in found.refits.values())
    assert found.loss_after <= found.loss_before
    apply_updates(model, found.updates)
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())
    for key, value in model.state_dict().items():
        if key not in found.updates:
            assert torch.equal(value, before[key]), key
    for key in found.updates:
        [(group, member)] = [(g, m) for g, m in graph.of_parameter(key) if m.role == "in" and g.name in kept]
        gone = member.rows([unit for unit in range(group.size) if unit not in kept[group.name]]).flatten()
        now, was = (state[key].movedim(member.axis, 0)[gone] for state in (model.state_dict(), before))
        assert torch.equal(now, was)
    if found.updates:
        slice_model(model, graph, kept)
        assert float((_logits(model) - dense).square().mean()) < float((_logits(plain) - dense).square().mean())


def _problem(tokens: int, seed: int = 0, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the pruned model, and what a consumer gave in the dense one: kept inputs carry a part of the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator)
    x[:, 5] = x[:, 0] - x[:, 2] + noise * x[:, 5]
    return x, x @ WEIGHT.T


WEIGHT = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
KEPT = torch.tensor([0, 2, 3, 7])


def _gram(tokens: int, seed: int = 0, pieces: int = 1) -> Gram:
    gram = Gram.empty(5, 8, torch.device("cpu"))
    x, y = _problem(tokens, seed)
    for some, wanted in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        gram.add(some, wanted)
    return gram


def test_sums_do_not_depend_on_the_pieces_and_give_the_error_of_any_weights() -> None:
    one, many = _gram(300), _gram(300, pieces=7)
    torch.testing.assert_close(one.inputs, many.inputs, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(one.cross, many.cross, rtol=1e-5, atol=1e-3)
    x, y = _problem(300)
    new = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    error = (x[:, KEPT] @ new.T - y).square().sum() / y.square().sum()
    assert many.error(new, KEPT) == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_sums_of_products_do_not_depend_on_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_module, "_BLOCK", block)
    x, _ = _problem(300)
    torch.testing.assert_close(_gram(300).inputs, (x.double().T @ x.double()), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("ridge", RIDGES)
def test_the_solution_is_ridge_regression_towards_the_weights_that_are_there(
    ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_module, "RIDGES", (ridge,))
    gram = _gram(200)
    found = solve_refit(gram, gram, WEIGHT, KEPT)
    assert found.step == 1.0  # on the text that it was fitted to
    x, y = (tensor.double() for tensor in _problem(200))
    penalty = ridge * float(x[:, KEPT].square().sum(0).mean())

    def cost(w: torch.Tensor) -> torch.Tensor:
        return (x[:, KEPT] @ w.T - y).square().sum() + penalty * (w - WEIGHT[:, KEPT].double()).square().sum()

    w = found.weight.clone().requires_grad_(True)
    [gradient] = torch.autograd.grad(cost(w), w)
    assert float(gradient.abs().max()) < 1e-4 * float(cost(w))


def test_the_step_is_the_best_along_the_way_on_other_text_and_never_harms() -> None:
    fit, check = _gram(12), _gram(400, seed=5)  # far too little text to fit
    found = solve_refit(fit, check, WEIGHT, KEPT)
    old = WEIGHT[:, KEPT].double()
    assert found.after <= found.before == check.error(old, KEPT)
    for other in (0.9, 1.1):
        assert check.error(old + other * (found.weight - old), KEPT) >= found.after - 1e-9
    enough = solve_refit(_gram(4000), check, WEIGHT, KEPT)
    assert enough.after < found.after


def test_the_error_that_a_solution_names_is_the_error_of_its_weights() -> None:
    fit, check = _gram(60), _gram(400, seed=5)
    found = solve_refit(fit, check, WEIGHT, KEPT)
    assert 0 < found.after < found.before
    assert found.after == pytest.approx(check.error(found.weight, KEPT), rel=1e-9)


def test_an_input_a_million_times_as_large_as_the_others_does_not_end_the_refit() -> None:
    """The rounding of its sums outweighs the smallest ridges, and makes an eigenvalue negative."""
    fit, check = _gram(400), _gram(400, seed=5)
    for gram in (fit, check):
        gram.inputs[6, 6] *= 1e12
        gram.inputs[7, 7] *= 1e12
    fit.inputs[0, 0] = -1.0
    found = solve_refit(fit, check, WEIGHT, KEPT)
    assert torch.isfinite(found.weight).all()
    assert found.after <= found.before


def test_what_does_not_help_is_left_alone() -> None:
    fit, check = _gram(400), _gram(400, seed=5)
    check.cross = WEIGHT.double() @ check.inputs * 0 + (WEIGHT[:, KEPT].double() @ check.inputs[KEPT])
    found = solve_refit(fit, check, WEIGHT, KEPT)
    assert found.step == 0.0
    assert torch.equal(found.weight, WEIGHT[:, KEPT].double())
    silent = Gram.empty(5, 8, torch.device("cpu"))
    assert solve_refit(silent, silent, WEIGHT, KEPT).step == 0.0


def test_units_that_are_zero_already_need_no_repair() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 30:] = 0
    before = copy.deepcopy(model.state_dict())
    kept = {f"layers.{layer}.mlp": list(range(30)) for layer in range(2)}
    apply_updates(model, compensate(model, graph, kept, _blocks()).updates)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=1e-5, rtol=0)


def test_other_kinds_are_refused() -> None:
    model = TINY["qwen3-moe"]()
    graph = trace(model)
    experts = next(group for group in graph if group.kind == "expert")
    with pytest.raises(ModelError, match=r"recovery\.repair"):
        compensate(model, graph, {experts.name: list(range(experts.size - 1))}, _blocks())


@pytest.mark.parametrize("target", ["own", "dense", "stream"])
def test_a_refit_starts_from_the_pruned_model_and_not_from_the_dense_one(target: Target) -> None:
    """Columns that are half of what they should be: the guard compares with them, and the dense model is the target."""
    model, kept = _with_redundant_units()
    graph, dense, text = trace(model), _logits(model), _blocks(count=60)
    names = [
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    halves = {name: model.get_parameter(name).detach() / 2 for name in names}
    plain = compensate(model, graph, kept, text, target)
    found = compensate(model, graph, kept, text, target, start=halves)
    assert torch.equal(_logits(model), dense)
    damaged = copy.deepcopy(model)
    apply_updates(damaged, halves)
    assert found.loss_before == pytest.approx(compensate(damaged, graph, kept, text, target).loss_before, rel=1e-5)
    assert found.loss_before != pytest.approx(plain.loss_before, rel=1e-3)
    first = "model.layers.0.self_attn.o_proj.weight"
    assert found.refits[first].before != pytest.approx(plain.refits[first].before, rel=1e-3)


def test_sums_are_on_the_cpu_where_a_device_has_no_float64() -> None:
    """No such device is needed: the sums are made before anything is on it."""
    gram = Gram.empty(3, 5, torch.device("mps"))
    assert gram.inputs.device.type == gram.cross.device.type == "cpu"
    assert sums_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert in_float64(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


def test_sums_and_solutions_use_no_float64_on_the_devices_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the model passes ``in_float64``; in its absence they would become float64 where they are."""
    seen: list[torch.dtype] = []

    def double(self: torch.Tensor) -> torch.Tensor:
        assert self.dtype == torch.float64, "made float64 where it was"
        return self

    def noted(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return x.to(torch.float64)

    monkeypatch.setattr(torch.Tensor, "double", double)
    for module in (gram_module, obs_module):
        monkeypatch.setattr(module, "in_float64", noted)
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=draw), torch.randn(4, 6, generator=draw)
    gram = Gram.empty(4, 6, torch.device("cpu"))
    gram.add(x, x @ weight.T)
    solve_refit(gram.towards(weight), gram, weight, torch.tensor([0, 2, 3]))
    obs_module.removal_order(gram, weight, torch.arange(6).unsqueeze(1), 2)
    assert torch.float32 in seen
