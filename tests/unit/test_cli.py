"""The command line: quick to answer, frozen in its names, and one clear message for every mistake."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from secateur import pipeline
from secateur.cli import app
from secateur.errors import InputError

COMMANDS = [
    "analyze",
    "apply",
    "compare",
    "data",
    "evaluate",
    "export",
    "inspect",
    "methods",
    "plan",
    "prune",
    "verify",
]
PRUNE_OPTIONS = """--debug --device --dry-run --help --method --output --ratio --ratios --recipe --resume --runs-on
    --set --tokens --trust-remote-code --version --within -h -o""".split()


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def options(text: str) -> set[str]:
    """Every option that a help text lists."""
    words = (word.strip(",") for line in text.splitlines() if line.lstrip().startswith("-") for word in line.split())
    return {word for word in words if word.startswith("-")}


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['secateur', '--help']\n"
        "from secateur.cli import app\n"
        "try: app()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pydantic', 'peft'} & set(sys.modules)"
    )
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = os.times()
    # processor time, because another process may have the machine busy
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


def test_the_commands_and_the_options_of_prune_are_frozen() -> None:
    text = call("--help").stdout
    listed = [line.split()[0] for line in text.partition("Commands:")[2].splitlines() if line.startswith("  ")]
    assert sorted(name for name in listed if name.islower()) == COMMANDS
    assert options(text) | options(call("prune", "--help").stdout) == set(PRUNE_OPTIONS)


def test_commands_that_open_a_model_take_the_same_options_with_the_same_help() -> None:
    shared = ("--recipe FILE", "--device DEVICE", "--trust-remote-code", "--set SECTION.KEY=VALUE")
    commands = sorted({*COMMANDS} - {"data", "methods", "plan"})  # plan has the recipe of a run, and opens no weights
    lines: dict[str, set[str]] = {option: set() for option in shared}
    for command in commands:
        text = " ".join(call(command, "--help").stdout.split())
        for option in shared:
            assert option in text, f"{command} lacks {option}"
            lines[option].add(text.partition(f" {option} ")[2].partition(" -")[0])
    assert [len(lines[option]) for option in shared] == [1, 1, 1, 2], "compare's --set may name a method"


def test_version() -> None:
    result = call("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("secateur 0.")


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.2", "nan", "inf", "word", ""])
def test_a_wrong_ratio_is_one_message_before_anything_is_loaded(ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "secateur.config", None)  # importing it would fail
    result = call("prune", "-o", "out", "--ratio", ratio)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: --ratio {ratio} ")
    assert "strictly between 0 and 1" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("command", "of"), [("compare", "of all parameters"), ("analyze", "of each group")])
def test_the_ratios_of_other_commands_are_called_as_they_were_given(command: str, of: str, tmp_path: Path) -> None:
    methods = ["--methods", "wanda"] if command == "compare" else []
    result = call(command, "some/model", "-o", str(tmp_path / "out"), *methods, "--ratios", "1.5")
    assert result.stderr.startswith(f"Error: --ratios 1.5 is not allowed: it is the fraction {of} ")


@pytest.mark.parametrize(
    ("arguments", "answers"),
    [
        (["--method", "lorasheer"], ["Unknown method lorasheer", "did you mean lorashear?"]),
        (["--set", "budget.rato=0.3"], ["Unknown key budget.rato", "did you mean budget.ratio?"]),
        (["--set", "nonsense"], ["section.key=value"]),
        (["--recipe", "missing.yaml"], ["missing.yaml", "No such file"]),
        (["./no-such-folder"], ["no-such-folder", "folder"]),
        (["--device", "abacus"], ["abacus"]),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], answers: list[str], tmp_path: Path) -> None:
    result = call("prune", "-o", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert result.stderr.count("Error: ") == 1
    assert all(answer in result.stderr for answer in answers), result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    result = call("prune", "-o", str(tmp_path))
    assert result.exit_code == 1
    assert "not empty" in result.stderr
    (tmp_path / "file").write_text("")
    assert "is a file" in call("prune", "-o", str(tmp_path / "file")).stderr


@pytest.mark.parametrize("arguments", [["prune"], ["prnue"], ["prune", "-o", "x", "--ratoi", "0.2"], ["inspect"]])
def test_usage_errors_are_exit_code_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_prune_hands_every_flag_to_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(recipe: Any, output: Path, *, resume: bool, dry_run: bool) -> None:
        seen.update(recipe=recipe, output=output, resume=resume, dry_run=dry_run)
        raise InputError("far enough")

    monkeypatch.setattr(pipeline, "run", run)
    out = tmp_path / "out"
    flags = "--ratio 0.3 --method wanda --set budget.floor=0.2 --set seed=5 --runs-on vllm --device cpu".split()
    result = call("prune", "some/model", "-o", str(out), *flags, "--trust-remote-code", "--resume", "--dry-run")
    assert "far enough" in result.stderr
    recipe = seen.pop("recipe")
    assert seen == {"output": out, "resume": True, "dry_run": True}
    assert (recipe.model.name, recipe.model.device, recipe.model.trust_remote_code) == ("some/model", "cpu", True)
    assert (recipe.budget.ratio, recipe.budget.floor, recipe.budget.runs_on) == (0.3, 0.2, "vllm")
    assert (recipe.method.name, recipe.seed) == ("wanda", 5)


def test_an_interruption_says_what_is_kept_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", run)
    result = call("prune", "-o", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_bug_is_one_message_and_a_traceback_only_with_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.delenv("SECATEUR_DEBUG", raising=False)
    result = call("prune", "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "unexpected ZeroDivisionError: by nothing" in result.stderr
    assert "--debug" in result.stderr
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        call("prune", "-o", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "The disk is full"),
        (OSError(errno.EFBIG, "File too large"), "The disk is full"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 63040 vs 62932"), "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (MemoryError(), "Not enough memory"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_not_called_a_bug(
    error: Exception, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.delenv("SECATEUR_DEBUG", raising=False)
    result = call("prune", "-o", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert advice in result.stderr
    assert "bug" not in result.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "secateur", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_numbers_that_cannot_be_written_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.cli import _write_whole

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _write_whole(tmp_path / "numbers.json", "1")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"No space left on device\. The numbers are: 42"):
        _write_whole(tmp_path / "numbers.json", "42")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["1"]


def test_methods_lists_every_method_with_its_paper() -> None:
    from secateur.methods import METHODS

    text = call("methods").stdout
    for name, method in METHODS.items():
        assert name in text
        assert method.paper in text
        assert method.summary in text


def test_data_lists_every_source_with_its_licence() -> None:
    from secateur.data import SOURCES

    text = call("data").stdout
    assert all(source.name in text and source.licence in text for source in SOURCES.values())


ODD = "[/INST] [bold]cut[/bold] :smile: out[v1]"


def test_brackets_in_names_and_in_what_models_write_are_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur import progress
    from secateur.cli import _console
    from secateur.export import Comparison
    from secateur.tables import results

    _console().print(results(Comparison(columns=[ODD], rows=[(ODD, ["1"])], caption=ODD)))
    assert capsys.readouterr().out.count(ODD) == 3
    monkeypatch.setattr(progress, "_console", None)
    progress.show()
    progress.say(ODD)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress.Bar(ODD, 1) as bar:
            bar.advance(note="[/x]")
    assert capsys.readouterr().err.count(ODD) >= 3
