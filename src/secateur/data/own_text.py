"""Text that the dense model writes itself: a source without a licence, in the model's own distribution.

Distilling a model's own samples into the pruned model needs no corpus (LLM-QAT, arXiv 2305.17888, section 3.1). An
instruction-tuned model answers requests, which keeps the chat format in the training. Any other model continues from
the token that begins a document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.blocks import check_ids, document_end
from secateur.data.marks import Marks, encode, marks_of
from secateur.data.mixture import context_of
from secateur.data.records import render
from secateur.errors import DataError
from secateur.progress import Bar, say
from secateur.reading import parse_json, read_text
from secateur.whole import cache_folder, store_file

_WRITTEN_TOKENS = 256
_BATCH = 32
_TEMPERATURE = 1.0
_TOP_P = 0.95  # the tail of a small model's distribution is noise

_REQUESTS = (
    "Explain {} to a beginner.",
    "Write a short story about {}.",
    "What are the most important facts about {}?",
    "Describe the history of {}.",
    "Write a news article about {}.",
    "Give advice to someone who wants to learn about {}.",
    "What are common mistakes with {}, and how are they avoided?",
    "Write a dialogue between two friends about {}.",
    "Compare two different views on {}.",
    "Summarise what an encyclopedia would say about {}.",
)
_TOPICS = (
    "the water cycle", "bridges", "gravity", "the Roman Empire", "baking bread", "football", "the stock market",
    "volcanoes", "chess", "photosynthesis", "jazz", "electric cars", "the French Revolution", "whales", "democracy",
    "painting", "Python programming", "vaccines", "the Moon", "gardening", "the printing press", "sleep", "trains",
    "coffee", "probability", "coral reefs", "job interviews", "mountains", "the human heart", "poetry", "recycling",
    "computers", "the Silk Road", "friendship", "bees", "architecture", "climate change", "cooking rice", "museums",
    "swimming", "the alphabet", "sorting algorithms", "inflation", "dinosaurs", "the theatre", "bicycles", "elections",
    "wool", "antibiotics", "deserts",
)  # fmt: skip


def write_own_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, tokens: int, seed: int
) -> list[str]:
    """Documents sampled from ``model``, at least ``tokens`` new tokens in all. The same arguments give the same text.

    The result is kept as a file in the cache folder and read from there the next time. About 70 % of it is for recovery
    and 15 % each for calibration and evaluation, as with every source.

    Args:
        model: the dense model, on any device. Its mode is restored.
        tokens: number of tokens to write. A 135M model writes some hundred tokens a second on two CPU cores.
        seed: of the sampling.

    Raises:
        DataError: there is no tokenizer, or it has no token to start from, its chat template refuses requests, the
            model's context has no room for an answer, or the model only writes empty text.
    """
    if tokenizer is None:
        raise DataError("The model has no tokenizer, and cannot write text. Add its files to the folder.")
    file = cache_folder() / f"own-text-{_key(model, tokenizer, tokens, seed)}.jsonl"
    kept = _kept(file) if file.is_file() else []
    if kept:
        return kept
    say(f"The model writes {tokens:,} tokens of its own text")
    documents = _write(model, tokenizer, tokens, seed)
    _keep(file, documents)
    return documents


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> list[str]:
    requests = _requests(seed)
    training, documents = model.training, list[str]()
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with Bar("writing own text", tokens) as bar, torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            while bar.done < tokens:
                batch = list(itertools.islice(requests, _BATCH))
                answers = _answer(model, tokenizer, batch)
                if not any(text for text, _ in answers):
                    raise DataError("The model writes only empty texts. Use other text than self.")
                documents += [
                    _document(tokenizer, request, text)
                    for request, (text, _) in zip(batch, answers, strict=True)
                    if text
                ]
                bar.advance(sum(length for _, length in answers))
    finally:
        model.train(training)
    return documents


def _requests(seed: int) -> Iterator[str]:
    """Every request about every topic in random order, over and over (the answers are sampled, so they differ)."""
    order = Random(seed)
    every = [request.format(topic) for request in _REQUESTS for topic in _TOPICS]
    while True:
        order.shuffle(every)
        yield from every


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: list[str]) -> list[tuple[str, int]]:
    """The model's text for each request, and its number of tokens."""
    prompts = [_prompt(tokenizer, request) for request in requests]
    check_ids(torch.tensor([max(prompt) for prompt in prompts]), model, "A request that the model is to answer")
    longest = max(map(len, prompts))
    room = (context_of(model) or sys.maxsize) - longest
    if room < 1:
        raise DataError(
            f"The model reads {longest + room} tokens at once, and a request has {longest} with its chat template: "
            "there is no room for an answer. Use other text than self."
        )
    end = _end(model, tokenizer)
    # many tokenizers have no padding token, and need none: the mask excludes padding
    padding = next(mark for mark in (tokenizer.pad_token_id, *end, 0) if mark is not None)
    ids = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    written = cast(Any, model).generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=GenerationConfig(
            max_new_tokens=min(_WRITTEN_TOKENS, room),
            do_sample=True,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            top_k=0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end or None,
            pad_token_id=padding,
        ),
    )[:, longest:]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    lengths = (written != padding).sum(1).tolist()
    return [(text.strip(), length) for text, length in zip(texts, lengths, strict=True)]


def _end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text; empty where neither model nor tokenizer knows one."""
    end = getattr(model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    return end if isinstance(end, list) else [] if end is None else [end]


def _prompt(tokenizer: PreTrainedTokenizerBase, request: str) -> list[int]:
    marks = marks_of(tokenizer)
    if tokenizer.chat_template:
        text = _rendered(tokenizer, [{"role": "user", "content": request}], answer=True)
        (ids,) = encode([text], tokenizer, marks)
        spelt_out = tuple(ids[: len(marks.before)]) == marks.before
        return ids if spelt_out else [*marks.before, *ids]
    start = _start(tokenizer, marks)
    if not start:
        raise DataError(
            "The tokenizer has no token that begins a text (BOS or EOS), which the model needs for writing. Use other "
            "text than self."
        )
    return start


def _start(tokenizer: PreTrainedTokenizerBase, marks: Marks) -> list[int]:
    """The first tokens of a text. A token named BOS is used even when the tokenizer does not add it."""
    if marks.before:
        return list(marks.before)
    named = (tokenizer.bos_token_id, document_end(tokenizer))
    return next(([token] for token in named if token is not None), [])


def _document(tokenizer: PreTrainedTokenizerBase, request: str, text: str) -> str:
    if not tokenizer.chat_template:
        return text
    return _rendered(tokenizer, [{"role": "user", "content": request}, {"role": "assistant", "content": text}])


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], answer: bool = False) -> str:
    try:
        return render(messages, tokenizer, answer=answer)
    except DataError as error:
        raise DataError(f"A request that the model answers for the source self {error}") from error


def _key(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> str:
    """Hash of everything that determines the text: weights and context of the model, tokenizer, amount and seed."""
    settings = (tokens, seed, _WRITTEN_TOKENS, _BATCH, _TEMPERATURE, _TOP_P, context_of(model), _end(model, tokenizer))
    marks = marks_of(tokenizer)
    words = (_start(tokenizer, marks), marks, tokenizer.chat_template, sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(repr((settings, words)).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.detach().double().sum().item()}".encode())
    return digest.hexdigest()[:16]


def _kept(file: Path) -> list[str]:
    """The documents of a file of ``_keep``; none when it is damaged. It is then written again."""
    try:
        lines = read_text(file, error=DataError).split(
            "\n"
        )  # not splitlines: documents may contain U+2028 and similar characters
        records = [parse_json(line, f"A line of {file}", error=DataError) for line in lines if line]
        return [str(record["text"]) for record in records]
    except (DataError, TypeError, KeyError):
        return []


def _keep(file: Path, documents: list[str]) -> None:
    """Write the documents as JSON lines, atomically. Without a writable cache they are not kept."""
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(lines, encoding="utf-8")
        store_file(scratch)  # or a power cut could leave fewer lines under the name
        scratch.replace(file)
    except OSError as error:
        say(f"The text is not kept for the next run: cannot write {file} ({error.strerror}).")
