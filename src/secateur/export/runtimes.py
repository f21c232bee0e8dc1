"""Which programs will take a saved folder: transformers was tried, the others are judged by rules about shapes.

The rules come from reading the loaders of vLLM, llama.cpp (GGUF) and ONNX Runtime, and from running llama.cpp on
pruned shapes; they are about sizes only, not about a version's bugs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

_K_QUANT_BLOCK = 256
# Families whose GGUF conversion reads head_dim and the widths from the config.
_GGUF_READS_SIZES = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text")


class Verdict(BaseModel):
    """Whether a runtime opens the folder, and how we know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runtime: str
    opens: Literal["yes", "likely", "unknown", "no"]
    basis: Literal["run here", "by rule"]
    why: str


def runtimes_of(config: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts for a folder that has just been opened with transformers, from its ``config.json``."""
    uneven = "per_layer_config" in config
    return [_transformers(uneven), *(_UNEVEN if uneven else (_vllm(config), _llama_cpp(config), _onnx(config)))]


def _transformers(uneven: bool) -> Verdict:
    how = "from_pretrained(folder, trust_remote_code=True)" if uneven else "from_pretrained(folder)"
    return Verdict(runtime="transformers", opens="yes", basis="run here", why=f"AutoModelForCausalLM.{how}")


_UNEVEN = (
    Verdict(
        runtime="vLLM",
        opens="unknown",
        basis="by rule",
        why="its own model classes build all layers alike; its Transformers backend (--model-impl transformers "
        "--trust-remote-code) reads sizes of layers in recent versions, which was not tried",
    ),
    Verdict(
        runtime="llama.cpp",
        opens="no",
        basis="by rule",
        why="the standard converter writes one size for all layers, and the loader then reports wrong shapes",
    ),
    Verdict(
        runtime="ONNX Runtime",
        opens="no",
        basis="by rule",
        why="optimum and onnxruntime-genai build one number of heads and one width for all layers",
    ),
)


def _vllm(config: Mapping[str, Any]) -> Verdict:
    if config.get("model_type") == "qwen2" and not _square_heads(config):
        why = "its Qwen2 class takes hidden size / heads for the head width, which pruned heads change"
        return Verdict(runtime="vLLM", opens="no", basis="by rule", why=why)
    why = "plain config with the same sizes in every layer"
    return Verdict(runtime="vLLM", opens="likely", basis="by rule", why=why)


def _llama_cpp(config: Mapping[str, Any]) -> Verdict:
    family = config.get("model_type")
    if family in ("qwen2", "phi3") and not _square_heads(config):
        why = f"its {family} loader expects heads x head width = hidden size, which pruned heads change"
        return Verdict(runtime="llama.cpp", opens="no", basis="by rule", why=why)
    width = config.get("intermediate_size") or 0
    quants = "" if width % _K_QUANT_BLOCK == 0 else f"; width {width} is no multiple of 256, so K-quants fall back"
    if family in _GGUF_READS_SIZES or (family in ("qwen2", "phi3") and _square_heads(config)):
        why = f"its {family} loader reads the sizes from the file{quants}"
        return Verdict(runtime="llama.cpp", opens="likely", basis="by rule", why=why)
    why = f"pruned {family} files were not looked into{quants}"
    return Verdict(runtime="llama.cpp", opens="unknown", basis="by rule", why=why)


def _onnx(config: Mapping[str, Any]) -> Verdict:
    if _square_heads(config):
        why = "plain config; heads x head width = hidden size"
        return Verdict(runtime="ONNX Runtime", opens="likely", basis="by rule", why=why)
    why = "optimum takes hidden size / heads for the head width, which pruned heads change; onnxruntime-genai reads it"
    return Verdict(runtime="ONNX Runtime", opens="unknown", basis="by rule", why=why)


def _square_heads(config: Mapping[str, Any]) -> bool:
    """Whether all query heads together are as wide as the hidden state."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim")
    return width is None or heads is None or heads * width == hidden
