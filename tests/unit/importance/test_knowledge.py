"""Knowledge distribution analysis: the fast way finds what the naive loop finds, and leaves no trace on the model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from secateur.analysis import Analysis, Trial
from secateur.data import TokenBlocks
from secateur.errors import InputError, ModelError, PlanError
from secateur.graph import trace
from secateur.importance import CRITERIA, knowledge
from secateur.surgery import slice_model
from secateur.testing.tiny import TINY
from secateur.types import Scores
from secateur.walk import Calibration
from secateur.walk.stack import LayerStack

FAMILIES = ["llama-odd", "gpt2", "bloom", "gemma2", "phi3", "olmo2", "qwen3-moe", "opt"]


def _blocks(count: int = 5, window: int = 12, seed: int = 0, batch_size: int = 4) -> Calibration:
    ids = torch.randint(3, 97, (count, window), generator=torch.Generator().manual_seed(seed))
    return Calibration(TokenBlocks(ids, ("noise",) * count), batch_size)


def _cuts(model: Any, graph: Any, ratios: tuple[float, ...] = (0.25, 0.5)) -> list[knowledge.TrialCut]:
    return knowledge.cuts(graph, CRITERIA["magnitude"]().score(model, graph, None, 0), ratios)


def _naive(model: Any, graph: Any, blocks: Calibration, cut: knowledge.TrialCut) -> tuple[float, float]:
    """Slice a copy for good, run it whole, and compare by the definitions."""
    small = copy.deepcopy(model)
    slice_model(small, graph, cut.plan)
    with torch.no_grad():
        dense, pruned = (net(blocks.ids).logits[:, :-1].double().log_softmax(-1) for net in (model, small))
    loss = F.nll_loss(pruned.flatten(0, 1), blocks.ids[:, 1:].flatten())
    kl = (dense.exp() * (dense - pruned)).sum(-1).mean()
    return float(loss), float(kl)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_finds_what_slicing_each_group_and_running_the_whole_model_finds(name: str) -> None:
    model = TINY[name]()
    graph, blocks = trace(model), _blocks()
    chosen = _cuts(model, graph)
    _, trials = knowledge.measure_cuts(model, graph, blocks, chosen)
    assert [(trial.group, trial.ratio) for trial in trials] == [(cut.group.name, cut.ratio) for cut in chosen]
    for cut, trial in zip(chosen, trials, strict=True):
        assert (trial.loss, trial.kl) == pytest.approx(_naive(model, graph, blocks, cut), abs=2e-5)
        assert trial.kl > 1e-6


@pytest.mark.parametrize("name", ["llama-odd", "olmo2"])
def test_query_heads_are_analysed_in_step_from_each_kv_head(name: str) -> None:
    model = TINY[name]()
    graph, blocks = trace(model).opened(["query"]), _blocks()
    chosen = [cut for cut in _cuts(model, graph, (0.1, 0.4, 0.9)) if cut.group.kind == "query"]
    assert len(chosen) == 3 * model.config.num_hidden_layers
    _, trials = knowledge.measure_cuts(model, graph, blocks, chosen)
    for cut, trial in zip(chosen, trials, strict=True):
        assert 0 < trial.removed < trial.units
        assert trial.removed % cut.group.runs == 0
        assert (trial.loss, trial.kl) == pytest.approx(_naive(model, graph, blocks, cut), abs=2e-5)


@pytest.mark.parametrize("name", FAMILIES[:4])
def test_cached_and_whole_passes_agree_and_the_model_is_restored_bit_by_bit(name: str) -> None:
    model = TINY[name]()
    model.train()
    model.lm_head.weight.requires_grad_(False) if hasattr(model, "lm_head") else None
    graph, blocks = trace(model), _blocks()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {key: value.requires_grad for key, value in model.named_parameters()}
    chosen = _cuts(model, graph)
    fast = knowledge.measure_cuts(model, graph, blocks, chosen)
    slow = knowledge.measure_cuts(model, graph, blocks, chosen, cached=False)
    assert fast[0] == pytest.approx(slow[0], abs=1e-6)
    for one, other in zip(fast[1], slow[1], strict=True):
        assert (one.loss, one.kl) == pytest.approx((other.loss, other.kl), abs=2e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {key: value.requires_grad for key, value in model.named_parameters()} == flags
    assert model.training
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_only_what_comes_after_a_cut_is_run() -> None:
    model = TINY["llama-odd"]()  # 3 layers, 2 groups each
    graph, blocks = trace(model), _blocks(4)
    chosen = _cuts(model, graph, (0.5,))
    runs = [0] * 3
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
        for index, layer in enumerate(model.model.layers)
    ]
    stack_probe = 3  # the pass that finds the order, and one from layer 1 and from layer 2
    knowledge.measure_cuts(model, graph, blocks, chosen)
    for handle in handles:
        handle.remove()
    split = 2  # passes over a few tokens that try whether logits can be had in pieces
    # the reference pass; states that move on; 2 trials a layer under masks; both trials of each layer before as a batch
    expected = [1 + 1 + 1 + 2, 2 + 1 + 1 + 2 + 2, stack_probe + 1 + 0 + 2 + 2 * 2]
    assert runs == [passes + split for passes in expected]


def test_an_exception_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)
    before = copy.deepcopy(model.state_dict())

    def fails(*_: Any) -> Any:
        raise KeyboardInterrupt

    chosen = _cuts(model, graph)
    monkeypatch.setattr(knowledge._Reference, "compare", fails)
    with pytest.raises(KeyboardInterrupt):
        knowledge.measure_cuts(model, graph, _blocks(), chosen)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_it_goes_on_where_it_was_interrupted() -> None:
    model = TINY["llama-odd"]()
    graph, blocks = trace(model), _blocks()
    chosen = _cuts(model, graph)
    kept: list[list[Trial]] = []
    _, whole = knowledge.measure_cuts(model, graph, blocks, chosen, keep=kept.append)
    assert [len(trials) for trials in kept] == [4, 8, 12]
    marked = [trial.model_copy(update={"kl": 7.0}) for trial in kept[0]]
    again: list[list[Trial]] = []
    _, rest = knowledge.measure_cuts(model, graph, blocks, chosen, done=marked, keep=again.append)
    assert [trial.kl for trial in rest[:4]] == [7.0] * 4
    assert len(again) == 2
    for one, other in zip(rest[4:], whole[4:], strict=True):
        assert one.kl == pytest.approx(other.kl, abs=1e-6)


def test_a_model_without_a_finite_loss_is_refused_before_the_first_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph, blocks = trace(model), _blocks()
    chosen = _cuts(model, graph)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    monkeypatch.setattr(knowledge._Run, "try_out", lambda *_: pytest.fail("a trial was made"))
    with pytest.raises(ModelError, match="own loss on the calibration text is nan"):
        knowledge.measure_cuts(model, graph, blocks, chosen)


def test_a_trial_that_is_not_finite_names_its_group_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()
    graph, blocks = trace(model), _blocks()
    chosen = _cuts(model, graph)
    compare = knowledge._Reference.compare
    kept: list[Trial] = []
    last = len({cut.made for cut in chosen}) * len(blocks.ids) // 2  # windows of trials in the first of two layers

    def breaks(self: Any, rows: Any, here: slice, logits: torch.Tensor) -> torch.Tensor:
        nonlocal last
        last -= len(rows)
        return compare(self, rows, here, logits * (math.nan if last < 0 else 1.0))

    monkeypatch.setattr(knowledge._Reference, "compare", breaks)
    with pytest.raises(ModelError, match=r"units of layers\.1\.\w+ the model's loss is nan"):
        knowledge.measure_cuts(model, graph, blocks, chosen, keep=kept.extend)
    assert {trial.layer for trial in kept} == {0}


def test_layers_that_exchange_more_than_hidden_states_take_the_whole_way(capsys: pytest.CaptureFixture[str]) -> None:
    from secateur import progress

    model = TINY["llama-odd"]()
    graph, blocks = trace(model), _blocks()
    first, last = model.model.layers[0], model.model.layers[2]
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    last.register_forward_hook(lambda module, args, out: out + 0.1 * seen[-1])
    with pytest.raises(ModelError, match="exchange more than hidden states"):
        LayerStack.find(model, graph)
    chosen = _cuts(model, graph, (0.5,))
    progress.show()
    try:
        _, trials = knowledge.measure_cuts(model, graph, blocks, chosen)
    finally:
        progress.show(False)
    assert "runs the whole model" in capsys.readouterr().err
    _, slow = knowledge.measure_cuts(model, graph, blocks, chosen, cached=False)
    assert [trial.kl for trial in trials] == [trial.kl for trial in slow]


def test_a_model_that_cannot_run_is_no_fault_of_its_layers() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model)

    def fails(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("strides should be multiple of 16 bytes.")

    model.model.layers[1].mlp.forward = fails
    with pytest.raises(ModelError, match=r"own forward pass fails .*strides .*model\.dtype=float32"):
        LayerStack.find(model, graph)


@pytest.mark.parametrize("ratios", [(), (0.0,), (1.0, 0.5)])
def test_ratios_are_checked(ratios: tuple[float, ...]) -> None:
    model = TINY["llama-gqa"]()
    with pytest.raises(InputError, match="strictly between 0 and 1"):
        _cuts(model, trace(model), ratios)


def test_every_cut_takes_one_unit_and_leaves_one() -> None:
    model = TINY["llama-gqa"]()  # 2 KV heads a layer
    assert all(0 < len(cut.kept) < cut.group.size for cut in _cuts(model, trace(model), (0.01, 0.99)))


def test_ratios_that_come_to_the_same_number_of_units_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TINY["llama-gqa"]()  # 2 KV heads a layer: one goes at 25 % as at 50 %
    graph, blocks = trace(model), _blocks()
    tried: list[tuple[str, int]] = []
    try_out = knowledge._Run.try_out

    def counted(self: Any, chosen: Any, layer: int) -> Any:
        tried.extend(cut.made for cut in chosen)
        return try_out(self, chosen, layer)

    monkeypatch.setattr(knowledge._Run, "try_out", counted)
    chosen = _cuts(model, graph, (0.5, 0.25, 0.25))
    assert [cut.ratio for cut in chosen] == [0.25, 0.5] * 4
    _, trials = knowledge.measure_cuts(model, graph, blocks, chosen)
    assert len(tried) == len(set(tried)) == 2 * (1 + 2)  # each layer: one number of heads, two of channels
    assert [(trial.group, trial.ratio) for trial in trials] == [(cut.group.name, cut.ratio) for cut in chosen]
    heads = [trial for trial in trials if trial.group == "layers.0.attention"]
    assert [trial.removed for trial in heads] == [1, 1]
    assert heads[0].kl == heads[1].kl


def _analysis(**changes: Any) -> Analysis:
    def trial(name: str, ratio: float, loss: float, kl: float) -> Trial:
        layer = int(name.split(".")[1])
        return Trial(
            group=name, kind="ffn", layer=layer, ratio=ratio, units=8, removed=round(8 * ratio), loss=loss, kl=kl
        )

    trials = [
        trial("layers.0.mlp", 0.25, 2.0, 0.3),
        trial("layers.0.mlp", 0.5, 2.5, 0.4),
        trial("layers.1.mlp", 0.25, 1.0, 0.9),  # more KL, no more loss
        trial("layers.2.mlp", 0.25, 0.5, 0.01),  # better than dense is a deviation as well
    ]
    return Analysis(
        fingerprint="x", criterion="taylor", text=["a"], tokens=8, window=4, dense_loss=1.0, trials=trials
    ).model_copy(update=changes)


def test_deviations_are_summed_and_ranked() -> None:
    analysis = _analysis()
    assert list(analysis.deviations("kl")) == ["layers.1.mlp", "layers.0.mlp", "layers.2.mlp"]
    by_perplexity = analysis.deviations("perplexity")
    assert list(by_perplexity) == ["layers.0.mlp", "layers.2.mlp", "layers.1.mlp"]
    assert by_perplexity["layers.0.mlp"] == pytest.approx(math.exp(2) + math.exp(2.5) - 2 * math.e)
    assert analysis.sensitive(0.34, "kl") == ["layers.1.mlp"]
    assert analysis.sensitive(0.1, "kl") == ["layers.1.mlp"]  # a tenth of three is one


def test_rounding_does_not_make_a_small_group_sensitive() -> None:
    def trial(name: str, units: int, ratio: float, removed: int, kl: float) -> Trial:
        facts: dict[str, Any] = {"group": name, "kind": "ffn", "layer": 0, "loss": 1.0}
        return Trial(**facts, units=units, ratio=ratio, removed=removed, kl=kl)

    analysis = _analysis(
        trials=[
            trial("small", 2, 0.25, 1, 0.6),  # half of it goes where a quarter was asked
            trial("small", 2, 0.5, 1, 0.6),
            trial("large", 64, 0.25, 16, 0.4),
            trial("large", 64, 0.5, 32, 0.7),
        ]
    )
    assert analysis.deviations("kl") == pytest.approx({"large": 0.4 + 0.7, "small": 0.6 / 2 + 0.6})
    assert list(analysis.deviations("kl")) == ["large", "small"]


def test_experts_are_analysed_when_they_may_be_cut_and_keep_what_a_router_needs() -> None:
    model = TINY["qwen3-moe"]()
    graph, blocks = trace(model).opened(["expert"]), _blocks()
    [experts] = [group for group in graph.prunable if group.kind == "expert"]
    scores = Scores({group.name: torch.arange(float(group.size)) for group in graph.prunable})
    chosen = [cut for cut in knowledge.cuts(graph, scores, (0.3, 0.99)) if cut.group is experts]
    assert [len(cut.kept) for cut in chosen] == [experts.size - 2, experts.least]
    _, trials = knowledge.measure_cuts(model, graph, blocks, chosen)
    for cut, trial in zip(chosen, trials, strict=True):
        assert (trial.loss, trial.kl) == pytest.approx(_naive(model, graph, blocks, cut), abs=2e-5)


def test_an_analysis_survives_its_file(tmp_path: Path) -> None:
    analysis = _analysis()
    analysis.save(tmp_path / "analysis.json")
    assert Analysis.load(tmp_path / "analysis.json") == analysis
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(PlanError, match="is not an analysis"):
        Analysis.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"missing\.json cannot be read"):
        Analysis.load(tmp_path / "missing.json")
