"""Writes a model as a GGUF file for llama.cpp, and reads it back with llama.cpp if that is installed.

The shapes that its loaders support were found by trials (llama-cpp-python 0.3.36): one size for all layers in
``llama``, ``qwen2`` and ``qwen3``; layers that differ, and heads that do not add up to the hidden size, in ``deci``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import ModelError, VerificationError
from secateur.export import llama_process
from secateur.export.agreement import agreement, sample_ids
from secateur.export.gguf_tokenizer import write_tokenizer

_ROTATED_IN_PAIRS = ("llama", "mistral")
"""Families whose query and key rows need another order in llama.cpp, which rotates neighbours instead of halves."""
_FAMILIES = (*_ROTATED_IN_PAIRS, "qwen2", "qwen3")
_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_NAMES: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Module of a layer → its name in a GGUF file."""
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TOLERANCE = {torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits, as a fraction of the largest: llama.cpp rounds activations where torch does not."""


class _Sizes(NamedTuple):
    """Sizes of each layer, read from its weights."""

    width: list[int]
    heads: list[int]
    kv_heads: list[int]


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, file: Path, dtype: torch.dtype, name: str
) -> str:
    """Write ``model`` with its tokenizer to ``file``, in ``dtype``; vectors are in float32. Returns what was checked.

    ``name`` is the model's name in the file. Raises ModelError, before anything is written, for families, sizes and
    tokenizers that llama.cpp is not known to support, and VerificationError when it computes something else.
    """
    arch, sizes = _architecture(model)
    writer = GGUFWriter(file, arch)
    try:
        _describe(writer, model, arch, sizes, dtype, name)
        write_tokenizer(writer, tokenizer, _vocabulary(model))
        for tensor_name, tensor in _tensors(model, arch, sizes):
            exact = tensor.dim() == 1
            kind = GGMLQuantizationType.F32 if exact else _TYPES[dtype][0]
            stored = tensor.float() if exact else tensor.to(dtype)
            data = stored.view(torch.uint8) if kind is GGMLQuantizationType.BF16 else stored
            writer.add_tensor(tensor_name, data.numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return _check(model, tokenizer, file, dtype, arch)


def _architecture(model: PreTrainedModel) -> tuple[str, _Sizes]:
    """The loader of llama.cpp for these sizes; raises ModelError when none is known."""
    config, family = model.config, model.config.model_type
    if family not in _FAMILIES:
        raise ModelError(
            f"GGUF files are supported for {', '.join(_FAMILIES)}; this is a {family} model. llama.cpp's own "
            "convert_hf_to_gguf.py reads folders with a plain config, which --to uniform writes."
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise ModelError(f"llama.cpp computes {family} models with silu; this one has {config.hidden_act}.")
    layers: Any = model.get_submodule("model.layers")
    head = _head_width(model)
    sizes = _Sizes(
        width=[layer.mlp.down_proj.weight.shape[1] for layer in layers],
        heads=[layer.self_attn.q_proj.weight.shape[0] // head for layer in layers],
        kv_heads=[layer.self_attn.k_proj.weight.shape[0] // head for layer in layers],
    )
    if all(len(set(each)) == 1 for each in sizes):
        if family == "qwen2" and sizes.heads[0] * head != config.hidden_size:
            return "llama", sizes  # its own loader uses hidden size / heads as the width of a head
        return ("llama" if family in _ROTATED_IN_PAIRS else family), sizes
    if family == "qwen3":
        raise ModelError(
            "llama.cpp has no loader for a qwen3 model whose layers differ in size. First pad the layers (secateur "
            "export DIR --to uniform -o EVEN), then export the result."
        )
    return "deci", sizes


def _vocabulary(model: PreTrainedModel) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _head_width(model: PreTrainedModel) -> int:
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    return int(attention.head_dim)


def _describe(
    writer: GGUFWriter, model: PreTrainedModel, arch: str, sizes: _Sizes, dtype: torch.dtype, name: str
) -> None:
    config: Any = model.config
    head = _head_width(model)

    def by_layer(values: list[int]) -> Any:
        return values if arch == "deci" else values[0]

    writer.add_name(name)
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_context_length(getattr(config, "sliding_window", None) or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(sizes.width))
    writer.add_feed_forward_length(by_layer(sizes.width))
    writer.add_head_count(by_layer(sizes.heads))
    writer.add_head_count_kv(by_layer(sizes.kv_heads))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(_vocabulary(model))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise ModelError(f"Position embeddings of the kind {kind} are not supported in GGUF files.")


def _tensors(model: PreTrainedModel, arch: str, sizes: _Sizes) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the file and tensor, on the CPU, of every tensor of the model."""
    tied = model.config.tie_word_embeddings
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(rope, _head_width(model))
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        path, _, leaf = name.rpartition(".")
        if path == "lm_head" and tied:
            continue
        if path in _OUTSIDE:
            yield f"{_OUTSIDE[path]}.{leaf}", tensor
            continue
        _, _, number, place = path.split(".", 3)
        if place not in _NAMES:
            raise ModelError(
                f"{name} has no place in a GGUF file of the architecture {arch}. Try --to uniform or --to onnx."
            )
        if arch in ("llama", "deci") and place in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = (sizes.heads if place.endswith("q_proj") else sizes.kv_heads)[int(number)]
            tensor = _halves_to_pairs(tensor, heads)
        yield f"blk.{number}.{_NAMES[place]}.{leaf}", tensor


def _halves_to_pairs(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection ``[heads * width, ...]``, reordered for rotary embeddings of neighbours."""
    width = tensor.shape[0] // heads
    return tensor.reshape(heads, 2, width // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _llama3_factors(rope: Mapping[str, Any], width: int) -> torch.Tensor:
    """Divisors of the frequencies in Llama 3.1 (``rope_type: llama3`` of transformers), ``[width / 2]``."""
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    lengths = 2 * math.pi / frequencies
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((context / lengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).float()


def _check(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, file: Path, dtype: torch.dtype, arch: str
) -> str:
    """Let llama.cpp read the file in its own process, and compare. The text returned says when it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return (
            f"Written for llama.cpp's {arch} loader. It was not opened: llama-cpp-python is not installed here (pip "
            "install llama-cpp-python)."
        )
    window = getattr(model.config, "sliding_window", None)  # this loader has none; the context length says so
    ids = sample_ids(model.config)[:1, :window].to(model.device)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    text = "The quick brown fox jumps over 13 lazy dogs.\n"
    with tempfile.TemporaryDirectory() as scratch:
        job = {"file": str(file.absolute()), "ids": ids[0].tolist(), "text": text if tokenizer is not None else None}
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        command = [sys.executable, llama_process.__file__, scratch]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode != 0 or not (Path(scratch) / "answer.safetensors").is_file():
            last = " ".join(done.stderr.strip().splitlines()[-3:])
            raise VerificationError(f"llama.cpp does not open the file it was written for ({arch}): {last}")
        answer = load_file(Path(scratch) / "answer.safetensors")
    difference, scale, good = agreement(answer["logits"], expected, _TOLERANCE[dtype])
    if not good:
        raise VerificationError(
            f"llama.cpp opens the file and computes something else: logits differ by {difference:.3g} of {scale:.1f}."
        )
    if tokenizer is not None and answer["tokens"].tolist() != tokenizer(text)["input_ids"]:
        raise VerificationError("llama.cpp opens the file, but splits text into other tokens than the tokenizer.")
    same = float((answer["logits"].argmax(-1) == expected.argmax(-1)).float().mean())
    return (
        f"llama.cpp opens it ({arch} loader): logits differ by at most {difference:.1e} of {scale:.1f}, the same top "
        f"token at {same:.0%} of positions."
    )
