"""Programs that support a saved folder: transformers is tested, the others are judged by rules about shapes.

The rules come from reading the loaders of vLLM, llama.cpp (GGUF) and ONNX Runtime, and from running llama.cpp on
pruned shapes. They cover sizes only, not the bugs of a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from secateur.planning.shapes import RUNTIMES


class Verdict(BaseModel):
    """Whether a runtime opens the folder, and the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    runtime: str
    opens: Literal["yes", "likely", "unknown", "no"]
    basis: Literal["run here", "by rule"]
    why: str


def runtimes_of(config: Mapping[str, Any]) -> list[Verdict]:
    """Verdicts for a folder that transformers has just opened, from its ``config.json``."""
    uneven = "pruned_layers" in config
    return [_transformers(uneven), *(_UNEVEN if uneven else (_vllm(config), _llama_cpp(config), _onnx(config)))]


def _transformers(uneven: bool) -> Verdict:
    how = "from_pretrained(folder, trust_remote_code=True)" if uneven else "from_pretrained(folder)"
    return Verdict(runtime="transformers", opens="yes", basis="run here", why=f"AutoModelForCausalLM.{how}")


_UNEVEN = (
    Verdict(
        runtime="vLLM",
        opens="unknown",
        basis="by rule",
        why="its own model classes build all layers with one size; its Transformers backend (--model-impl transformers "
        "--trust-remote-code) reads sizes of layers in recent versions, which was not tested; "
        "secateur export --to uniform writes a plain folder with padded layers",
    ),
    Verdict(
        runtime="llama.cpp",
        opens="no",
        basis="by rule",
        why="its converter writes one size for all layers, and the loader then reports wrong shapes; secateur export "
        "--to gguf writes layers of llama, mistral and qwen2 models unchanged, --to uniform pads those of other models",
    ),
    Verdict(
        runtime="ONNX Runtime",
        opens="no",
        basis="by rule",
        why="optimum and onnxruntime-genai build one number of heads and one width for all layers; secateur export "
        "--to onnx writes a graph without a cache",
    ),
)


def _vllm(config: Mapping[str, Any]) -> Verdict:
    heads = _heads("vllm", "vLLM", config)
    if heads is not None:
        return heads
    why = "plain config with the same sizes in every layer"
    return Verdict(runtime="vLLM", opens="likely", basis="by rule", why=why)


def _llama_cpp(config: Mapping[str, Any]) -> Verdict:
    heads = _heads("llama.cpp", "llama.cpp", config)
    if heads is not None:
        return heads
    family, runtime = config.get("model_type"), RUNTIMES["llama.cpp"]
    width, block = config.get("intermediate_size") or 0, runtime.ffn_multiple
    quants = "" if width % block == 0 else f"; width {width} is no multiple of {block}: K-quants use other types"
    if family in runtime.heads | runtime.fixed_heads:
        why = f"its {family} loader reads the sizes from the file{quants}"
        return Verdict(runtime="llama.cpp", opens="likely", basis="by rule", why=why)
    why = f"pruned {family} files were not tested{quants}"
    return Verdict(runtime="llama.cpp", opens="unknown", basis="by rule", why=why)


def _heads(name: Literal["vllm", "llama.cpp"], title: str, config: Mapping[str, Any]) -> Verdict | None:
    """A verdict for heads that together are not as wide as the hidden state; None when the runtime supports them."""
    family, runtime = config.get("model_type"), RUNTIMES[name]
    if family in runtime.heads or _square_heads(config):
        return None
    if family in runtime.fixed_heads:
        why = f"its {family} class uses hidden size / heads as the head width, which pruned heads change"
        return Verdict(runtime=title, opens="no", basis="by rule", why=why)
    why = f"whether its {family} class reads the head width from the config was not tested"
    return Verdict(runtime=title, opens="unknown", basis="by rule", why=why)


def _onnx(config: Mapping[str, Any]) -> Verdict:
    if _square_heads(config):
        why = "plain config; heads x head width = hidden size"
        return Verdict(runtime="ONNX Runtime", opens="likely", basis="by rule", why=why)
    why = "optimum uses hidden size / heads as the head width, which pruned heads change; onnxruntime-genai reads it"
    return Verdict(runtime="ONNX Runtime", opens="unknown", basis="by rule", why=why)


def _square_heads(config: Mapping[str, Any]) -> bool:
    """Whether all query heads together are as wide as the hidden state."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    width = config.get("head_dim")
    return width is None or heads is None or heads * width == hidden
