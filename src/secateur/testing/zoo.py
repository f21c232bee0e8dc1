"""A tiny random model of every causal language model that transformers knows, built from its configuration class.

Nothing is known about a family but the names of its configuration's fields: ``_FIELDS`` says what a field means, and
``_EXCEPTIONS`` what the few families with sizes of their own need. ``Shape`` draws the numbers, so that a bug which
needs an odd width, a single KV head or heads that do not add up to the hidden size meets one sooner or later.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from secateur.surgery import sharing_copy
from secateur.surgery.stand_in import randomise

MODEL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Every model type that ``AutoModelForCausalLM`` builds."""

LARGEST = 20_000_000
"""More parameters than this are not tiny: a size that no field of the table reaches."""

UNBUILDABLE: Mapping[str, str] = {
    "gemma3n": "its vision tower comes from timm, and downloads its configuration",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"), "it reads the hidden states of the model that it assists"
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"), "its causal language model takes the configuration of its decoder alone"
    ),
}
"""Model types that cannot be built offline and run on token ids, and why."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a tiny model."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 12
    hidden: int = 48
    ffn: int = 40
    expert_ffn: int = 20
    experts: int = 6
    vocab: int = 97
    layers: int = 2

    form: str = "plain"
    """The one of ``FORMS`` that it was drawn in."""

    @classmethod
    def draw(cls, seed: int, form: str = "free") -> Shape:
        """Sizes by ``seed`` in one of ``FORMS``; few of them are equal, or divide each other."""
        rng = random.Random(f"{seed} sizes")
        kv_heads, group = rng.choice([(2, 2), (3, 2), (2, 3), (1, 4), (4, 2), (3, 3), (5, 1)])
        head_dim = rng.choice([8, 12, 16])
        joined = kv_heads * group * head_dim
        odd = {"ffn": rng.choice([37, 51, 66]), "expert_ffn": rng.choice([18, 21]), "vocab": rng.choice([97, 101])}
        even = {"ffn": rng.choice([40, 56]), "expert_ffn": 24, "vocab": rng.choice([104, 128])}
        return cls(
            heads=kv_heads * group,
            kv_heads=kv_heads * group if form.endswith("mha") else kv_heads,
            head_dim=head_dim,
            hidden=rng.choice([30, 44, 52, 70]) if form.startswith("free") else joined,
            experts=rng.choice([5, 6, 7]) if not form.startswith("round") else 4,
            form=form,
            **(even if form.startswith("round") else odd),
        )


FORMS: tuple[str, ...] = ("free", "free mha", "joined", "joined mha", "round", "round mha")
"""``free``: the hidden size is not that of all heads, widths are odd; ``joined``: it is that; ``round``: besides, sizes
are multiples of 8, and experts of 4. ``mha``: as many KV heads as query heads. Not every family can have every form."""


_FIELDS: Mapping[str, str | int] = {
    # a field of Shape, or a number
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim_model", "embedding_size"), "hidden"),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "lru_width"), "hidden"),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), "heads"),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"), "heads"),
    **dict.fromkeys(("num_encoder_attention_heads", "swa_num_attention_heads"), "heads"),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), "kv_heads"),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "dim_head", "swa_head_dim"), "head_dim"),
    **dict.fromkeys(("attention_head_size", "attention_head_dim", "d_head"), "head_dim"),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dim_ff", "dff", "d_inner"), "ffn"),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "feed_forward_size"), "ffn"),
    **dict.fromkeys(("intermediate_size_mlp", "shared_intermediate_size", "dense_intermediate_size"), "ffn"),
    **dict.fromkeys(("prefix_dense_intermediate_size",), "ffn"),
    **dict.fromkeys(
        ("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), "expert_ffn"
    ),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), "expert_ffn"),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), "experts"),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size", "audio_vocab_size"), "vocab"),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), "layers"),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), "layers"),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    "q_lora_rank": 16,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 10,
    "index_head_dim": 8,
    "index_n_heads": 4,
    "index_topk": 16,
    "o_lora_rank": 12,
    "o_groups": 2,
    "sliding_window": 16,
    "sliding_window_size": 16,
    "attention_window_size": 16,
    "attention_chunk_size": 16,
    "window_size": 16,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "chunk_size": 8,
    "n_groups": 2,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "hidden_size_per_layer_input": 8,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_size": 16,
    "patch_size": 4,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}

_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _mamba(shape: Shape, **more: Any) -> dict[str, Any]:
    """State-space heads whose widths make up twice the hidden size."""
    return {"mamba_n_heads": shape.hidden // 2, "mamba_d_head": 4, **more}


_EXCEPTIONS: Mapping[str, Callable[[Shape], dict[str, Any]]] = {
    "bamba": lambda shape: _mamba(shape, attn_layer_indices=[1]),
    "blt": lambda shape: {"encoder_hash_byte_group_vocab": 60, **_blt(shape)},
    "codegen": lambda shape: {"n_head": 8, "n_embd": 8 * shape.head_dim, "rotary_dim": 8},
    "cohere_compass_text": lambda shape: {"rope_parameters": {"full_attention": dict(_ROPE)}},
    "dbrx": lambda shape: {
        "attn_config": {"kv_n_heads": shape.kv_heads, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": shape.hidden,
            "ffn_hidden_size": shape.expert_ffn,
            "moe_num_experts": shape.experts,
            "moe_top_k": 2,
        },
    },
    "dots3_note_text": lambda shape: _dots(shape),
    "dots3_note_vision_encoder": lambda shape: {
        **dict.fromkeys(("adapter_in_dim", "hidden_size"), 32),
        "adapter_out_dim": shape.hidden,
        "num_attention_heads": 4,
    },
    "dots3_note_audio_encoder": lambda shape: {
        **dict.fromkeys(("adapter_input_size", "hidden_size"), 32),
        "adapter_out_dim": shape.hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "downsample_hidden_size": 8,
    },
    "electra": lambda shape: {"embedding_size": 26},
    "falcon": lambda shape: {"new_decoder_architecture": shape.kv_heads > 1, "multi_query": shape.kv_heads == 1},
    "falcon_h1": lambda shape: _mamba(shape, mamba_d_ssm=2 * shape.hidden),
    "gemma3n_text": lambda shape: {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "laurel_rank": 6,
        "intermediate_size": shape.ffn,
    },
    "gemma4_text": lambda shape: {
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
    },
    "gptj": lambda shape: {"rotary_dim": 8},
    "granitemoehybrid": lambda shape: _mamba(
        shape, layer_types=["mamba", "attention"], position_embedding_type="rope", num_local_experts=shape.experts
    ),
    "jamba": lambda shape: {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 5},
    "kimi_linear": lambda shape: {"linear_head_dim": 8, "linear_num_heads": shape.heads},
    "lfm2": lambda shape: {"block_multiple_of": 8, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": lambda shape: {"layer_types": ["conv", "full_attention"]},
    "llama4_text": lambda shape: {
        "num_hidden_layers": 2,
        "moe_layers": [1],
        "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0],
    },
    "longcat_flash": lambda shape: {"head_dim": 6, "qk_rope_head_dim": 6, "zero_expert_num": 2},
    "mamba2": lambda shape: {"num_heads": shape.hidden // 2, "head_dim": 4, "n_groups": 1},
    "minimax_m3_vl_text": lambda shape: {"rotary_dim": 8},
    "qwen4_exp_text": lambda shape: {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 6,
        "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5},
    },
    "recurrent_gemma": lambda shape: {"num_hidden_layers": 3},
    "reformer": lambda shape: {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [shape.hidden // 2, shape.hidden - shape.hidden // 2],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "rembert": lambda shape: {"input_embedding_size": 26, "output_embedding_size": 34},
    "roc_bert": lambda shape: {
        "pronunciation_embed_dim": 10,
        "pronunciation_vocab_size": 30,
        "shape_embed_dim": 12,
        "shape_vocab_size": 30,
    },
    "roformer": lambda shape: {"embedding_size": 26},
    "stablelm": lambda shape: {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}},
    "xmod": lambda shape: {"default_language": "en_XX"},
    "zamba": lambda shape: {
        "layers_block_type": list(_HYBRID),
        "num_hidden_layers": 4,
        "num_key_value_heads": shape.heads,
        "attention_head_dim": 2 * shape.hidden // shape.heads,
    },
    "zamba2": lambda shape: {"layers_block_type": list(_HYBRID), "num_hidden_layers": 4, "adapter_rank": 6},
    "zaya": lambda shape: {"num_experts_per_tok": 1, "router_hidden_size": 14},
}
"""What a family needs besides its fields."""


def _blt(shape: Shape) -> dict[str, Any]:
    """Bytes are encoded in half the width of the global transformer, and cross-attention doubles it."""
    common = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": shape.ffn,
    }
    local = {**common, "hidden_size": 16, "hidden_size_global": 32, "vocab_size": 260, "cross_attn_k": 2}
    return {
        "vocab_size": 260,
        "patcher_config": {**common, "hidden_size": 16, "vocab_size": 260},
        "encoder_config": local,
        "decoder_config": {**local, "num_hidden_layers": 2},
        "global_config": {**common, "hidden_size": 32, "num_hidden_layers": 2},
    }


def _dots(shape: Shape) -> dict[str, Any]:
    names = ("num_attention_heads", "num_key_value_heads")
    return {
        **{f"swa_{name}": shape.heads for name in names},
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 14,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 6,
        "swa_v_head_dim": 10,
        "swa_head_dim": 14,
    }


def options_of(config_class: type[PreTrainedConfig], shape: Shape) -> dict[str, Any]:
    """Arguments that make a configuration of this class tiny."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    options: dict[str, Any] = {}
    for name in fields & _FIELDS.keys():
        value = _FIELDS[name]
        options[name] = getattr(shape, value) if isinstance(value, str) else value
    try:
        whole = config_class()
    except Exception:  # a default that is not legal
        return options
    options |= _layers(whole, options)
    for name in config_class.sub_configs:
        part = getattr(whole, name, None)
        if isinstance(part, PreTrainedConfig):
            options[name] = {"model_type": part.model_type, **options_of(type(part), shape)}
    if config_class.model_type in _EXCEPTIONS:
        options |= _EXCEPTIONS[config_class.model_type](shape)
    return options


def _layers(whole: PreTrainedConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with an entry for each layer, cut down to the layers that differ, and their number."""
    number = next(
        (name for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if name in options), None
    )
    if number is None:
        return {}
    count = getattr(whole, number)
    lists = {name: value for name, value in vars(whole).items() if isinstance(value, list) and len(value) == count > 1}
    if not lists:
        return {}
    seen: dict[str, int] = {}
    for layer in range(count):
        seen.setdefault(repr([value[layer] for value in lists.values()]), layer)
    chosen = sorted({*seen.values(), *range(2)}) if len(seen) == 1 else sorted(seen.values())
    return {**{name: [value[layer] for layer in chosen] for name, value in lists.items()}, number: len(chosen)}


def configure(model_type: str, shape: Shape) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    options = options_of(config_class, shape)
    return AutoConfig.for_model(model_type, **options)


def build_type(model_type: str, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model in eval mode; raises whatever the family raises for a shape that it cannot have."""
    config = configure(model_type, shape)
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    size = sum(parameter.numel() for parameter in outline.parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters are too many for a tiny model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    randomise(model, seed)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight.data[module.padding_idx] = 0.0  # as transformers leaves it; some families insist on opening
    return model.eval()


def build_any(model_type: str, seed: int = 0) -> tuple[PreTrainedModel, Shape]:
    """The model in the freest of ``FORMS`` in which it can be built and runs; raises what the last form raised."""
    for form in FORMS:
        shape = Shape.draw(seed, form)
        try:
            model = build_type(model_type, shape, seed)
            with torch.no_grad():
                trial = sharing_copy(model)  # some families change themselves while they run
                logits = trial(input_ids=torch.arange(14).reshape(2, 7), use_cache=False).logits
            if not logits.isfinite().all():
                raise ValueError("the logits are not finite")
            return model, shape
        except Exception:
            if form == FORMS[-1]:
                raise
    raise AssertionError
