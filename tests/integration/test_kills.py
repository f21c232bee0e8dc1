"""Killed at any moment, and taken up again, every command ends as if it had never been disturbed.

A moment is what the files are between two of their changes: all that a killed process leaves. A few moments of each
command, and a few damaged files, are drawn here; ``-m slow`` tries all of them.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Ended, Forks
from safetensors.torch import load_file

import secateur
from secateur.lock import held
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")

_OF_THE_CLOCK = {"time", "seconds", "machine", "seconds_to_open", "scoring_seconds"} | {
    "scoring_peak_bytes",
    "scoring_extra_bytes",
}
"""Keys of what no two runs share: times, and memory beside what a process had taken before."""

_PRUNE: dict[str, tuple[str, ...]] = {
    "lorashear": (
        *("method=lorashear", "method.periods=2", "method.period_steps=1", "method.warmup_steps=1", "recovery.steps=3"),
        *("recovery.round_steps=1", "recovery.validation_tokens=64", "evaluation.baseline=null"),
    ),
    "loraprune": ("method=loraprune", "method.steps=3", "method.every=1", "recovery.steps=2", "recovery.teacher=0.5"),
    "flap": ("method=flap", "recovery.steps=0"),
    "wanda": (
        *("method=wanda", "recovery.steps=2", "recovery.repair=true", "recovery.finetuning=full"),
        *("recovery.reconstruct=true", "recovery.reconstruct_tokens=160"),
        *("recovery.teacher=1", "recovery.teacher_cache=8"),
    ),
    "shortgpt": ("method=shortgpt", "recovery.steps=0"),
    "rounds": (
        *("method=fisher", "budget.rounds=2", "recovery.steps=3", "recovery.between=0.4", "recovery.repair=true"),
        *("recovery.repair_tokens=160", "recovery.reconstruct=true", "recovery.reconstruct_tokens=160"),
    ),
    "flap in rounds": ("method=flap", "budget.rounds=3", "budget.ratio=0.4", "recovery.steps=0"),
    "evopress": (
        *("method=evopress", "method.compensated=true", "method.generations=3", "method.children=[2,1]"),
        *("recovery.steps=0", "recovery.repair=false"),
    ),
    "gisp": (
        *("method=gisp", "method.cuts=3", "method.windows=2", "method.moving_average=0.5"),
        *("recovery.steps=0", "recovery.repair=false"),
    ),
    "ddp": ("method=ddp", "method.steps=4", "method.lora=true", "evaluation.baseline=null", "recovery.steps=0"),
    "bypass": ("method=bypass", "method.steps=22", "recovery.steps=0", "recovery.repair=false"),
    "obs": ("method=obs", "method.swaps=4", "recovery.steps=0"),
}
"""Settings of ``secateur prune``, by the name of the case."""


@dataclass(frozen=True)
class Case:
    """A command, in a folder of its own."""

    words: tuple[str, ...]
    resumes: bool = True
    option: str = "-o"

    def line(self, watched: Path) -> list[str]:
        return [*self.words, self.option, str(watched / "out"), *(["--resume"] if self.resumes else [])]


@dataclass(frozen=True)
class Whole:
    """What a command leaves that nothing disturbs."""

    contents: dict[str, Any]
    moments: list[Path]
    """Copies of its folder: what a kill would have left at each moment."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a plan for it, and two files of text."""
    place = tmp_path_factory.mktemp("kills")
    build("llama-odd").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    secateur.prune(build("llama-odd"), method="magnitude").plan.save(place / "plan.json")
    words = "the letter came late and nobody in the house had asked who wrote it".split()
    for name, step in (("letters", 1), ("words", 5)):
        paragraphs = (" ".join((words[i * step % 13 :] + words[: i % 13] + [str(i)]) * 24) for i in range(40))
        (place / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return place


@pytest.fixture(scope="module")
def forks(place: Path) -> Iterator[Forks]:
    with Forks(place / "scratch") as forks:
        yield forks


@pytest.fixture(scope="module")
def cases(place: Path) -> dict[str, Case]:
    """Every command that writes a folder, on the model in ``place``."""
    model = str(place / "model")
    first, second = place / "letters.txt", place / "words.txt"
    settings = ["evaluation.speed=false", "training.checkpoint_steps=1", f"recovery.text=[{first},{second}]"]
    settings += [f"{section}.text={first}" for section in ("calibration", "evaluation")]
    for section, tokens in {"calibration": 96, "recovery": 384, "evaluation": 64}.items():
        settings += [f"{section}.window=16", f"{section}.tokens={tokens}"]

    def given(*more: str) -> tuple[str, ...]:
        return tuple(word for setting in (*settings, *more) for word in ("--set", setting))

    prunes = {name: Case(("prune", model, *given(*more))) for name, more in _PRUNE.items()}
    rows = ("--methods", "wanda", "--ratios", "0.2", *given("recovery.steps=1"))
    return prunes | {
        "analyze": Case(("analyze", model, *given())),
        "compare": Case(("compare", model, *rows)),
        "apply": Case(("apply", str(place / "plan.json"), model), resumes=False),
        "evaluate": Case(("evaluate", model, *given()), resumes=False, option="--json"),
        "export": Case(("export", str(place / "wanda/out"), "--to", "uniform"), resumes=False),
    }


@pytest.fixture(scope="module")
def undisturbed(place: Path, forks: Forks, cases: dict[str, Case]) -> Callable[[str], Whole]:
    """Runs a command once, by its name in ``cases``, and keeps its moments."""
    known: dict[str, Whole] = {}

    def run(name: str) -> Whole:
        if name == "export":
            run("wanda")  # whose result it reads
        if name not in known:
            watched, kept = place / name, place / "moments" / name
            watched.mkdir()
            ended = forks.run(watched, *cases[name].line(watched), keep=kept)
            assert ended.code == 0, ended.said
            known[name] = Whole(_contents(watched), [kept / str(number + 1) for number in range(ended.moments)])
        return known[name]

    return run


def _contents(watched: Path) -> dict[str, Any]:
    """What is in the folder, by its paths, but for the clock: tensors, and parsed text."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in watched.rglob("*") if path.is_file()):
        name = str(path.relative_to(watched))
        if path.suffix == ".safetensors":
            found[name] = load_file(path)
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text()))
        else:  # made from these
            found[name] = path.stat().st_size > 0
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if key not in _OF_THE_CLOCK}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            _assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            _assert_same(one, other, f"{where}[{number}]")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-6), f"{where}: {found} {expected}"
    else:
        assert found == expected, where


def _assert_refused(ended: Ended, names: str) -> None:
    assert ended.code == 1, ended.said
    assert names in ended.said
    assert "Error: " in ended.said
    assert "Traceback" not in ended.said
    assert "bug" not in ended.said


def _assert_taken_up(name: str, case: Case, watched: Path, forks: Forks, expected: dict[str, Any]) -> None:
    """The same command goes on from what is there, to the same end, and nothing is left beside it."""
    finished = (watched / "out").is_dir() and not case.resumes
    ended = forks.run(watched, *case.line(watched))
    if finished:
        _assert_refused(ended, "out is not empty")
    else:
        assert ended.code == 0, ended.said
    assert [path.name for path in watched.iterdir()] == ["out"], ended.said
    _assert_same(_contents(watched), expected, name)


COMMANDS = ["analyze", "compare", "apply", "evaluate", "export"]
ALL = [*_PRUNE, *COMMANDS]
KILLED = ["lorashear", "loraprune", "wanda", "rounds", "evopress", "gisp", "ddp", "bypass"]
RESUMED = ["lorashear", "loraprune", "flap", "analyze", "compare"]


@pytest.mark.parametrize("name", [*KILLED, *COMMANDS])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(
    name: str,
    place: Path,
    forks: Forks,
    cases: dict[str, Case],
    undisturbed: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    whole = undisturbed(name)
    moments = len(whole.moments)
    draw = random.Random(name)
    at = draw.randrange(1, moments)
    by = draw.choice([signal.SIGTERM, signal.SIGINT])
    ended = forks.run(tmp_path, *cases[name].line(tmp_path), at=at, by=by)
    assert ended.code == 128 + by, f"{at}: {ended.said}"
    assert "Interrupted" in ended.said
    left = {path.name for path in tmp_path.rglob("*") if path.name.endswith((".saving", ".running"))}
    assert not left, f"a signal lets it tidy up: {at}"
    assert not list((place / "scratch" / "tmp").iterdir())
    forks.run(tmp_path, *cases[name].line(tmp_path), at=draw.randrange(1, moments))
    _assert_taken_up(name, cases[name], tmp_path, forks, whole.contents)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_killed_at_every_moment_it_ends_as_if_nothing_had_been(
    name: str, forks: Forks, cases: dict[str, Case], undisturbed: Callable[[str], Whole], tmp_path: Path
) -> None:
    whole, watched = undisturbed(name), tmp_path / "watched"
    wrong = []
    for moment in whole.moments:
        shutil.copytree(moment, watched)
        try:
            _assert_taken_up(name, cases[name], watched, forks, whole.contents)
        except AssertionError as error:
            wrong.append(f"moment {moment.name}: {error}"[:3000])
        shutil.rmtree(watched)
    assert not wrong, "\n\n".join(wrong)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "garbage": lambda data: random.Random(len(data)).randbytes(len(data)),
    "null": lambda data: b"null\n",
}
"""What a power cut, or a disk that fails, makes of a file."""


def _damaged(whole: Whole, finished: Path, draw: random.Random) -> Iterator[tuple[Path, str, str]]:
    """Every file that a run has kept at some time, at one of the moments that have it, and those that it ends with:
    the moment, the path in it, and what becomes of it."""
    states: dict[str, list[Path]] = {}
    for state in (*whole.moments, finished):
        for path in state.rglob("*"):
            if path.is_file() and not any(part.endswith((".saving", ".running")) for part in path.parts):
                states.setdefault(str(path.relative_to(state)), []).append(state)
    for name, known in states.items():
        for damage in DAMAGES:
            yield draw.choice(known), name, damage


def _assert_mended_or_refused(
    state: Path, file: str, damage: str, name: str, case: Case, watched: Path, forks: Forks, expected: dict[str, Any]
) -> None:
    """The command makes a damaged file anew, or names it and leaves everything as it was."""
    shutil.copytree(state, watched)
    data = (watched / file).read_bytes()
    (watched / file).write_bytes(DAMAGES[damage](data))
    before = _raw(watched)
    ended = forks.run(watched, *case.line(watched))
    if ended.code == 0:
        if file == ".out.secateur/recipe.yaml":  # beside a finished folder: nobody knows any more whose it was
            shutil.rmtree(watched / ".out.secateur", ignore_errors=True)
        assert [path.name for path in watched.iterdir()] == ["out"], ended.said
        _assert_same(_contents(watched), expected, name)
    else:  # a finished folder that does not say what it is of is anybody's
        _assert_refused(ended, "out is not empty" if file == "out/secateur/recipe.yaml" else Path(file).name)
        assert _raw(watched) == before, "something was lost"
    shutil.rmtree(watched)


def _raw(watched: Path) -> dict[str, bytes]:
    files = (path for path in watched.rglob("*") if path.is_file() and path.name != ".out.running")
    return {str(path): path.read_bytes() for path in files if ".saving" not in str(path)}


@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_file_is_made_anew_or_refused_by_name(
    name: str,
    place: Path,
    forks: Forks,
    cases: dict[str, Case],
    undisturbed: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    whole, draw = undisturbed(name), random.Random(name)
    for state, file, damage in draw.sample(list(_damaged(whole, place / name, draw)), 1):
        _assert_mended_or_refused(state, file, damage, name, cases[name], tmp_path / "w", forks, whole.contents)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RESUMED, "rounds", "evopress", "gisp", "bypass"])
def test_every_damaged_file_is_made_anew_or_refused_by_name(
    name: str,
    place: Path,
    forks: Forks,
    cases: dict[str, Case],
    undisturbed: Callable[[str], Whole],
    tmp_path: Path,
) -> None:
    whole, wrong = undisturbed(name), []
    for number, (state, file, damage) in enumerate(_damaged(whole, place / name, random.Random(name))):
        watched = tmp_path / str(number)
        try:
            _assert_mended_or_refused(state, file, damage, name, cases[name], watched, forks, whole.contents)
        except AssertionError as error:
            wrong.append(f"{file} {damage}, of {state}: {error}"[:3000])
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.parametrize("owner", ["this machine", "another machine"])
@pytest.mark.parametrize("name", ["flap", *COMMANDS])
def test_what_another_run_is_writing_is_refused_and_stays(
    name: str, owner: str, forks: Forks, cases: dict[str, Case], tmp_path: Path
) -> None:
    for file in (".out.secateur/plan.json", ".out.saving/model.safetensors"):  # of the other run
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("{")
    before = _raw(tmp_path)
    lock = tmp_path / ".out.running"
    if owner == "another machine":
        lock.write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": 1.0}))
    with held(tmp_path / "out") if owner == "this machine" else nullcontext():
        written = lock.read_bytes()
        ended = forks.run(tmp_path, *cases[name].line(tmp_path))
        assert lock.read_bytes() == written
    who = f"process {os.getpid()} on" if owner == "this machine" else "process 7 on elsewhere"
    _assert_refused(ended, f"Another run is writing {tmp_path / 'out'}: {who}")
    assert _raw(tmp_path) == before
    assert (tmp_path / ".out.saving/model.safetensors").exists()
