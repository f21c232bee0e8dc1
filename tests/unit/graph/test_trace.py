"""What a recorded forward pass finds in tiny models of many families."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from secateur.errors import ModelError
from secateur.graph import trace
from secateur.testing import zoo
from secateur.testing.tiny import FFN, HEADS, HIDDEN, TINY, VOCAB, build
from secateur.types import DependencyGraph

KV = 2
# name: units of attention and of feed-forward in each layer (None: the group must be found, and be protected)
EXPECTED: dict[str, tuple[int | None, dict[str, int]]] = {
    **{
        name: (KV, {"mlp": FFN})
        for name in (
            "llama-gqa",
            "llama-tied",
            "llama-bias",
            "llama-one-layer",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3",
            "phi3",
            "falcon-new",
            "olmo2",
            "smollm3",
            "stablelm",
            "starcoder2",
            "granite",
            "cohere",
            "glm4",
            "nemotron",
        )
    },
    **{name: (HEADS, {"mlp": FFN}) for name in ("llama-mha", "llama-mqa", "falcon-mqa", "gpt-bigcode", "gptj", "phi")},
    **{name: (HEADS, {"mlp": FFN}) for name in ("gpt-neox", "gpt2", "opt")},
    "bloom": (None, {"mlp": 4 * HIDDEN}),
    "llama-odd": (3, {"mlp": 37}),
    "llama-square": (KV, {"mlp": HIDDEN}),
    **{name: (KV, {"mlp.experts": FFN}) for name in ("mixtral", "olmoe", "gpt-oss")},
}


def facts(graph: DependencyGraph) -> list[tuple[str, str, int, str | None, tuple[str, ...]]]:
    return [(group.name, group.kind, group.size, group.protected, group.renormalised) for group in graph]


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_of_each_layer(name: str) -> None:
    model = TINY[name]()
    heads, widths = EXPECTED[name]
    graph = trace(model)
    for layer in range(model.config.num_hidden_layers):
        for where, size in widths.items():
            group = graph[f"layers.{layer}.{where}"]
            assert (group.kind, group.size, group.layer, group.protected) == ("ffn", size, layer, None)
            assert {member.role for member in group.members} == {"in", "out"}
        if heads is not None:
            group = graph[f"layers.{layer}.attention"]
            assert (group.kind, group.size, group.layer, group.protected) == ("attention", heads, layer, None)
    expected = model.config.num_hidden_layers * (len(widths) + (heads is not None))
    assert len(graph.prunable) == expected
    assert all(group.layer is not None for group in graph.prunable)
    assert {group.name for group in graph} >= {"hidden", "vocab"}
    assert graph["hidden"].protected
    assert graph["vocab"].protected


def test_every_tiny_model_has_an_expectation() -> None:
    assert set(TINY) - set(EXPECTED) == {"qwen3-moe", "deepseek-v3"}, "they differ between layers; see below"


def test_no_row_belongs_to_two_groups_and_rows_are_within_the_parameter() -> None:
    for name in ("llama-gqa", "phi3", "gpt-neox", "falcon-new", "gpt-oss"):
        graph = trace(TINY[name]())
        for parameter, shape in graph.shapes.items():
            for axis, size in enumerate(shape):
                rows = [
                    row
                    for group, member in graph.of_parameter(parameter)
                    if member.axis == axis and group.within is None
                    for row in member.rows(range(group.size)).flatten().tolist()
                ]
                assert len(rows) == len(set(rows)), (name, parameter, axis)
                assert all(0 <= row < size for row in rows), (name, parameter, axis)


def test_dense_and_sparse_layers_of_one_model() -> None:
    graph = trace(TINY["qwen3-moe"]())
    assert graph["layers.0.mlp"].size == FFN
    assert graph["layers.1.mlp.experts"].size == 20
    experts = graph["layers.1.experts"]
    assert (experts.kind, experts.size, experts.protected) == ("expert", 6, "protected by default: expert")
    assert "top-k" in experts.renormalised
    graph = trace(TINY["deepseek-v3"]())
    assert graph["layers.0.attention"].size == HEADS
    assert {"layers.0.mlp", "layers.1.mlp.experts", "layers.1.mlp.shared_experts"} <= {g.name for g in graph.prunable}


def test_members_of_a_llama_layer() -> None:
    graph = trace(TINY["llama-gqa"]())
    members = {
        (member.parameter.removeprefix("model.layers.0."), member.axis, member.role, member.offsets, member.width)
        for name in ("layers.0.attention", "layers.0.mlp")
        for member in graph[name].members
    }
    assert members == {
        ("self_attn.q_proj.weight", 0, "out", (0,), 24),
        ("self_attn.k_proj.weight", 0, "out", (0,), 12),
        ("self_attn.v_proj.weight", 0, "out", (0,), 12),
        ("self_attn.o_proj.weight", 1, "in", (0,), 24),
        ("mlp.gate_proj.weight", 0, "out", (0,), 1),
        ("mlp.up_proj.weight", 0, "out", (0,), 1),
        ("mlp.down_proj.weight", 1, "in", (0,), 1),
    }


def test_fused_projections_come_apart() -> None:
    graph = trace(TINY["phi3"]())
    members = {
        (member.parameter.split(".")[-2], member.offsets, member.width) for member in graph["layers.0.mlp"].members
    }
    assert members == {("gate_up_proj", (0, FFN), 1), ("down_proj", (0,), 1)}
    graph = trace(TINY["gpt2"]())
    members = {(member.parameter, member.axis, member.offsets) for member in graph["layers.0.attention"].members}
    fused = (0, HIDDEN, 2 * HIDDEN)
    assert members == {
        ("transformer.h.0.attn.c_attn.weight", 1, fused),
        ("transformer.h.0.attn.c_attn.bias", 0, fused),
        ("transformer.h.0.attn.c_proj.weight", 0, (0,)),
    }


def test_why_heads_with_fixed_slopes_stay() -> None:
    graph = trace(TINY["bloom"]())
    assert graph["attention"].kind == "attention"
    assert "arange" in (graph["attention"].protected or "")


def test_norms_over_the_units_are_known() -> None:
    assert trace(TINY["olmo2"]())["layers.0.attention"].renormalised == ("mean",)
    assert trace(TINY["qwen3"]())["layers.0.attention"].renormalised == ()


@pytest.mark.parametrize("name", TINY)
def test_eager_meta_and_adapters_give_the_same_groups(name: str) -> None:
    graph = trace(build(name))
    assert facts(trace(build(name, attention="eager"))) == facts(graph)
    assert facts(trace(build(name).to("meta"))) == facts(graph)
    peft_model = get_peft_model(build(name), LoraConfig(r=5, target_modules="all-linear"))
    adapted = trace(peft_model)
    assert facts(adapted) == facts(graph)
    assert adapted.fingerprint == graph.fingerprint
    assert set(adapted.shapes) == {path for path, _ in peft_model.named_parameters()}


def test_adapter_rows_and_columns_are_members() -> None:
    adapted = trace(get_peft_model(TINY["llama-gqa"](), LoraConfig(r=5, target_modules="all-linear")))
    roles = {
        (member.parameter.split(".mlp.")[-1], member.axis, member.role)
        for member in adapted["layers.0.mlp"].members
        if "lora" in member.parameter
    }
    assert roles == {
        ("gate_proj.lora_B.default.weight", 0, "out"),
        ("up_proj.lora_B.default.weight", 0, "out"),
        ("down_proj.lora_A.default.weight", 1, "in"),
    }


def test_the_model_is_left_as_it_was() -> None:
    model = TINY["mixtral"]().train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    trace(model)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_half_precision_and_double_runs_agree() -> None:
    graph = trace(TINY["qwen2"]())
    assert trace(TINY["qwen2"]().to(torch.bfloat16)).to_json() == graph.to_json()
    assert trace(TINY["qwen2"]()).to_json() == graph.to_json()


def test_a_large_configuration_needs_no_weights() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    graph = trace(model)
    assert (graph["layers.3.attention"].size, graph["layers.3.mlp"].size) == (8, 28672)


class Toy(nn.Module):
    """A small language model with its own forward; ``twist`` is what happens between the projections of layer 1."""

    def __init__(self, twist: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(HIDDEN, FFN), "act": act, "down": nn.Linear(FFN, HIDDEN)})
            for act in (nn.ReLU(), twist)
        )
        self.head = nn.Linear(HIDDEN, VOCAB)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["down"](layer["act"](layer["up"](x)))
        return self.head(x)


class Apply(nn.Module):
    def __init__(self, function) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        (lambda x: torch.special.bessel_j0(x), "the operator aten.special_bessel_j0 has no rule"),
        (lambda x: x.relu().flip(-1), "units are reordered (aten.flip)"),
        (lambda x: x.relu() * torch.arange(FFN), "arithmetic on an index (aten.mul)"),
        (lambda x: x.relu() * torch.linspace(0, 1, FFN), "its units have fixed values (aten.linspace)"),
        (lambda x: x.relu() * torch.tensor([1.0, 2.0] * (FFN // 2)), "constant in the code"),
        (lambda x: x.relu()[..., [1, 0, *range(2, FFN)]], "indexed by computed values (aten.index)"),
        (lambda x: x.relu().reshape(2, 7, 5, 8).sort(-1).values.reshape(2, 7, FFN), "units are reordered (aten.sort)"),
        (lambda x: x.relu().tril(), "chosen by position (aten.tril)"),
    ],
)
def test_what_is_not_understood_is_protected_and_the_rest_is_not(twist, reason: str) -> None:  # type: ignore[no-untyped-def]
    graph = trace(Toy(Apply(twist)))
    assert graph["layers.0.mlp"].protected is None
    cuttable = [group.name for group in graph.prunable if group.layer == 1]
    assert cuttable == []
    reasons = [group.protected or "" for group in graph if group.layer == 1]
    assert any(reason in given for given in reasons), reasons


def test_a_shuffle_that_pairs_units_makes_coarser_units() -> None:
    """``[.., 4, 10] -> sum over 4``: ten channels, each fed by four rows; nothing may be cut finer than that."""
    toy = Toy(nn.Identity())
    toy.layers[1] = nn.ModuleDict(
        {
            "up": nn.Linear(HIDDEN, FFN),
            "act": Apply(lambda x: x.relu().reshape(2, 7, 4, FFN // 4).sum(-2)),
            "down": nn.Linear(FFN // 4, HIDDEN),
        }
    )
    group = trace(toy)["layers.1.mlp"]
    assert (group.size, group.protected) == (FFN // 4, None)
    up = next(member for member in group.members if member.parameter == "layers.1.up.weight")
    assert up.offsets == (0, 10, 20, 30)


def test_a_transposed_grid_of_channels_is_cut_along_one_side_only() -> None:
    """``[5, 8]`` written and ``[8, 5]`` read: both sides could go, but no row may belong to two groups."""
    graph = trace(Toy(Apply(lambda x: x.relu().reshape(2, 7, 5, 8).transpose(-1, -2).reshape(2, 7, FFN))))
    group = graph["layers.1.mlp"]
    assert [other.name for other in graph if other.layer == 1] == ["layers.1.mlp"]
    assert group.size == 8
    offsets = {member.parameter: (member.offsets, member.width) for member in group.members}
    assert offsets["layers.1.up.weight"] == ((0, 8, 16, 24, 32), 1)
    assert offsets["layers.1.down.weight"] == ((0,), 5)


def test_an_unused_parameter_protects_its_module() -> None:
    model = TINY["llama-gqa"]()
    model.model.layers[1].mlp.gate_proj.register_parameter("extra", nn.Parameter(torch.ones(FFN)))
    graph = trace(model)
    assert "was not used" in (graph["layers.1.mlp"].protected or "")
    assert graph["layers.0.mlp"].protected is None


def test_what_makes_hidden_states_of_pictures_keeps_the_hidden_width() -> None:
    """Text alone does not run it, so that it would go on with the old width."""
    model = zoo.build_type("gemma3", zoo.Shape.draw(0, "joined"))
    hidden = next(group for group in trace(model) if group.kind == "hidden")
    assert "was not used in the recorded pass" in (hidden.protected or "")
    assert not hidden.on_request
    assert trace(model).prunable  # the rest of the text model can be cut
    alone = next(group for group in trace(build("gemma3")) if group.kind == "hidden")
    assert alone.on_request


def test_special_tokens_of_a_model_of_several_parts_stay() -> None:
    model = zoo.build_type("gemma3", zoo.Shape.draw(0, "joined"))
    model.config.image_token_id, model.config.get_text_config().eos_token_id = 7, 11
    vocabulary = next(group for group in trace(model) if group.kind == "vocab")
    assert {7, 11} <= dict(vocabulary.fixed).keys()


def test_layers_that_share_a_module_are_not_cut_apart() -> None:
    model = TINY["llama-gqa"]()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    graph = trace(model)
    assert [group.name for group in graph if group.kind == "ffn"] == ["layers.0.mlp"]
    assert graph["layers.0.mlp"].size == FFN


def test_what_is_not_a_causal_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="causal language model"):
        trace(nn.Linear(3, 4))
    with pytest.raises(ModelError, match="no logits"):
        trace(TINY["llama-gqa"]().model)


def test_tracing_is_deterministic() -> None:
    model: PreTrainedModel = TINY["deepseek-v3"]()
    assert trace(model).to_json() == trace(model).to_json()
