"""LLM-Pruner, FLAP and ShortGPT: the contract, and agreement with their formulas computed slowly and plainly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from secateur import importance
from secateur.errors import InputError, ModelError
from secateur.graph import trace
from secateur.importance import BlockInfluence, Fluctuation
from secateur.importance.flap import compensation
from secateur.methods import METHODS
from secateur.methods.flap import FLAP
from secateur.methods.llm_pruner import LLMPruner, LLMPrunerSettings
from secateur.methods.wanda import Wanda, WandaSettings
from secateur.surgery import apply_updates, check_updates, masked, slice_model
from secateur.testing.method_contract import MethodContract, noise
from secateur.testing.tiny import build
from secateur.types import Cut, DependencyGraph
from secateur.walk import Calibration


class TestLLMPruner(MethodContract):
    method = LLMPruner


class TestLLMPrunerInRounds(MethodContract):
    method = LLMPruner
    settings = LLMPrunerSettings(form="mixed", members="max", rounds=3)


class TestFLAP(MethodContract):
    method = FLAP


class TestWandaLayerByLayer(MethodContract):
    method = Wanda
    settings = WandaSettings(inputs="pruned")
    # its one allocation, on the dense model, says how many go and not which
    test_every_choice_on_the_way_only_shrinks = None  # type: ignore[assignment]

    @pytest.mark.parametrize("ranking", ["global", "layer"])
    def test_a_layer_sees_the_pruned_ones_before_it(self, ranking: str) -> None:
        task = self.task(0.3, ranking=ranking)
        dense, pruned = Wanda().run(task), self.decide(task)
        assert dense.scores is not None
        assert pruned.scores is not None
        assert {n: len(u) for n, u in dense.removed.items()} == {n: len(u) for n, u in pruned.removed.items()}
        first, last = "layers.0.mlp", "layers.1.mlp"
        torch.testing.assert_close(pruned.scores[first], dense.scores[first], rtol=1e-4, atol=1e-6)
        # by hand: cut what is before the last layer's MLP, and score what is left
        before = {name: units for name, units in pruned.removed.items() if name.startswith("layers.0.")}
        with masked(task.model, task.graph, Cut.removing(task.graph, before)):
            expected = importance.WandaSP().score(task.model, task.graph, task.calibration, seed=0)[last]
        assert not torch.allclose(expected, dense.scores[last], rtol=1e-3)
        torch.testing.assert_close(pruned.scores[last], expected, rtol=1e-4, atol=1e-6)


def plain_gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    loss = model(input_ids=ids, labels=ids).loss
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("form", ["vector", "first", "second", "mixed"])
@pytest.mark.parametrize("members", ["sum", "product", "max", "last"])
def test_llm_pruner_agrees_with_plain_loops(form: Any, members: Any) -> None:
    model, blocks = build("llama-gqa"), noise(4, 1)
    graph = trace(model)
    scores = importance.Salience(form=form, members=members).score(model, graph, Calibration(blocks, 3), seed=0)
    mean = plain_gradients(model, blocks.ids)
    single = [plain_gradients(model, block[None]) for block in blocks.ids]
    parameters = dict(model.named_parameters())
    for group in graph.prunable:
        for unit in range(group.size):
            parts, consuming = [], []
            for member in group.members:
                w, g = parameters[member.parameter].detach(), mean[member.parameter]
                q = torch.stack([gradients[member.parameter] ** 2 for gradients in single]).mean(0)
                part = 0.0
                for row in member.rows([unit]).flatten().tolist():
                    a, b, c = (tensor.select(member.axis, row) for tensor in (w, g, q))
                    if form == "vector":
                        part += abs(float((a * b).sum()))
                    elif form == "first":
                        part += float((a * b).abs().sum())
                    elif form == "second":
                        part += float((a * a * c).sum())
                    else:
                        part += float((a * b - 0.5 * a * a * c).abs().sum())
                parts.append(part)
                if member.role == "in":
                    consuming.append(part)
            expected = {"sum": sum(parts), "max": max(parts), "last": sum(consuming)}
            product = torch.tensor(parts, dtype=torch.float64).prod()
            value = float(scores[group.name][unit])
            assert value == pytest.approx(float(expected.get(members, product)), rel=2e-3, abs=1e-12)


def inputs_of(model: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("members", ["sum", "product", "max"])
def test_llm_pruner_scores_no_biases(members: Any) -> None:
    """A key's bias has no gradient, and one of zero no salience: with them every product would be one of zero."""
    found = []
    for fill in (0.0, 0.1):
        model = build("qwen2")
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.fill_(fill)
        graph = trace(model)
        found.append(importance.Salience(members=members).score(model, graph, Calibration(noise(4, 1)), 0))
        if fill == 0.0:
            for group in graph.prunable:
                assert len(found[0][group.name].unique()) == group.size
                assert (found[0][group.name] > 0).all()
        else:
            only = [
                replace(group, members=tuple(m for m in group.members if "bias" not in m.parameter)) for group in graph
            ]
            without = replace(graph, groups=tuple(only))
            expected = importance.Salience(members=members).score(model, without, Calibration(noise(4, 1)), 0)
            for group in graph.prunable:
                torch.testing.assert_close(found[1][group.name], expected[group.name])


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_flap_agrees_with_its_formula(family: str) -> None:
    model, blocks = build(family), noise(6, 1)
    graph = trace(model)
    scores = Fluctuation().score(model, graph, Calibration(blocks), seed=0)
    for group in graph.prunable:
        [member] = [member for member in group.members if member.role == "in"]
        path = member.parameter.rpartition(".")[0]
        x, w = inputs_of(model, path, blocks.ids), model.get_parameter(member.parameter).detach()
        w = w if member.axis == 1 else w.T
        channels = torch.stack([x[:, j].var() * (w[:, j] ** 2).sum() for j in range(w.shape[1])])
        channels = (channels - channels.mean()) / channels.std()
        expected = channels[member.rows(range(group.size))].mean(1)
        torch.testing.assert_close(scores[group.name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "gpt2"])
def test_the_bias_makes_up_for_the_mean_of_what_goes(family: str) -> None:
    """At constant input the pruned and compensated linear gives what the dense one gave."""
    model, blocks = build(family), noise(6, 1)
    graph = trace(model)
    moments = Fluctuation().measure(model, graph, Calibration(blocks))
    group = next(group for group in graph.prunable if group.kind == "ffn")
    removed = {group.name: list(range(0, group.size, 2))}
    [member] = [member for member in group.members if member.role == "in"]
    path = member.parameter.rpartition(".")[0]
    mean = inputs_of(model, path, blocks.ids).mean(0)
    torch.testing.assert_close(moments[member.parameter].mean[0], mean, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        dense = model.get_submodule(path)(mean)
        apply_updates(model, compensation(model, graph, moments, removed))
        slice_model(model, graph, Cut.removing(graph, removed))
        small = model.get_submodule(path)(mean[1::2])
    torch.testing.assert_close(small, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.layers.0.mlp.down_proj.bias", torch.zeros(3), r"\(3,\) .*has shape \(48,\)"),
        ("model.layers.0.mlp.down_proj.weight", torch.zeros(3), r"\(3,\) .*has shape \(48, "),
        ("model.layers.0.mlp.bias", torch.zeros(3), "neither a parameter nor"),
        ("model.norm.bias", torch.zeros(48), "neither a parameter nor"),
        ("model.layers.0.mlp.down_proj.bias", torch.full((48,), torch.nan), "not finite"),
    ],
)
def test_updates_that_do_not_fit_are_refused_before_anything_changes(path: str, value: Any, message: str) -> None:
    model = build("llama-gqa")
    good = {"model.layers.0.mlp.up_proj.weight": torch.zeros_like(model.model.layers[0].mlp.up_proj.weight)}
    with pytest.raises(ModelError, match=message):
        apply_updates(model, {**good, path: value})
    assert all(torch.equal(new, build("llama-gqa").state_dict()[name]) for name, new in model.state_dict().items())


def test_a_new_bias_is_refused_where_its_outputs_are_cut() -> None:
    model = build("llama-gqa")
    graph = trace(model)
    kept = {"layers.0.mlp": list(range(8))}
    with pytest.raises(ModelError, match="loses outputs"):
        check_updates(model, graph, kept, {"model.layers.0.mlp.up_proj.bias": torch.zeros(graph["layers.0.mlp"].size)})


def test_a_new_bias_is_given_to_the_same_linear_of_every_layer() -> None:
    model = build("llama-gqa")
    apply_updates(model, {"model.layers.0.mlp.down_proj.bias": torch.ones(48)})
    assert (model.model.layers[1].mlp.down_proj.bias == 0).all()
    assert model.model.layers[1].mlp.up_proj.bias is None


def test_flap_refuses_runtimes_that_read_no_bias() -> None:
    task = TestFLAP().task(0.2, runs_on="vllm")
    with pytest.raises(InputError, match="compensate"):
        FLAP().run(task)


def layers_of(graph: DependencyGraph) -> DependencyGraph:
    return graph.opened(["layer"])


def test_block_influence_agrees_with_its_formula() -> None:
    model, blocks = build("llama-odd"), noise(6, 1)
    graph = layers_of(trace(model))
    for group in graph.prunable:
        if group.kind != "layer":
            graph = DependencyGraph(graph.model_type, (graph["layers"],), graph.shapes)
    scores = BlockInfluence().score(model, graph, Calibration(blocks), seed=0)["layers"]
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in model.model.layers]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
    with torch.no_grad():
        model(input_ids=blocks.ids)
    for hook in hooks:
        hook.remove()
    for layer in range(3):
        x, y = states[layer].flatten(0, 1), states[layer + 1].flatten(0, 1)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)]
        assert float(scores[layer]) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-4)


def test_shortgpt_removes_the_layer_of_least_influence() -> None:
    class Case(MethodContract):
        method = METHODS["shortgpt"]
        family = "llama-odd"

    task = Case().task(0.25, kinds=("layer",))
    decision = METHODS["shortgpt"]().run(task)
    assert decision.scores is not None
    assert decision.removed == {"layers": [int(decision.scores["layers"].argmin())]}
    with pytest.raises(InputError, match=r"budget\.kinds"):
        METHODS["shortgpt"]().run(Case().task(0.25))
    with pytest.raises(ModelError, match="whole layers"):
        BlockInfluence().score(task.model, task.graph, task.calibration, seed=0)


def test_a_mask_is_off_again_between_rounds() -> None:
    task = TestLLMPrunerInRounds().task(0.3)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    LLMPruner(LLMPrunerSettings(rounds=2)).run(task)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
