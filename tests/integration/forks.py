"""Runs commands of secateur in forked processes, killed at chosen moments: no import is waited for twice.

As a script it is the process that is forked: it reads jobs from standard input, one JSON object a line, and answers
each with one. It never computes a gradient itself, after which it could not be forked.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Audit events before which what is on the disk may have changed since the one before."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Of the process; negative for the signal that killed it."""
    said: str
    """Standard output and error."""
    moments: int
    """How often the files in the watched folder had changed."""


class Forks:
    """A process that has imported everything, and is forked for each command."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        for name in ("tmp", "cache"):
            (scratch / name).mkdir(parents=True)

    def __enter__(self) -> Self:
        places = {"TMPDIR": "tmp", "SECATEUR_CACHE": "cache", "HF_HOME": "cache"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ
            | {name: str(self.scratch / place) for name, place in places.items()}
            | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()

    def run(
        self, watched: Path, *words: str, at: int | None = None, by: int = signal.SIGKILL, keep: Path | None = None
    ) -> Ended:
        """Run ``secateur *words``; when files in ``watched`` have changed ``at`` times, the signal ``by`` comes.

        With ``keep``, a copy of ``watched`` is kept there of every moment, by its number: what a kill would have left.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        said = self.scratch / "said"
        job = {
            "words": words,
            "watched": str(watched),
            "at": at,
            "by": by,
            "said": str(said),
            "keep": keep and str(keep),
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        return Ended(answer["code"], said.read_text(errors="replace"), answer["moments"])


class _Moments:
    """Counts changes below a folder, and sends a signal to this process at one of them."""

    def __init__(self, job: dict[str, Any], count: int) -> None:
        self.watched, self.at, self.by, self.keep = (job[key] for key in ("watched", "at", "by", "keep"))
        self.count = count
        self.number, self.before, self.looking = 0, self.state(), False
        self.process = os.getpid()

    def state(self) -> list[Any]:
        """Which files are there: other inodes, too, once they were replaced; not how far one is that is being written,
        nor what is in a folder that has no name yet."""
        found, folders = [], [self.watched]
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    about = entry.stat(follow_symlinks=False)
                    found.append((entry.path, about.st_ino, about.st_size > 0))
                    if entry.is_dir(follow_symlinks=False) and not entry.name.endswith(".saving"):
                        folders.append(entry.path)
        return sorted(found)

    def __call__(self, event: str, _: Any) -> None:
        if event not in _CHANGES or self.looking or os.getpid() != self.process:
            return
        self.looking = True
        now = self.state()
        changed = now != self.before
        if changed:
            self.before, self.number = now, self.number + 1
            os.pwrite(self.count, str(self.number).encode(), 0)
            if self.keep is not None:
                shutil.copytree(self.watched, Path(self.keep, str(self.number)))
        self.looking = False
        if changed and self.number == self.at:
            os.kill(self.process, self.by)


def _in_a_fork(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> Any:
    """What ``export.verify`` has a new interpreter do, without waiting for one."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv = command[2:]
            runpy.run_path(command[2], run_name="__main__")
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return SimpleNamespace(returncode=code, stdout="", stderr="")


def _command(job: dict[str, Any], count: int) -> None:
    """In the fork: the command, and nothing else."""
    for number in (1, 2):
        os.dup2(os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # who started this may want it ignored
    sys.addaudithook(_Moments(job, count))
    from secateur.cli import app

    app(job["words"], prog_name="secateur")


def _work() -> None:
    for name in ("compare", "inspection", "pipeline", "tables"):
        importlib.import_module(f"secateur.{name}")
    importlib.import_module("matplotlib.backends.backend_agg")
    import torch

    from secateur.export import verify

    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None  # what a killed process has written is there without
    gc.freeze()  # or each collection in a fork would walk, and copy, all that was imported
    verify.subprocess = SimpleNamespace(run=_in_a_fork)  # type: ignore[assignment]
    for line in sys.stdin:
        job = json.loads(line)
        Path(job["said"]).unlink(missing_ok=True)
        with tempfile.TemporaryFile() as count:
            child = os.fork()
            if child == 0:
                code = 70
                try:
                    _command(job, count.fileno())
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 0
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            moments = int(os.pread(count.fileno(), 20, 0) or 0)
        print(json.dumps({"code": code, "moments": moments}), flush=True)


if __name__ == "__main__":
    _work()
