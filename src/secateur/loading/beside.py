"""Names of the files beside config and weights in a model's folder that are copied to a result.

They are in lower case; ``*`` matches any characters but a slash.
"""

from __future__ import annotations

TEMPLATES = ("additional_chat_templates/*.jinja",)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    *TEMPLATES,
)
PROCESSOR = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
)
LICENCE = ("license*", "licence*", "notice*", "use_policy*", "copying*")
