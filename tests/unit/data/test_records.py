"""Records as other programs write them: handled as they are elsewhere, or refused by file and record."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfApi

from secateur import progress
from secateur.data import TextSettings, load_whole
from secateur.data.own_text import write_own_text
from secateur.data.records import record_text, render, sound
from secateur.data.sources import _mention_halves, read_documents
from secateur.errors import DataError
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

CHAT = tiny_tokenizer(chat=True)
PLAIN = str(CHAT.chat_template)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}


def talk(*messages: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def with_template(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (talk(("user", [{"type": "text", "text": "a"}, {"type": "image", "url": "x"}, "b"])), "user: a\nb\n"),
        (talk(("user", [{"type": "image", "text": None}]), ("assistant", "c")), "user: \nassistant: c\n"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "assistant: \n"),
        ({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}, "user: a\nassistant: b\n"),
        ({"messages": [], "text": None, "instruction": "a", "output": "b"}, "user: a\nassistant: b\n"),
    ],
)
def test_contents_that_are_no_plain_text(record: dict[str, Any], text: str) -> None:
    assert record_text(record, CHAT) == text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk(("user", "a"), (None, "b")), "number 2 has no role"),
        (talk((7, "b")), "number 1 has no role .it is 7"),
        ({"messages": [{"content": "b"}]}, "number 1 has no role"),
        ({"messages": ["b"]}, "number 1 has no role"),
        ({"messages": [[{"role": "user", "content": "a"}]]}, "number 1 has no role"),
        ({"messages": "user: b"}, "no list of mappings"),
        (talk(("user", None)), "number 1 has no content"),
        (talk(("user", 7)), "number 1 has no content"),
        (talk(("user", [7])), "number 1 has no content"),
        (talk(("user", {"text": "a"})), "number 1 has no content"),
        ({"label": 3, "id": 2}, "has no text; its keys are label, id"),
        ({"text": None}, "has no text; its keys are text"),
        ({}, r"keys are \(none\)"),
    ],
)
def test_records_that_have_no_text_are_refused_by_file_and_number(
    record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(talk(("user", "a"))) + "\n" + json.dumps(record))
    for tokenizer in (CHAT, tiny_tokenizer()):
        with pytest.raises(DataError, match=rf"Record 2 of .*chat\.jsonl .*{message}"):
            list(read_documents(str(path), tokenizer))


def test_a_template_without_a_system_role_gets_it_in_the_users_turn() -> None:
    messages = talk(("system", "be brief"), ("user", "hi"), ("assistant", "ho"))["messages"]
    assert render(messages, with_template(NO_SYSTEM)) == "user: be brief\n\nhi\nassistant: ho\n"
    assert render(messages, CHAT) == "system: be brief\nuser: hi\nassistant: ho\n"
    with pytest.raises(DataError, match="no system role"):
        render(messages[:1], with_template(NO_SYSTEM))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m['role'] + m['tool_name'] }}{% endfor %}", "tool_name"),
        ("{% for m in messages %}{{ m.role", "unexpected end|expected token"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'] + 7 }}", "str"),
        ({"rag": PLAIN, "tool_use": PLAIN}, "chat templates rag, tool_use, but none named default"),
    ],
)
def test_a_template_that_refuses_is_one_message(
    template: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(talk(("user", "a"), ("assistant", "b"))))
    settings = TextSettings(text=[str(path)], window=4, tokens=8)
    with pytest.raises(DataError, match=rf"Record 1 of .*chat\.jsonl .*({reason})"):
        load_whole(settings, with_template(template), 0)
    with pytest.raises(DataError, match=rf"source self .*({reason})"):
        write_own_text(build("llama-gqa"), with_template(template), 20, 0)


def test_a_template_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.data.records._TEMPLATE_SECONDS", 0.2)
    tokenizer = tiny_tokenizer()
    loop = "{% for i in range(99999) %}"
    tokenizer.chat_template = f"{loop}{loop}{{% endfor %}}{{% endfor %}}"
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(DataError, match=r"chat template: it takes longer than 0\.2 seconds"):
        render([{"role": "user", "content": "a"}], tokenizer)
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_an_alarm_of_the_callers_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CHAT, "apply_chat_template", lambda *_, **__: time.sleep(0.05) or "text")
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        signal.setitimer(signal.ITIMER_REAL, 60, 30)
        assert render([{"role": "user", "content": "a"}], CHAT) == "text"
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert left < 59.96
        assert interval == 30
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_default_of_several_templates_is_taken() -> None:
    assert render(talk(("user", "a"))["messages"], with_template({"rag": "x", "default": PLAIN})) == "user: a\n"


def test_half_a_surrogate_pair_is_read_with_a_replacement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sound("a\ud83d b") == "a\ufffd b"
    assert sound("\ude00\ud83d\ude00 ü") == "\ufffd\U0001f600 ü"
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "cut \\ud83d in half"}\n{"messages": [{"role": "user", "content": "\\ude00"}]}\n')
    _mention_halves.cache_clear()
    progress.show()
    try:
        for _ in range(2):
            assert list(read_documents(str(path), CHAT)) == ["cut \ufffd in half", "user: \ufffd\n"]
        assert capsys.readouterr().err.count("U+FFFD") == 1
    finally:
        progress.show(False)
    assert load_whole(TextSettings(text=[str(path)], window=4, tokens=8), CHAT, 0).ids.shape[1] == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ('{"text": %s}' % ("9" * 10_000), "too many digits"),
        ('{"text": "a", "b": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100"),
    ],
)
def test_deep_and_endless_json_is_refused_by_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n\n' + line)
    with pytest.raises(DataError, match=rf"Line 3 of .*bad\.jsonl .*{message}"):
        list(read_documents(str(path), CHAT))


def test_a_table_gives_what_its_lines_would(tmp_path: Path) -> None:
    """Empty cells are no keys, and pictures beside the text are not read."""
    records = [talk(("user", "a")), {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}]
    shape = pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string(), "tool_calls": pyarrow.list_(
        pyarrow.struct({"type": pyarrow.string()}))})  # fmt: skip
    column = pyarrow.array([[{**m, "tool_calls": m.get("tool_calls")} for m in r["messages"]] for r in records],
                           pyarrow.list_(shape))  # fmt: skip
    pictures = pyarrow.array([b"\xff" * 9] * 2)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column, "image": pictures}), tmp_path / "a.parquet")
    tokenizer = with_template("{% for m in messages %}{{ m.keys() | sort | join(' ') }};{% endfor %}")
    assert list(read_documents(str(tmp_path / "a.parquet"), tokenizer)) == ["content role;", "content role tool_calls;"]
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"Record 1 of .*b\.parquet has no text; its keys are image"):
        list(read_documents(str(tmp_path / "b.parquet"), CHAT))


def test_a_dataset_with_pictures_and_nested_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a picture are not decoded: these are none."""
    features = datasets.Features({"image": datasets.Image(), "messages": datasets.List(
        {"role": datasets.Value("string"), "content": datasets.Value("string")})})  # fmt: skip
    rows = {"image": [{"bytes": b"none", "path": None}], "messages": [talk(("user", "a"))["messages"]]}
    stream = datasets.Dataset.from_dict(rows, features=features).to_iterable_dataset()
    monkeypatch.setattr(HfApi, "dataset_info", lambda *arguments, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: stream)
    assert list(read_documents("owner/set", CHAT)) == ["user: a\n"]


def test_a_split_that_a_dataset_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*arguments: object, **options: object) -> Iterator[dict[str, str]]:
        raise ValueError('Bad split: train. Available splits: ["test"]')

    monkeypatch.setattr(HfApi, "dataset_info", lambda *arguments, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", lacking)
    with pytest.raises(DataError, match=r"owner/set cannot be read: Bad split: train.*\[\"test\"\].*id:config:split"):
        list(read_documents("owner/set", CHAT))
