"""Reconstruction: errors on the check windows only fall, removed units stay removed, and only one layer ever trains."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compensation import Reconstructed, Reconstruction, Target, guard, reconstruct
from secateur.compensation.guard import EVERY
from secateur.compensation.reconstruct import _Walk
from secateur.data import TokenBlocks
from secateur.errors import ModelError
from secateur.graph import trace
from secateur.surgery import apply_updates, masked, slice_model, updated
from secateur.testing.tiny import TINY
from secateur.walk import Calibration, LayerStack

FAST = Reconstruction(learning_rate=3e-3, epochs=2)
WINDOWS, WINDOW = 40, 12


def _text(model: Any, seed: int = 0, count: int = WINDOWS) -> Calibration:
    """Text that the dense model writes itself: what is further from the model has a larger loss on it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ids = torch.randint(3, 97, (count, 1))
        for _ in range(WINDOW - 1):
            with torch.no_grad():
                shares = (3 * model(ids).logits[:, -1]).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(shares, 1)], 1)
    return Calibration(TokenBlocks(ids, ("own",) * count))


def _cut(graph: Any) -> dict[str, list[int]]:
    kinds = ("ffn", "attention")
    groups = [group for group in graph.prunable if group.kind in kinds]
    return {group.name: list(range(group.size - max(1, group.size // 4))) for group in groups}


def _logits(model: Any, text: Calibration) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(text.ids).logits
    return logits


@pytest.mark.parametrize(
    "name", ["llama-gqa", "qwen2", "gemma2", "gemma3", "olmo2", "mixtral", "phi", "opt", "deepseek-v3"]
)
def test_errors_fall_and_what_is_sliced_computes_what_was_trained(name: str) -> None:
    model = TINY[name]()
    graph, text, other = trace(model), _text(model), _text(model, seed=1)
    kept, dense, before = _cut(graph), _logits(model, other), copy.deepcopy(model.state_dict())
    found = reconstruct(model, graph, kept, text, FAST)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # nothing is written yet
    assert not any(
        "forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks for module in model.modules()
    )
    assert all(block.after < block.before if block.kept else block.after == block.before for block in _blocks(found))
    assert sum(block.kept for block in _blocks(found)) >= 2
    assert found.step == 1.0
    assert found.loss_after < found.loss_before
    with masked(model, graph, kept):
        plain = _logits(model, other)
    with updated(model, found.updates), masked(model, graph, kept):
        trained = _logits(model, other)
    assert float((trained - dense).square().mean()) < float((plain - dense).square().mean())
    for key in found.updates:
        for group, member in [(group, member) for group, member in graph.of_parameter(key) if group.name in kept]:
            gone = member.rows([unit for unit in range(group.size) if unit not in kept[group.name]])
            now, was = (values.movedim(member.axis, 0)[gone.flatten()] for values in (found.updates[key], before[key]))
            assert torch.equal(now, was), (key, group.name)
    apply_updates(model, found.updates)
    slice_model(model, graph, kept)
    torch.testing.assert_close(_logits(model, other), trained, atol=1e-4, rtol=1e-4)


def _blocks(found: Reconstructed) -> list[Any]:
    return list(found.blocks.values())


@pytest.mark.parametrize("target", ["dense", "stream", "own"])
def test_every_weight_of_every_layer_is_trained_with_every_target(target: Target) -> None:
    model = TINY["gemma2"]()
    graph = trace(model)
    found = reconstruct(
        model, graph, _cut(graph), _text(model), Reconstruction(target=target, learning_rate=3e-3, epochs=2)
    )
    assert all(block.kept for block in _blocks(found))
    assert found.step > 0
    assert found.updates.keys() == {name for name, _ in model.named_parameters() if ".layers." in name}


@pytest.mark.parametrize(("target", "layers"), [("dense", {0}), ("stream", {0, 1}), ("own", {0})])
def test_a_whole_layer_is_trained_only_towards_a_stream_that_drifted(target: Target, layers: set[int]) -> None:
    model = TINY["llama-gqa"]()
    found = reconstruct(
        model, trace(model), {"layers.0.mlp": list(range(30))}, _text(model), Reconstruction(target=target)
    )
    assert {int(name.split(".")[2]) for name in found.blocks} == layers
    if target == "stream":
        found = reconstruct(model, trace(model), {"layers.1.mlp": list(range(30))}, _text(model))
        assert all(name.startswith("model.layers.1.") for name in found.blocks)
        assert found.blocks["model.layers.1.self_attn.o_proj"].before == 0.0  # nothing before it is cut


def test_one_block_trains_at_a_time_and_never_on_a_check_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph, text = trace(model), _text(model)
    checks = {tuple(row) for row in text.ids[EVERY - 1 :: EVERY].tolist()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    trained: set[str] = set()
    run = LayerStack.states

    def states(stack: LayerStack, ids: torch.Tensor, start: int, *rest: Any) -> torch.Tensor:
        moving = {names[parameter] for parameter in model.parameters() if parameter.requires_grad}
        assert all(name.startswith(f"model.layers.{start}.") for name in moving)
        out = run(stack, ids, start, *rest)
        if torch.is_grad_enabled() and len(ids) == FAST.batch_size:
            assert not checks & {tuple(row) for row in ids.tolist()}
            assert not any("mlp" in name for name in moving) or not any("self_attn" in name for name in moving)
            trained.update(moving)
        return out

    monkeypatch.setattr(LayerStack, "states", states)
    reconstruct(model, graph, _cut(graph), text, FAST)
    assert trained == {name for name in names.values() if ".layers." in name}


def test_the_same_seed_gives_the_same_weights() -> None:
    model = TINY["llama-gqa"]()
    graph, text = trace(model), _text(model)
    one, same, other = (reconstruct(model, graph, _cut(graph), text, FAST, seed=seed).updates for seed in (0, 0, 1))
    assert one.keys() == same.keys() == other.keys() != set()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


class _KilledError(BaseException):
    pass


def test_killed_between_layers_it_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-odd"]()
    graph, text = trace(model), _text(model)

    def run(folder: Path | None) -> Reconstructed:
        return reconstruct(model, graph, _cut(graph), text, FAST, checkpoints=folder)

    whole = run(None)
    descend, trained = _Walk._descend, list[int]()

    def dies(walk: Any, *rest: Any) -> None:
        if walk.fed.layer == 1:
            raise _KilledError
        descend(walk, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(_Walk, "_descend", dies)
        with pytest.raises(_KilledError):
            run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-0.safetensors"]

    def counted(walk: Any, *rest: Any) -> None:
        trained.append(walk.fed.layer)
        descend(walk, *rest)

    monkeypatch.setattr(_Walk, "_descend", counted)
    for expected in ([1, 1, 2, 2], []):
        resumed = run(tmp_path)
        assert trained == expected
        assert resumed.facts == whole.facts
        assert all(torch.equal(value, resumed.updates[name]) for name, value in whole.updates.items())
        trained.clear()
    (tmp_path / "layer-1.safetensors").write_bytes(b"damaged")
    assert run(tmp_path).facts == whole.facts
    assert trained == [1, 1]


def test_it_goes_on_from_what_was_compensated_before() -> None:
    model = TINY["llama-gqa"]()
    graph, text = trace(model), _text(model)
    down = "model.layers.1.mlp.down_proj"
    start = {f"{down}.bias": torch.full((48,), 0.5), f"{down}.weight": 0.5 * model.get_parameter(f"{down}.weight")}
    found = reconstruct(model, graph, _cut(graph), text, FAST, start=start)
    without = reconstruct(model, graph, _cut(graph), text, FAST)
    assert model.get_submodule(down).bias is None
    assert found.loss_before != without.loss_before
    assert found.blocks[down].before != without.blocks[down].before
    assert found.loss_after < found.loss_before
    for name, value in start.items():
        assert float((found.updates[name] - value).abs().max()) < 0.1
        assert not torch.equal(found.updates[name], value)


def test_what_does_not_help_is_left_alone() -> None:
    model = TINY["llama-gqa"]()
    graph, text = trace(model), _text(model)
    found = reconstruct(model, graph, _cut(graph), text, Reconstruction(learning_rate=1e30))
    assert not any(block.kept for block in _blocks(found))
    assert (found.updates, found.step, found.loss_after) == ({}, 0.0, found.loss_before)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 30:] = 0
    zero = reconstruct(model, graph, {f"layers.{layer}.mlp": list(range(30)) for layer in range(2)}, text, FAST)
    assert zero.updates == {}


def test_changes_are_halved_or_dropped_when_all_of_them_do_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph, text = trace(model), _text(model)
    whole = reconstruct(model, graph, _cut(graph), text, FAST).updates
    for losses, step in (([3.0, 4.0, 2.0], 0.5), ([3.0, 4.0, float("nan")], 0.0)):
        given = iter(losses)
        monkeypatch.setattr(guard, "_loss", lambda *_, given=given: next(given))
        found = reconstruct(model, graph, _cut(graph), text, FAST)
        assert (found.step, found.loss_before, found.loss_after) == (step, 3.0, 2.0 if step else 3.0)
        for name, value in found.updates.items():
            torch.testing.assert_close(value, (model.get_parameter(name).detach() + whole[name]) / 2)


def test_16_bit_weights_learn_in_32_bits() -> None:
    model: Any = TINY["llama-gqa"]().to(torch.bfloat16)
    graph, text = trace(model), _text(model)
    found = reconstruct(model, graph, _cut(graph), text, Reconstruction(learning_rate=3e-4, epochs=4))
    assert any(block.kept for block in _blocks(found))
    norm = "model.layers.0.input_layernorm.weight"  # about 1: a step of 3e-4 would round to nothing
    assert all(value.dtype == torch.bfloat16 for value in found.updates.values())
    assert not torch.equal(found.updates[norm], model.get_parameter(norm))


def test_what_cannot_be_trained_is_refused() -> None:
    model = TINY["qwen3-moe"]()
    graph = trace(model)
    experts = next(group for group in graph if group.kind == "expert")
    with pytest.raises(ModelError, match=r"of kind expert.*recovery\.reconstruct=false"):
        reconstruct(model, graph, {experts.name: list(range(experts.size - 1))}, _text(model))
    with pytest.raises(ModelError, match=r"needs at least 5 windows.*has 4"):
        reconstruct(model, graph, {}, _text(model, count=4))
    down = model.model.layers[0].mlp.down_proj
    text = _text(model)
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj\.weight is stored as torch\.int8"):
        reconstruct(model, graph, {"layers.0.mlp": list(range(30))}, text)
