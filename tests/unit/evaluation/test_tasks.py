"""Tasks: what is said without the extra, and a local task through the real harness where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from secateur.errors import DataError, InputError
from secateur.evaluation.tasks import chance_levels, check_tasks, evaluate_tasks, tasks_in
from secateur.testing.tiny import build
from secateur.testing.tokenizer import tiny_tokenizer

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "items.jsonl"
    items = [{"question": f"{index} is", "choices": ["odd", "even"], "label": (index + 1) % 2} for index in range(10)]
    data.write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "parity.yaml").write_text(TASK.format(name="parity", data=data))
    (tmp_path / "parity_again.yaml").write_text(TASK.format(name="parity_again", data=data))
    return tmp_path


def test_a_folder_names_its_tasks(folder: Path, tmp_path: Path) -> None:
    assert tasks_in(folder) == ["parity", "parity_again"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no task files"):
        tasks_in(tmp_path / "empty")


def test_a_file_names_its_own_task_alone(folder: Path) -> None:
    assert tasks_in(folder / "parity_again.yaml") == ["parity_again"]
    with pytest.raises(InputError, match=r"end in \.yaml"):
        tasks_in(folder / "items.jsonl")
    (folder / "other.yaml").write_text("group: many\n")
    with pytest.raises(InputError, match="no task file"):
        tasks_in(folder / "other.yaml")
    (folder / "other.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        tasks_in(folder / "other.yaml")


def test_without_the_extra_there_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'secateur\[tasks\]'"):
        evaluate_tasks(build("llama-gqa"), tiny_tokenizer(), ["parity"])


needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install 'secateur[tasks]'"
)


@needs_harness
def test_local_tasks_run_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    model, tokenizer = build("llama-gqa"), tiny_tokenizer()
    scores = evaluate_tasks(model, tokenizer, [str(folder)], limit=6)
    assert set(scores) == {"parity", "parity_again"}
    assert scores["parity"] == scores["parity_again"]
    assert scores["parity"]["acc"] * 6 == pytest.approx(round(scores["parity"]["acc"] * 6))
    assert 0 <= scores["parity"]["acc"] <= 1
    accuracy = scores["parity"]["acc"]
    assert scores["parity"]["acc_stderr"] == pytest.approx((accuracy * (1 - accuracy) / 5) ** 0.5)


@needs_harness
def test_metrics_whose_error_has_no_formula_have_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    (folder / "last_word.yaml").write_text(  # as LAMBADA is in the harness
        f"""task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "items.jsonl"}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " even"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
    )
    scores = evaluate_tasks(build("llama-gqa"), tiny_tokenizer(), [str(folder / "last_word.yaml")], limit=6)
    assert 0 < scores["last_word"]["perplexity_stderr"] < scores["last_word"]["perplexity"]
    assert "acc_stderr" in scores["last_word"]
    assert "DISABLE_MULTIPROC" not in os.environ
    assert capsys.readouterr().out == ""


@needs_harness
def test_one_task_file_runs_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    file = str(folder / "parity.yaml")
    check_tasks([file])
    assert set(evaluate_tasks(build("llama-gqa"), tiny_tokenizer(), [file], limit=2)) == {"parity"}


@needs_harness
def test_guessing_is_one_over_the_number_of_choices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    assert chance_levels([str(folder)]) == {"parity": 0.5, "parity_again": 0.5}


@needs_harness
@pytest.mark.parametrize(("by_size", "chance"), [(True, (10 * 0.5 + 30 * 0.25) / 40), (False, 0.375)])
def test_a_group_is_one_task_that_guessing_gets_as_much_of_as_of_its_members(
    folder: Path, by_size: bool, chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    items = [{"question": f"{index} is", "choices": ["odd", "even", "big", "small"], "label": 0} for index in range(30)]
    (folder / "four.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "four.yaml").write_text(TASK.format(name="four", data=folder / "four.jsonl"))
    (folder / "bundle.yaml").write_text("group: bundle\ntask: [four]\n")
    score = f"aggregate_metric_list: [{{metric: acc, weight_by_size: {str(by_size).lower()}}}]"
    (folder / "both.yaml").write_text(f"group: both\ntask: [parity, bundle]\n{score}\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)  # as for a group that the harness brings
    monkeypatch.setattr("secateur.evaluation.tasks._resolve", lambda names: (manager, names))

    assert chance_levels(["both"])["both"] == pytest.approx(chance)
    model = build("llama-gqa")
    assert set(evaluate_tasks(model, tiny_tokenizer(), ["both"], limit=2)) == {"both"}
    assert set(evaluate_tasks(model, tiny_tokenizer(), ["bundle"], limit=2)) == {"four"}  # it has no score of its own
    assert chance_levels(["bundle"]) == {"four": 0.25}


@needs_harness
def test_faults_are_named(folder: Path) -> None:
    model = build("llama-gqa")
    with pytest.raises(InputError, match="no task, task file or folder parityy"):
        evaluate_tasks(model, tiny_tokenizer(), ["parityy"])
    with pytest.raises(InputError, match="at least one task"):
        evaluate_tasks(model, tiny_tokenizer(), [])
    with pytest.raises(InputError, match="limit"):
        evaluate_tasks(model, tiny_tokenizer(), [str(folder)], limit=0)
    with pytest.raises(DataError, match="no tokenizer"):
        evaluate_tasks(model, None, [str(folder)])
    (folder / "items.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        evaluate_tasks(model, tiny_tokenizer(), [str(folder)])
