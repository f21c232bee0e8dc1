"""The LoRA-guided estimate: the true gradient where theory says so, the stated mixture elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.graph import trace
from secateur.importance import LoRA, Taylor, lora
from secateur.importance.lora import AdapterGradients, gradient_factors
from secateur.planning import Budget, allocate
from secateur.testing.tiny import TINY
from secateur.training import LoraSettings, attach_lora
from secateur.training.quantised import quantised_base
from secateur.units import adapter_of, dequantised, lora_layer
from secateur.walk import Calibration, borrowed, recomputed

Fill = Callable[[torch.Tensor, torch.Tensor], None]


def blocks(batch_size: int = 4) -> Calibration:
    ids = torch.randint(3, 48, (6, 12), generator=torch.Generator().manual_seed(0))
    return Calibration(TokenBlocks(ids, ("noise",) * 6), batch_size)


def adapted(family: str, fill: Fill, rank: str | int = "in", alpha: float = 30.0) -> nn.Module:
    """LoRA on every linear; of rank ``in`` or ``out``, the number of inputs or outputs of each module."""
    model = TINY[family]()
    linears = {n: m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2}
    ranks = {}
    for name, module in linears.items():
        sides = module.weight.shape if type(module).__name__ == "Conv1D" else module.weight.shape[::-1]
        ranks[name] = int(sides[0] if rank == "in" else sides[1]) if isinstance(rank, str) else rank
    config = LoraConfig(r=8, lora_alpha=alpha, rank_pattern=ranks, target_modules="all-linear", fan_in_fan_out=False)
    model = get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                fill(module.lora_A["default"].weight, module.lora_B["default"].weight)
    return model


def rows_are_a_basis(a: torch.Tensor, b: torch.Tensor) -> None:
    nn.init.orthogonal_(a)
    b.zero_()


def columns_are_a_basis(a: torch.Tensor, b: torch.Tensor) -> None:
    a.zero_()
    nn.init.orthogonal_(b)


def anything(a: torch.Tensor, b: torch.Tensor) -> None:
    a.normal_(std=0.1)
    b.normal_(std=0.1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """True gradients of every frozen weight, by one plain backward pass."""
    frozen = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    ids = blocks().ids
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(frozen.values()))
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return dict(zip(frozen, found, strict=True))


@pytest.mark.parametrize("alpha", [1.0, 30.0])
@pytest.mark.parametrize(("fill", "rank"), [(rows_are_a_basis, "in"), (columns_are_a_basis, "out")])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_it_is_the_true_gradient_where_a_or_b_is_a_basis(family: str, fill: Fill, rank: str, alpha: float) -> None:
    model = adapted(family, fill, rank, alpha)
    truth = gradients(model)
    blocks().backward(model)
    for name, gradient in truth.items():
        layer: Any = lora_layer(model, name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, right = gradient_factors(a, b, a.grad, b.grad, layer.scaling["default"])
        estimate = (left @ right).T if layer.fan_in_fan_out else left @ right
        torch.testing.assert_close(estimate, gradient, rtol=1e-3, atol=1e-6)


def test_it_is_the_stated_projection_of_the_gradient_otherwise() -> None:
    model = adapted("llama-gqa", anything, rank=4)
    truth = gradients(model)
    blocks().backward(model)
    for name, g in truth.items():
        layer: Any = lora_layer(model, name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        left, right = gradient_factors(a, b, a.grad, b.grad, layer.scaling["default"])
        torch.testing.assert_close(left @ right, g @ a.T @ a + b @ b.T @ g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("fill", [rows_are_a_basis, columns_are_a_basis])
def test_its_scores_are_then_those_of_full_gradient_taylor(fill: Fill) -> None:
    model = adapted("llama-gqa", fill, "in" if fill is rows_are_a_basis else "out")
    graph = trace(model)
    guided = LoRA(sides="both").score(model, graph, blocks(), seed=0)
    full = Taylor().score(model, graph, blocks(), seed=0)
    for name in full:
        torch.testing.assert_close(guided[name], full[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["absolute", "squared"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "phi3", "gpt2"])
def test_scores_agree_with_plain_loops(family: str, normalise: bool, form: Any) -> None:
    model = adapted(family, anything, rank=4)
    graph = trace(model)
    scores = LoRA(form=form, normalise=normalise, sides="both").score(model, graph, blocks(), seed=0)
    truth = gradients(model)
    for group in graph.prunable:
        total = torch.zeros(group.size)
        for member in group.members:
            layer: Any = lora_layer(model, member.parameter)
            if layer is None:
                continue
            a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
            w, g = layer.base_layer.weight.detach(), truth[member.parameter]
            if layer.fan_in_fan_out:
                w, g = w.T, g.T
            contribution = (g @ a.T @ a + b @ b.T @ g) * (w + layer.scaling["default"] * b @ a)
            contribution = contribution.abs() if form == "absolute" else contribution**2
            contribution = contribution.T if layer.fan_in_fan_out else contribution
            of_unit = []
            for unit in range(group.size):
                rows = member.rows([unit]).flatten()
                of_unit.append(sum(float(contribution.select(member.axis, int(row)).sum()) for row in rows))
            part = torch.tensor(of_unit)
            total += part / part.norm() if normalise else part
        torch.testing.assert_close(scores[group.name], total, rtol=1e-3, atol=1e-7)


def test_no_gradient_of_a_frozen_weight_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama-gqa", anything, rank=4)
    graph = trace(model)
    asked, with_gradient = [], []

    def look(self: Calibration, model: Any) -> float:
        asked.extend(name for name, p in model.named_parameters() if p.requires_grad)
        loss = backward(self, model)
        with_gradient.extend(name for name, p in model.named_parameters() if p.grad is not None)
        return loss

    backward = Calibration.backward
    monkeypatch.setattr(Calibration, "backward", look)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    LoRA().score(model, graph, blocks(), seed=0)
    assert asked
    assert with_gradient
    assert all("lora_" in name for name in [*asked, *with_gradient])


def test_blocks_of_rows_do_not_change_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama-gqa", anything, rank=4)
    graph = trace(model)
    whole = LoRA().score(model, graph, blocks(), seed=0)
    monkeypatch.setattr(lora, "_BLOCK_ELEMENTS", 7 * 48)
    pieces = LoRA().score(model, graph, blocks(), seed=0)
    for name in whole:
        torch.testing.assert_close(whole[name], pieces[name], rtol=1e-5, atol=1e-8)


def test_a_bigger_adapter_norm_does_not_outweigh_another_module() -> None:
    """Per-module normalisation: scaling one module's adapter up does not change the ranking."""
    model = adapted("llama-gqa", rows_are_a_basis, "in")
    graph = trace(model)
    before = LoRA(normalise=True, sides="both").score(model, graph, blocks(), seed=0)
    layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(100)
    after = LoRA(normalise=True, sides="both").score(model, graph, blocks(), seed=0)
    torch.testing.assert_close(before["layers.0.mlp"], after["layers.0.mlp"], rtol=1e-3, atol=1e-6)


def test_gradients_that_are_there_can_be_read_in_a_training_step() -> None:
    model = adapted("llama-gqa", anything, rank=4)
    graph = trace(model)
    blocks().backward(model)
    now = AdapterGradients(model, graph, LoRA()).scores()
    later = LoRA().score(model, graph, blocks(), seed=0)
    for name in now:
        torch.testing.assert_close(now[name], later[name], rtol=1e-4, atol=1e-7)


def test_models_without_usable_adapters_are_refused() -> None:
    plain = TINY["llama-gqa"]()
    with pytest.raises(ModelError, match="attach"):
        LoRA().score(plain, trace(plain), blocks(), seed=0)
    partial = get_peft_model(TINY["llama-gqa"](), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.*lora\.targets"):
        LoRA().score(partial, trace(partial), blocks(), seed=0)
    merged = adapted("llama-gqa", anything, rank=4)
    graph = trace(merged)
    merged.merge_adapter()
    with pytest.raises(ModelError, match="merged"):
        LoRA().score(merged, graph, blocks(), seed=0)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_recomputed_activations_and_single_windows_give_the_same_scores(family: str) -> None:
    model = adapted(family, anything, rank=4)
    graph = trace(model)
    frugal = LoRA().score(model, graph, blocks(1), seed=0)
    gradients = AdapterGradients(model, graph, LoRA())
    with borrowed(model, [name for name, _ in model.named_parameters() if ".lora_" in name]):
        blocks(6).backward(model)
        plain = gradients.scores()
    for name in plain:
        torch.testing.assert_close(frugal[name], plain[name], rtol=1e-3, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules() if "Layer" in type(module).__name__)


def test_less_is_kept_for_the_backward_pass() -> None:
    """Bytes that autograd saves: with recomputation the hidden states between layers, and not what is inside."""
    model = adapted("llama-gqa", anything, rank=4)

    def saved(on: bool) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with recomputed(model, on), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=blocks().ids).logits.sum()
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_quantised_weights_are_read_as_they_compute(weights: Any) -> None:
    """Before and after the first forward pass, which hands the scales of 8 bits over to the module."""
    pytest.importorskip("bitsandbytes")
    model = attach_lora(TINY["llama-bias"](), LoraSettings(rank=4), seed=0)
    layer: Any = model.base_model.model.model.layers[0].mlp.down_proj
    whole = layer.base_layer
    before = whole.weight.detach().clone()
    with quantised_base(model, weights):
        small = layer.base_layer
        assert small is not whole
        assert not small.weight.is_floating_point()
        for _ in range(2):
            values = dequantised(small)
            error = float((values - before).abs().max() / before.abs().max())
            assert 0 < error < (0.01 if weights == "int8" else 0.2)
            unit = torch.eye(values.shape[1])
            columns = small(unit) - small(torch.zeros(1, values.shape[1]))
            torch.testing.assert_close(values, columns.T, rtol=1e-3, atol=1e-4)
    assert layer.base_layer is whole
    assert torch.equal(whole.weight, before)


def test_the_output_side_alone_tells_which_layers_matter() -> None:
    """A layer that hardly adds anything to the residual stream loses its units first, unless modules are normalised."""
    model = TINY["llama-gqa"]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.layers.1.") and name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= 0.05
    model = attach_lora(model, LoraSettings(rank=4), seed=0)
    graph = trace(model)
    budget = Budget(ratio=0.1, kinds=("ffn",), floor=0.0)
    gone = {}
    for normalise in (False, True):
        scores = LoRA(normalise=normalise).score(model, graph, blocks(), seed=0)
        removed = allocate(graph, scores, budget)
        gone[normalise] = [len(removed.get(f"layers.{layer}.mlp", [])) for layer in range(2)]
    assert gone[False][0] == 0 < gone[False][1]
    assert gone[True][0] > 0


def test_adapters_that_are_not_plain_lora_are_refused() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=True)
    model = get_peft_model(TINY["llama-gqa"](), config)
    layer = lora_layer(model, "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    assert layer is not None
    with pytest.raises(ModelError, match="DoRA"):
        adapter_of(layer)
