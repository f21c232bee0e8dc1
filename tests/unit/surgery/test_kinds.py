"""Kinds that are cut on request: experts, layers, hidden, vocabulary, states. Slice = mask, or a refusal with why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.errors import ModelError, PlanError
from secateur.graph import record, trace
from secateur.surgery import masked, sharing_copy, slice_model
from secateur.surgery.stand_in import randomise
from secateur.surgery.tokens import kept_tokens, new_ids
from secateur.surgery.verify import checked_trace, checks, legal_units
from secateur.testing.contracts import ids, logits, with_adapters
from secateur.testing.tiny import SPECS, TINY
from secateur.types import DependencyGraph, Kind

_MIXED: dict[str, Any] = {
    **SPECS["qwen3"][1],
    "num_hidden_layers": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
_MAMBA2 = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 12, "state_size": 8}
_GROUPED = {**SPECS["deepseek-v3"][1], "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "head_dim": 6}


def built(model_type: str, options: dict[str, Any]) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **options)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomise(model)
        return model.eval()

    return build


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **TINY,
    "grouped experts": built("deepseek_v3", _GROUPED),
    "mamba": built("mamba", {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": built("mamba2", {**_MAMBA2, "n_groups": 1, "chunk_size": 8}),
    "mamba2 groups": built("mamba2", {**_MAMBA2, "n_groups": 2, "chunk_size": 8}),
    "qwen3-next": built("qwen3_next", _MIXED),
}
EXACT: Sequence[tuple[Kind, str]] = (
    *(("expert", name) for name in ("mixtral", "gpt-oss", "olmoe", "grouped experts", "qwen3-next")),
    *(("layer", name) for name in ("llama-odd", "gemma2", "qwen3-moe", "gpt2", "qwen3-next")),
    *(("hidden", name) for name in ("llama-gqa", "llama-tied", "qwen3", "mixtral", "mamba")),
    *(("vocab", name) for name in ("llama-gqa", "llama-tied", "gpt2")),
    *(("query", name) for name in ("llama-gqa", "llama-odd", "phi3", "olmo2", "falcon-new", "gpt-oss", "nemotron")),
    *(("state", name) for name in ("mamba", "mamba2", "mamba2 groups", "qwen3-next")),
)  # type: ignore[assignment]
WITH_ADAPTERS = {
    *("phi3", "olmo2", "falcon-new", "mixtral", "gpt-oss", "grouped experts"),
    *("llama-odd", "qwen3-moe", "llama-tied", "qwen3-next"),
}


def of_kind(graph: DependencyGraph, kind: Kind) -> DependencyGraph:
    """The graph with groups of ``kind`` open, and nothing else."""
    groups = (g if g.kind == kind else replace(g, protected="not now", on_request=False) for g in graph.opened([kind]))
    return replace(graph, groups=tuple(groups))


def half(graph: DependencyGraph) -> dict[str, list[int]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {group.name: legal_units(group, group.size // 2) for group in graph.prunable}


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(("kind", "name"), EXACT)
def test_slice_equals_mask(kind: Kind, name: str, lora: bool) -> None:
    if lora and name not in WITH_ADAPTERS:
        pytest.skip("one family of each sort is enough with adapters")
    model: Any = MODELS[name]()
    model = with_adapters(model) if lora else model
    run = record(model)
    graph = of_kind(run.graph, kind)
    assert graph.prunable
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrong = [check for check in checks(model, 0.5, replace(run, graph=graph)) if not check.ok]
    assert wrong == []


@pytest.mark.parametrize(("kind", "name"), EXACT)
def test_what_is_counted_is_what_is_left_and_nothing_changes_for_nothing(kind: Kind, name: str) -> None:
    model = MODELS[name]()
    graph = of_kind(trace(model), kind)
    kept = half(graph)
    small, whole = sharing_copy(model), sharing_copy(model)
    slice_model(small, graph, kept)
    assert sum(parameter.numel() for parameter in small.parameters()) == graph.parameter_count(kept)
    assert graph.parameter_count(kept) < graph.parameter_count()
    slice_model(whole, graph, {group.name: list(range(group.size)) for group in graph.prunable})
    assert torch.equal(logits(whole), logits(model))


def test_every_kind_at_once() -> None:
    model = MODELS["mixtral"]()
    kinds: tuple[Kind, ...] = ("ffn", "attention", "expert", "layer", "hidden", "vocab")
    graph = trace(model).opened(kinds)
    kept = half(graph)
    tokens = kept_tokens(graph, kept)
    assert tokens is not None
    old = tokens[ids(model) % len(tokens)]
    with torch.no_grad(), masked(model, graph, kept):
        expected = model(input_ids=old, use_cache=False).logits[..., tokens]
    slice_model(model, graph, kept)
    with torch.no_grad():
        found = model(input_ids=new_ids(tokens, old), use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert sum(parameter.numel() for parameter in model.parameters()) == graph.parameter_count(kept)


def test_a_router_keeps_as_many_experts_as_it_chooses() -> None:
    graph = trace(MODELS["mixtral"]())
    assert graph["layers.0.experts"].least == 2
    graph.check_kept({"layers.0.experts": [0, 3]})
    with pytest.raises(PlanError, match="at least 2"):
        graph.check_kept({"layers.0.experts": [3]})


def test_groups_of_experts_keep_equally_many() -> None:
    group = trace(MODELS["grouped experts"]())["layers.1.experts"]
    assert (group.size, group.runs, group.least) == (8, 2, 4)  # the best 2 of each group rank it, 2 come from one group
    graph = of_kind(trace(MODELS["grouped experts"]()), "expert")
    graph.check_kept({group.name: [0, 1, 5, 6]})
    with pytest.raises(PlanError, match="equally many"):
        graph.check_kept({group.name: [0, 1, 2, 5]})


def test_a_token_that_the_config_names_stays() -> None:
    graph = trace(MODELS["llama-gqa"]())
    assert dict(graph["vocab"].fixed)[2] == "it is the eos_token_id of the config"
    with pytest.raises(PlanError, match="removes unit 1 of vocab"):
        graph.check_kept({"vocab": [0, 2, 3, 4]})


def test_special_tokens_are_renumbered_with_the_vocabulary() -> None:
    model = built("llama", {**SPECS["llama-gqa"][1], "eos_token_id": 50})()
    graph = trace(model)
    slice_model(model, graph, {"vocab": [0, 1, 2, 40, 50, 96]})
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.pad_token_id) == (6, 4, 0)


def test_layers_take_their_places_in_lists_caches_and_counts() -> None:
    model = MODELS["qwen3-next"]()
    graph, before = trace(model), model.config
    slice_model(model, graph, {"layers": [1, 2]})
    assert model.config.layer_types == ["full_attention", "linear_attention"]
    assert model.config.num_hidden_layers == 2
    assert before.num_hidden_layers == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers[:1]] == [0]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=ids(model)[:, :5], use_cache=True, **options)
    assert torch.equal(cached, model.generate(input_ids=ids(model)[:, :5], use_cache=False, **options))


def test_layers_that_something_depends_on_stay() -> None:
    graph = trace(MODELS["qwen3-next"]())
    assert graph["layers"].movable == [0, 2]
    with pytest.raises(PlanError, match="needs a layer of attention"):
        graph.check_kept({"layers": [0, 2]})
    assert trace(TINY["llama-one-layer"]())["layers"].protected == "it is the only layer"


def test_layers_that_share_weights_stay() -> None:
    model = TINY["llama-odd"]()
    model.model.layers[2].mlp.down_proj = model.model.layers[0].mlp.down_proj
    layers = trace(model)["layers"]
    assert layers.movable == [1]
    assert "shares model.layers.0.mlp.down_proj.weight" in dict(layers.fixed)[2]


def test_a_layer_whose_result_is_used_elsewhere_stays() -> None:
    model = TINY["llama-odd"]()
    second = model.model.layers[2]
    assert trace(model)["layers"].fixed == ()

    class Reuse(type(second)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(states, *args, **kwargs) + self.first.kept.mean()

    class Keep(type(model.model.layers[0].input_layernorm)):  # type: ignore[misc]
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(states)
            return self.kept

    model.model.layers[0].input_layernorm.__class__ = Keep
    second.__class__ = Reuse
    vars(second)["first"] = model.model.layers[0].input_layernorm  # no module of its own
    assert "layer 2 uses what it computes" in dict(trace(model)["layers"].fixed)[0]


def test_layers_that_a_shorter_config_would_build_otherwise_are_refused() -> None:
    options = {**SPECS["qwen3-moe"][1], "num_hidden_layers": 4, "mlp_only_layers": [], "decoder_sparse_step": 2}
    model = built("qwen3_moe", options)()
    graph, before = trace(model), logits(model)
    with pytest.raises(ModelError, match="computes from a layer's index"):
        slice_model(model, graph, {"layers": [1, 2, 3]})
    assert torch.equal(logits(model), before)
    slice_model(model, graph, {"layers": [2, 3]})
    assert len(model.model.layers) == 2


@pytest.mark.parametrize(("name", "scale"), [("gemma2", "model.embed_tokens.scalar_embed_scale"), ("gpt2", "scaling")])
def test_a_scale_that_the_code_computes_from_the_width_stays(name: str, scale: str) -> None:
    model = MODELS[name]()
    graph = checked_trace(model, ["hidden"])
    path, _, attribute = (scale if "." in scale else f"transformer.h.0.attn.{scale}").rpartition(".")
    before = getattr(model.get_submodule(path), attribute)
    assert graph["hidden"].protected is None
    slice_model(model, graph, {"hidden": list(range(graph["hidden"].size // 2))})
    assert getattr(model.get_submodule(path), attribute) == before


def test_what_is_open_on_request_is_checked_first() -> None:
    graph = checked_trace(MODELS["mixtral"](), ["expert", "hidden", "layer"])
    assert {group.kind for group in graph.prunable} == {"ffn", "attention", "expert", "hidden", "layer"}
    assert graph["vocab"].protected == "protected by default: vocab"


def test_that_some_layers_cannot_go_says_nothing_against_the_others() -> None:
    options = {**SPECS["qwen3-moe"][1], "num_hidden_layers": 6, "mlp_only_layers": [], "decoder_sparse_step": 2}
    assert all(
        checked_trace(built("qwen3_moe", {**options, "num_hidden_layers": layers})(), ["layer"])["layers"].protected
        is None
        for layers in range(3, 7)
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_smaller_vocabulary_is_that_of_the_loss_too(tied: bool) -> None:
    model = built("mixtral", {**SPECS["mixtral"][1], "tie_word_embeddings": tied})()
    slice_model(model, checked_trace(model, ["vocab"]), {"vocab": list(range(90))})
    assert model(input_ids=ids(model), labels=ids(model)).loss.isfinite()
