"""How commands end that are stopped from outside, or started where something is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.endings import _message, resumable
from secateur.errors import ModelError

PROGRAM = """
import os, signal, subprocess, sys, tempfile, time
from pathlib import Path
import typer
from secateur.endings import Commands, resumable

app = typer.Typer(cls=Commands)

@app.callback()
def main() -> None: pass

@app.command()
def wait() -> None:
    with resumable("Add --resume."), tempfile.TemporaryDirectory() as folder:
        try:
            child = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
            subprocess.run([sys.executable, "-c", child])
        except BaseException:
            time.sleep(0.5)  # the tidying takes a moment
            Path(folder, "tidied").touch()
            raise

@app.command()
def say(word: str) -> None:
    print(word, Path.cwd().name)  # as rich does; typer.echo minds terminals itself

app(prog_name="secateur")
"""


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], text=True, **options)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_a_run_as_ctrl_c_does(name: str, code: int, tmp_path: Path) -> None:
    def heard_again() -> None:  # a suite that runs in the background may have inherited that it is ignored
        signal.signal(getattr(signal, name), signal.SIG_DFL)

    with start("wait", env=os.environ | {"TMPDIR": str(tmp_path)}, preexec_fn=heard_again) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(getattr(signal, name))
        if name != "SIGINT":
            process.send_signal(signal.SIGTERM)  # a second one must not interrupt the tidying
        _, heard = process.communicate(timeout=30)
    assert process.returncode == code
    assert heard == "Interrupted. Add --resume.\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    with start("wait", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 143


def test_only_the_command_line_handles_signals() -> None:
    code = (
        "import signal, secateur, secateur.cli\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_characters_that_a_terminal_lacks_are_shown_by_their_codes() -> None:
    word = "\u2500 caf\udce9"
    with start("say", word, env=os.environ | {"PYTHONIOENCODING": "ascii"}) as process:
        heard, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert heard.startswith("\\u2500 caf\\udce9 ")


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_a_program_without_standard_streams_works(closed: tuple[int, ...]) -> None:
    with start("say", "x", preexec_fn=lambda: [os.close(number) for number in closed]) as process:
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_working_folder_that_is_gone_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'gone')!r}); os.rmdir(os.getcwd())\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code, "say", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no longer exists. Change to one that exists." in done.stderr
    assert "bug" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "Set TMPDIR"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_said(error: Exception, advice: str) -> None:
    assert advice in _message(error)
    assert "bug" not in _message(error)


def test_nesting_that_a_library_cannot_read_is_no_bug_and_another_endless_call_is() -> None:
    def endless() -> None:
        endless()

    with pytest.raises(RecursionError) as caught:
        json.loads("[" * 100_000)
    assert "nested too deep" in _message(caught.value)
    with pytest.raises(RecursionError) as caught:
        endless()
    assert "bug" in _message(caught.value)


def test_a_message_is_never_endless() -> None:
    assert len(_message(ValueError("x" * 100_000))) < 2000


def test_an_error_says_what_is_left_of_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(reason: str) -> None:
        with pytest.raises(ModelError), resumable("", tmp_path / "out"):
            raise ModelError(reason)

    fail("diverged")
    assert capsys.readouterr().err == ""
    left = tmp_path / ".out.secateur"
    left.mkdir()
    fail("diverged")
    assert f"kept in {left}. Continue with --resume, or delete that folder" in capsys.readouterr().err
    fail(f"{left} is of another recipe")
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full here")
def test_help_that_finds_no_room_is_one_message() -> None:
    with open("/dev/full", "w") as full, start("--help", stdout=full) as process:
        said = process.communicate()[1]
    assert process.returncode == 1
    assert "The disk is full" in said
    assert "Traceback" not in said
