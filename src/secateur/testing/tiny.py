"""Tiny random causal LMs of many families, built from their configs: offline, in milliseconds, the same every time.

Weights are drawn so that nothing is degenerate (weights keep the scale of activations, biases and norm weights are
random): a slice that is off by one row shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.surgery.stand_in import randomise

HIDDEN, HEADS, HEAD_DIM, FFN, LAYERS, VOCAB = 48, 4, 12, 40, 2, 97

_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED: Mapping[str, Any] = {**_COMMON, "intermediate_size": FFN, "num_key_value_heads": 2}
_HEAD_DIM: Mapping[str, Any] = {**_GATED, "head_dim": HEAD_DIM}
_EXPERTS: Mapping[str, Any] = {**_HEAD_DIM, "num_experts_per_tok": 2}

SPECS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    # name: (model type in transformers, config)
    "llama-gqa": ("llama", _HEAD_DIM),
    "llama-mha": ("llama", {**_HEAD_DIM, "num_key_value_heads": HEADS}),
    "llama-mqa": ("llama", {**_HEAD_DIM, "num_key_value_heads": 1}),
    "llama-tied": ("llama", {**_HEAD_DIM, "tie_word_embeddings": True}),
    "llama-bias": ("llama", {**_HEAD_DIM, "attention_bias": True, "mlp_bias": True}),
    "llama-odd": (  # heads * head_dim != hidden, odd head count and width
        "llama",
        {
            **_HEAD_DIM,
            "hidden_size": 45,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "intermediate_size": 37,
            "num_hidden_layers": 3,
        },
    ),
    "llama-square": ("llama", {**_HEAD_DIM, "intermediate_size": HIDDEN, "vocab_size": HIDDEN}),
    "llama-one-layer": ("llama", {**_HEAD_DIM, "num_hidden_layers": 1}),
    "mistral": ("mistral", {**_HEAD_DIM, "sliding_window": 16}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", _HEAD_DIM),
    "gemma": ("gemma", _HEAD_DIM),
    "gemma2": ("gemma2", {**_HEAD_DIM, "sliding_window": 16, "query_pre_attn_scalar": HEAD_DIM}),
    "gemma3": ("gemma3_text", {**_HEAD_DIM, "sliding_window": 16, "query_pre_attn_scalar": HEAD_DIM}),
    "phi": ("phi", {**_GATED, "num_key_value_heads": HEADS}),
    "phi3": ("phi3", _GATED),
    "gpt-neox": ("gpt_neox", {**_COMMON, "intermediate_size": FFN, "rotary_pct": 0.5}),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": ("opt", {**_COMMON, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN}),
    "bloom": (
        "bloom",
        {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "falcon-mqa": ("falcon", {**_COMMON, "ffn_hidden_size": FFN}),
    "falcon-new": (
        "falcon",
        {**_COMMON, "ffn_hidden_size": FFN, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "olmo2": ("olmo2", _GATED),
    "smollm3": ("smollm3", _GATED),
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": (
        "qwen3_moe",
        {**_EXPERTS, "num_experts": 6, "moe_intermediate_size": 20, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    ),
    "stablelm": ("stablelm", {**_GATED, "hidden_size": 64}),
    "starcoder2": ("starcoder2", _GATED),
    "granite": ("granite", _GATED),
    "cohere": ("cohere", {**_GATED, "logit_scale": 1.0}),
    "gpt-bigcode": (
        "gpt_bigcode",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gptj": (
        "gptj",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_inner": FFN,
            "n_positions": 64,
            "rotary_dim": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "glm4": ("glm4", _HEAD_DIM),
    "nemotron": ("nemotron", _HEAD_DIM),
    "olmoe": ("olmoe", {**_GATED, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("gpt_oss", {**_EXPERTS, "num_local_experts": 4, "sliding_window": 16}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            **_COMMON,
            "intermediate_size": FFN,
            "num_key_value_heads": HEADS,
            "moe_intermediate_size": 20,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 14,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 6,
            "v_head_dim": 10,
        },
    ),
}


def build(name: str, seed: int = 0, attention: str | None = None) -> PreTrainedModel:
    """A tiny fp32 model in eval mode; ``attention`` is ``eager`` or ``sdpa`` (default: what transformers takes)."""
    model_type, options = SPECS[name]
    config = AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    randomise(model, seed)
    return model.eval()


TINY: dict[str, Callable[[], PreTrainedModel]] = {name: partial(build, name) for name in SPECS}
