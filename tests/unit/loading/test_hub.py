"""Models on a hub that lists, refuses, breaks off or is away: a server on this machine plays it."""

from __future__ import annotations

import errno
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from secateur.errors import ModelError
from secateur.export import save_folder
from secateur.graph import trace
from secateur.loading import hub, load, outline
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

SHA = "ab12" * 10
ALONG = ("LICENSE", "Licence.md", "NOTICE", "USE_POLICY.md", "additional_chat_templates/tools.jinja")
LEFT = ("README.md", "code.py", "consolidated.safetensors", "onnx/config.json", "original/tokenizer.model")


class _Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mode, source = "well", Path()

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, code: int, body: bytes, cut: bool = False, **head: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **head}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def files(self) -> Iterator[str]:
        return (file.relative_to(self.source).as_posix() for file in self.source.rglob("*") if file.is_file())

    def do_GET(self) -> None:
        path, files = self.path.split("?")[0], sorted(self.files())
        if self.mode.startswith("all "):
            return self.answer(int(self.mode[4:]), b"{}")
        if "/tree/" in path:
            rows = [
                {"type": "file", "path": f, "size": (self.source / f).stat().st_size, "oid": "0" * 40} for f in files
            ]
            return self.answer(200, json.dumps(rows).encode())
        if path.startswith("/api/"):
            about = {"id": "org/name", "sha": SHA, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        if self.mode == "gated":
            return self.answer(403, b"restricted", X_Error_Code="GatedRepo", X_Error_Message="restricted")
        file = path.split(f"/resolve/{SHA}/")[1]
        broken = file == "model.safetensors"
        if broken and self.mode.isdigit():
            return self.answer(int(self.mode), b"no")
        body = (self.source / file).read_bytes()
        self.answer(200, body, cut=broken and self.mode == "cut", ETag=f'"{file}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub with one model."""
    _Hub.source = tmp_path_factory.mktemp("source")
    build("llama-tied").save_pretrained(_Hub.source)
    tiny_tokenizer().save_pretrained(_Hub.source)
    for name in (*ALONG, *LEFT):
        (_Hub.source / name).parent.mkdir(exist_ok=True)
        (_Hub.source / name).write_text(name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def cache(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the hub, which answers well until a test says otherwise."""
    monkeypatch.setattr(_Hub, "mode", "well")
    monkeypatch.setattr(constants, "ENDPOINT", site)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", site + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    return tmp_path / "hub"


def go_offline(monkeypatch: pytest.MonkeyPatch, how: str = "HF_HUB_OFFLINE") -> None:
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(_Hub, "mode", how)


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "all 503", "all 429"])
def test_what_was_fetched_once_opens_offline(how: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load("org/name", device="cpu")
    assert tokenizer is not None
    assert model.source_folder == cache.resolve() / "models--org--name" / "snapshots" / SHA
    outline("org/name", revision="v1.0")
    go_offline(monkeypatch, how)
    for revision in (None, "main", "v1.0", SHA, SHA[:8]):
        assert load("org/name", revision=revision, device="cpu")[1] is not None
    with pytest.raises(ModelError, match=r"at revision v2\.0, nor is it in the hub's cache"):
        load("org/name", revision="v2.0")


@pytest.mark.parametrize("how", ["well", "HF_HUB_OFFLINE"])
def test_what_a_result_takes_along_is_fetched_and_nothing_else(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load("org/name", device="cpu")
    go_offline(monkeypatch, how)
    model, tokenizer = load("org/name", device="cpu")
    assert tokenizer is not None
    assert tokenizer.chat_template["tools"] == "additional_chat_templates/tools.jinja"
    there = {file.relative_to(model.source_folder).as_posix() for file in model.source_folder.rglob("*")}
    assert there >= set(ALONG)
    assert not there & set(LEFT)
    save_folder(model, tokenizer, tmp_path / "out", graph=trace(model), kept={})
    for name in ALONG:
        assert (tmp_path / "out" / name).read_text() == name


def test_a_cache_that_something_else_filled_opens_offline_and_says_what_it_lacks(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("org/name", device="cpu")
    (cache / "models--org--name" / "snapshots" / SHA / "LICENSE").unlink()
    go_offline(monkeypatch)
    said: list[str] = []
    monkeypatch.setattr(hub, "say", said.append)
    assert load("org/name", device="cpu")[1] is not None
    assert said == ["The hub's cache lacks LICENSE of org/name. A result will lack it as well."]


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("gated", r"org/name is gated: accept its licence"),
        ("401", r"no model org/name|does not serve the files of org/name"),
        ("403", r"\(403\)\. Accept its licence"),
        ("429", r"too many requests"),
        ("503", r"fails to serve org/name \(503\)"),
        ("cut", r"The download of org/name .* broke off"),
    ],
)
def test_failures_after_the_listing_are_one_message(
    mode: str, words: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Hub, "mode", mode)
    for opener in (outline, load):
        with pytest.raises(ModelError, match=words):
            opener("org/name")
    go_offline(monkeypatch)
    with pytest.raises(ModelError, match=r"only in part: .*model\.safetensors|nor is it in the hub's cache"):
        load("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_Hub, "mode", "well")
    assert load("org/name", device="cpu")[1] is not None


def test_half_a_download_is_refused_by_what_it_lacks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("org/name", device="cpu")
    (cache / "models--org--name" / "snapshots" / SHA / "tokenizer.json").unlink()
    go_offline(monkeypatch)
    with pytest.raises(ModelError, match=r"holds org/name only in part: tokenizer\.json missing.*HF_HUB_OFFLINE"):
        load("org/name")


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "The disk is full.*HF_HOME"), (errno.EACCES, "cannot be written.*HF_HOME")]
)
def test_a_cache_that_takes_no_more(number: int, words: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*arguments: object, **options: object) -> Any:
        raise OSError(number, "no")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    with pytest.raises(ModelError, match=words):
        load("org/name")


def test_a_model_that_the_hub_does_not_have(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Hub, "mode", "all 404")
    with pytest.raises(ModelError, match=r"no model org/name|nor is it in the hub's cache"):
        load("org/name")
