"""The text of one record of a dataset: plain text, or a conversation rendered by the tokenizer's chat template."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from secateur.errors import DataError

_PLAIN = ("text", "content", "document")
TEXT_KEYS = (*_PLAIN, "messages", "instruction", "input", "output")
"""Keys of a record that contain its text."""
Message = Mapping[str, Any]
_TEMPLATE_SECONDS = 10.0
"""Time limit of a template for one conversation, in seconds; a longer one is treated as endless."""


def record_text(record: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of one record.

    Supported are a string under ``text`` (or ``content``, ``document``), ``messages`` as role and content, and
    ``instruction`` (with ``input``) and ``output``; the last two are rendered as ``render`` does.

    Raises:
        DataError: the record has none of these forms, or its conversation cannot be rendered. The caller adds the
            record and the file to the start of the message.
    """
    for key in _PLAIN:
        if isinstance(record.get(key), str):
            return str(record[key])
    if record.get("messages"):
        return render(_messages(record["messages"]), tokenizer)
    question, answer = record.get("instruction"), record.get("output")
    if isinstance(question, str) and isinstance(answer, str):
        more = record.get("input")
        question = f"{question}\n\n{more}" if isinstance(more, str) and more.strip() else question
        return render([{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenizer)
    raise DataError(
        f"has no text; its keys are {', '.join(map(str, record)) or '(none)'}. "
        "Known are text, messages (role, content), or instruction, input and output."
    )


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, answer: bool = False) -> str:
    """A conversation as text: by the tokenizer's chat template, or as ``Role: content`` paragraphs where it has none.

    If the template refuses system messages, they become the beginning of the user's next message, as usual for families
    without a system role.

    Args:
        messages: each with a role and a content, both strings.
        answer: whether the text ends at the start of the assistant's next message; only with a template.

    Raises:
        DataError: the template refuses the conversation. The caller adds the start of the message, as for
            ``record_text``.
    """
    template = tokenizer.chat_template
    if not template:
        return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    if isinstance(template, Mapping) and "default" not in template:
        raise DataError(
            f"is a conversation, and the tokenizer has the chat templates {', '.join(map(str, template))}, but none "
            "named default. Name one of them default in the tokenizer's folder, or give the text under the key text."
        )
    try:
        return _by_template(messages, tokenizer, answer)
    except Exception as error:  # jinja's errors, and any other error of a template
        merged = _without_system(messages)
        if merged is not None:
            try:
                return _by_template(merged, tokenizer, answer)
            except Exception:  # the system role was not the only fault; the first reason is reported
                pass
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"is refused by the tokenizer's chat template: {reason[:200]}. Correct the record, leave it out, or give "
            "its text under the key text."
        ) from error


def sound(text: str) -> str:
    """``text`` with U+FFFD for every half of a surrogate pair, which JSON can contain and UTF-8 cannot."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _by_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, answer: bool) -> str:
    conversation = [dict(message) for message in messages]
    with _at_most(_TEMPLATE_SECONDS):
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer))


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer; only in the main thread, which receives alarms.

    An alarm of the caller is raised at its time, or afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"it takes longer than {seconds:g} seconds")

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)


def _without_system(messages: Sequence[Message]) -> list[Message] | None:
    """Without system messages: their text begins the user's next message. None when there are none, or no next one."""
    found: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user":
            found.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            found.append(message)
    return None if waiting or len(found) == len(messages) else found


def _messages(given: Any) -> list[Message]:
    """The messages of a record, each with a string for role and content; DataError as in ``record_text``."""
    if isinstance(given, Mapping) and all(isinstance(column, list) for column in given.values()):
        # datasets stores a list of mappings as a mapping of lists
        given = [dict(zip(given, row, strict=False)) for row in zip(*given.values(), strict=False)]
    if not isinstance(given, list):
        raise DataError("has messages that are no list of mappings with role and content.")
    return [_message(message, number) for number, message in enumerate(given, start=1)]


def _message(given: Any, number: int) -> Message:
    role = given.get("role") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(role, str):
        shown = "null or missing" if role is None else f"{str(role)[:60]}, which is no text"
        raise DataError(
            f"has messages of which number {number} has no role (it is {shown}). Roles are user, assistant ..."
        )
    message = {key: value for key, value in given.items() if value is not None}  # a table has empty cells instead
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    text = _content(content)
    if text is None:
        raise DataError(
            f"has messages of which number {number} has no content. It must be a text, or a list of parts, of which "
            "those with a text are read."
        )
    return {**message, "content": text}


def _content(given: Any) -> str | None:
    """The text of a message: its text parts, one in each line; None for a value that is neither text nor parts."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        return None
    parts = [part.get("text") if isinstance(part, Mapping) else part for part in given]
    if not all(isinstance(part, str | Mapping) for part in given):
        return None
    return "\n".join(part for part in parts if isinstance(part, str))
