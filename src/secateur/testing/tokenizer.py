"""A tokenizer for the tiny models: one token per character, within their vocabulary of 97."""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
_CHARACTERS = "\n " + string.ascii_letters + string.digits + ".,;:!?'\"()-_=+*/<>[]{}#%&@$"
_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def tiny_tokenizer(*, add_bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """A fast tokenizer with ``<pad>`` 0, ``<s>`` 1, ``</s>`` 2 (as in the tiny configs) and ``<unk>`` 3."""
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL, *_CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=_CHAT if chat else None, **names)
