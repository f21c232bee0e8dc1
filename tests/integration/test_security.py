"""What SECURITY.md promises: each promise names tests that exist, and the two that nothing else holds are held here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
WATCHED = """
import json, os, sys
connections, written = [], []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        connections.append([event, repr(args[1:])])
    elif event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append(os.path.realpath(args[0]))
    elif event in ("os.mkdir", "os.rename"):
        written.append(os.path.realpath(args[1 if event == "os.rename" else 0]))
from secateur.cli import app
sys.addaudithook(watch)
sys.argv[0] = "secateur"
try:
    app()
finally:
    with open(os.environ["SEEN"], "w") as file:
        json.dump({"connections": connections, "written": written}, file)
"""


def test_each_promise_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    there = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 5
    assert named <= there


@pytest.mark.parametrize("method", ["magnitude", "lorashear"])
def test_a_run_of_a_local_folder_opens_no_connection_and_writes_nothing_elsewhere(tmp_path: Path, method: str) -> None:
    build("llama-gqa").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"the letter came late {number} " * 12 for number in range(80)))
    keys = [
        f"{part}.{key}" for part in ("calibration", "recovery", "evaluation") for key in ("window=16", "tokens=128")
    ]
    keys += [f"{part}.text={tmp_path / 'text.txt'}" for part in ("calibration", "recovery", "evaluation")]
    keys += ["recovery.steps=1", "evaluation.speed=false", "evaluation.baseline=null"]
    keys += ["method.period_steps=1"] if method == "lorashear" else []
    out, places = tmp_path / "results" / "out", {name: str(tmp_path / name) for name in ("cache", "temporary", "home")}
    for place in (*places.values(), str(out.parent)):
        os.mkdir(place)
    environment = os.environ | {
        "HOME": places["home"],
        "TMPDIR": places["temporary"],
        "SECATEUR_CACHE": places["cache"],
    }
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # set by torch in this process; its default is in TMPDIR
    environment |= {"SEEN": str(tmp_path / "seen.json"), "HF_HOME": str(Path(places["home"], "hub"))}
    command = [sys.executable, "-c", WATCHED, "prune", str(tmp_path / "model"), "-o", str(out), "--method", method]
    done = subprocess.run(
        [*command, *(word for key in keys for word in ("--set", key))],
        env=environment | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["connections"] == []
    places_to_write = (
        str(out),
        str(out.parent / ".out."),
        places["cache"],
        places["temporary"],
        str(tmp_path / "seen."),
    )
    allowed = (*map(os.path.realpath, places_to_write), "/dev/", "/proc/")
    elsewhere = [path for path in seen["written"] if not path.startswith(allowed)]
    assert [path for path in elsewhere if "__pycache__" not in path] == []
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
