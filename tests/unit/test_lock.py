"""One run at a time: a living one is never disturbed, a dead one never in the way, and nothing is left of the lock."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from secateur import lock
from secateur.errors import InputError
from secateur.lock import alone, held

WAITING = """
import sys
from secateur.lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(place: Path) -> subprocess.Popen[str]:
    """A process that holds ``place`` until its standard input is closed."""
    command = [sys.executable, "-c", WAITING, str(place)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def enters(place: Path) -> bool:
    try:
        with held(place):
            return True
    except InputError:
        return False


@pytest.fixture(params=["flock", "no flock"])
def _locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems that have locks, and on those that do not."""
    if request.param == "no flock":
        monkeypatch.setattr(lock, "_lock", lambda descriptor: None)


def write(place: Path, **changes: object) -> Path:
    """The lock of a process that has died, or of whoever ``changes`` say."""
    owner = {"pid": 2**22 - 1, "host": socket.gethostname(), "started": 1.0, **changes}
    file = place.with_name(f".{place.name}.running")
    file.write_text(json.dumps(owner))
    return file


def test_a_second_run_is_refused_by_process_and_machine_and_by_all_names_of_the_place(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with hold(tmp_path / "out") as process:
        for name in (tmp_path / "out", tmp_path / "link" / "." / "out"):
            with pytest.raises(InputError, match=rf"process {process.pid} on {socket.gethostname()}"), held(name):
                pytest.fail("entered")
        assert enters(tmp_path / "other")
        process.communicate()
    assert enters(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.usefixtures("_locks")
def test_a_killed_run_is_not_in_the_way(tmp_path: Path) -> None:
    with hold(tmp_path / "out") as process:
        process.kill()
        assert enters(tmp_path / "out") or (process.wait() and enters(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_locks")
def test_another_process_with_the_number_of_a_dead_one_is_not_it(tmp_path: Path) -> None:
    write(tmp_path / "out", pid=os.getppid())
    assert enters(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_locks")
def test_a_run_of_another_machine_is_refused_with_the_file_to_delete(tmp_path: Path) -> None:
    file = write(tmp_path / "out", host="elsewhere", pid=7)
    with pytest.raises(InputError, match=rf"process 7 on elsewhere.*delete {file}"), held(tmp_path / "out"):
        pytest.fail("entered")
    assert file.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"pid": 1}', "mine"])
def test_a_file_of_somebody_else_is_left_alone(text: str, tmp_path: Path) -> None:
    file = write(tmp_path / "out")
    file.write_text(text)
    with pytest.raises(InputError, match=r"is in the way.*delete it"), held(tmp_path / "out"):
        pytest.fail("entered")
    assert file.read_text() == text


def test_an_interruption_while_it_is_taken_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lock, "_this_process", interrupted)
        with pytest.raises(KeyboardInterrupt), held(tmp_path / "out"):
            pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []
    assert enters(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "\0\0\0\0"])
def test_what_a_power_cut_leaves_of_a_lock_is_taken_over(text: str, tmp_path: Path) -> None:
    write(tmp_path / "out").write_text(text)
    assert enters(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_thread_may_enter_again_and_another_may_not(tmp_path: Path) -> None:
    entered: list[bool] = []
    with held(tmp_path / "out"):
        with held(tmp_path / "." / "out"):
            thread = threading.Thread(target=lambda: entered.append(enters(tmp_path / "out")))
            thread.start()
            thread.join()
        assert (tmp_path / ".out.running").exists()
    assert entered == [False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_child_neither_holds_nor_releases_what_its_parent_holds() -> None:
    code = """
import os, sys, tempfile
from pathlib import Path
from secateur.errors import InputError
from secateur.lock import held
place = Path(tempfile.mkdtemp(), "out")
with held(place):
    if not os.fork():
        try:
            with held(place): os._exit(1)
        except InputError: raise SystemExit(0)  # through the parent's context manager
    _, status = os.wait()
    assert status == 0
    assert place.with_name(".out.running").exists()
assert not place.with_name(".out.running").exists()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_folders_that_were_made_for_it_go_when_nothing_is_in_them(tmp_path: Path) -> None:
    def fails() -> None:
        with held(tmp_path / "a" / "b" / "out"):
            assert (tmp_path / "a" / "b").is_dir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").touch()
    assert (tmp_path / "a" / "b" / "out").exists()


@pytest.mark.parametrize("name", ["", "\0", "x" * 300, "missing/" + "x" * 300, "y/" * 2100, "~nobody-here/x", b"\xe9"])
def test_places_that_cannot_be_are_refused(name: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name) if isinstance(name, bytes) else name
    with pytest.raises(InputError, match=r"^The output "), held(name):
        pytest.fail("entered")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_just_fits_is_used(tmp_path: Path) -> None:
    with held(tmp_path / ("z" * 255)):
        (file,) = tmp_path.iterdir()
        assert file.name.startswith(".z")
        with held(tmp_path / ("z" * 254)):
            assert len(list(tmp_path.iterdir())) == 2, "two names, two locks"


def test_a_function_holds_the_place_that_it_is_given(tmp_path: Path) -> None:
    @alone("output")
    def work(number: int, output: Path | None = None) -> list[str]:
        """Its own words."""
        return [path.name for path in tmp_path.iterdir()]

    assert work(1, tmp_path / "out") == work(2, output=tmp_path / "out") == [".out.running"]
    assert work(3) == work(4, None) == []
    assert work.__doc__ == "Its own words."
