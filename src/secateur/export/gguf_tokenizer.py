"""Writes a fast tokenizer to GGUF: kinds of tokens, merges or scores, and the split of text before them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from secateur.errors import ModelError

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPLITS: Mapping[str, str] = {
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}": "qwen2",
}
"""Regular expression that a tokenizer splits text by before its merges → llama.cpp's name for it."""


def write_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> None:
    """Add the tokenizer that llama.cpp needs for text, or a mark that there is none.

    ``vocabulary`` is the number of rows of the embedding, which may be larger than that of the tokenizer. Raises
    ModelError for a tokenizer that llama.cpp does not support.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {}
    model = description.get("model", {})
    if model.get("type") != "BPE":
        raise ModelError(
            f"The tokenizer is of the kind {model.get('type', type(tokenizer).__name__)}, and GGUF files support byte "
            "pair encoding only. To export a model that reads token ids, give a copy of the folder without tokenizer "
            "files."
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(model["vocab"], merges, vocabulary))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(description.get("pre_tokenizer") or {}))
        writer.add_token_merges(merges)
    tokens, kinds = _tokens(model, description.get("added_tokens", []), vocabulary)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special(writer, tokenizer)


def _tokens(
    model: Mapping[str, Any], added: list[Mapping[str, Any]], vocabulary: int
) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every row of the embedding."""
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    kinds = [TokenType.UNUSED] * vocabulary
    for text, number in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x")
        tokens[number], kinds[number] = text, TokenType.BYTE if is_byte else TokenType.NORMAL
    for token in added:
        number = token["id"]
        tokens[number] = token["content"]
        kinds[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if model.get("byte_fallback") and model.get("unk_token") in model["vocab"]:
        kinds[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
    return tokens, kinds


def _scores(vocab: Mapping[str, int], merges: list[str], vocabulary: int) -> list[float]:
    """Scores for the same order of merges in llama.cpp: higher for tokens that are merged earlier."""
    scores = [0.0] * vocabulary
    for rank, pair in reversed(list(enumerate(merges, start=1))):  # the first way to make a token counts
        number = vocab.get(pair.replace(" ", "", 1))
        if number is not None:
            scores[number] = -float(rank)
    return scores


def _split_name(pre_tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the split of text before merging; raises ModelError when it has no equal one."""
    steps = list(_steps(pre_tokenizer))
    kinds = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if kinds == ["ByteLevel"] and last.get("use_regex", True) and not last.get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name is not None and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return name
    raise ModelError(
        f"The tokenizer splits text ({', '.join(kinds) or 'not at all'}) in a way that llama.cpp is not known to "
        "support. To export a model that reads token ids, give a copy of the folder without tokenizer files."
    )


def _steps(pre_tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer.get("type") == "Sequence":
        for step in pre_tokenizer["pretokenizers"]:
            yield from _steps(step)
    elif pre_tokenizer:
        yield pre_tokenizer


def _write_special(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
