"""Zero-shot tasks by EleutherAI's lm-evaluation-harness, which is an optional extra."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import DataError, InputError
from secateur.reading import path_of, read_text

_BOOTSTRAP = 100
"""Samples for standard errors that have no formula (perplexity, F1, BLEU). They are accurate to about 7 %."""
_TASK_NAME = re.compile(r"^task:\s*['\"]?([\w.-]+)['\"]?\s*$", re.MULTILINE)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Scores of the model on tasks.

    Args:
        names: tasks of the harness (most download their data from the hub), task files in its YAML format, or folders
            of them, of which every task is run. Task files can name local data, and need no network then. A group of
            the harness with its own score (``mmlu``) counts as one task; name its members for their scores.
        limit: number of items of each task to use, from the first.
        batch_size: sequences per forward pass.

    Returns:
        Task → metric → value, with standard errors under ``<metric>_stderr``.

    Raises:
        InputError: the extra is not installed, or a task or folder does not exist.
        DataError: there is no tokenizer, or a task's data cannot be read.
    """
    _require_harness()
    if tokenizer is None:
        raise DataError("The model has no tokenizer, which tasks need. Add its files to the folder.")
    if not names or (limit is not None and limit < 1):
        raise InputError(
            f"Give at least one task and a limit of at least 1; got tasks {list(names)} and limit {limit}."
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, tasks = _resolve(tuple(names))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        with _one_process():
            found = simple_evaluate(
                harness, tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=_BOOTSTRAP
            )
    except (OSError, ValueError) as error:  # what datasets raises for data that cannot be fetched or read
        raise DataError(f"The data of {', '.join(tasks)} cannot be read: {error}") from error
    except IndexError as error:
        rows = _rows(model)
        if len(tokenizer) <= rows:
            raise
        raise DataError(
            f"The tokenizer has {len(tokenizer)} tokens, and the model's embedding {rows} rows: {', '.join(tasks)} "
            "contain tokens that the model does not know. Use the tokenizer that the model was trained with."
        ) from error
    inside = _inside_groups(found) - set(tasks)
    scores = {task: _numbers(values) for task, values in found["results"].items() if task not in inside}
    members = found.get("group_subtasks", {})
    return {task: values for task, values in scores.items() if values or not members.get(task)}


def _rows(model: PreTrainedModel) -> int:
    return int(cast(Any, model).get_input_embeddings().weight.shape[0])


@contextmanager
def _one_process() -> Iterator[None]:
    """Let the harness draw its samples in this process, with a note on stderr, instead of in forks that copy the
    model."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _inside_groups(found: Mapping[str, Any]) -> set[str]:
    """All tasks below a group for which the harness gives one score."""
    members = found.get("group_subtasks", {})
    waiting = [name for group in found.get("groups", {}) for name in members.get(group, ())]
    inside: set[str] = set()
    while waiting:
        inside.add(name := waiting.pop())
        waiting += members.get(name, ())
    return inside


def check_tasks(names: Sequence[str]) -> None:
    """Raise InputError unless lm-eval is installed and every name is a known task. Reads no data."""
    if names:
        _require_harness()
        _resolve(tuple(names))


def chance_levels(names: Sequence[str]) -> dict[str, float]:
    """Task → accuracy of guessing: the mean of 1 / choices over its items; tasks without choices are left out.

    That of a group is the mean over its tasks, weighted as its score is. Raises as ``evaluate_tasks`` does.
    """
    _require_harness()
    from lm_eval.tasks import get_task_dict

    manager, tasks = _resolve(tuple(names))
    levels: dict[str, float] = {}
    try:
        _guess(get_task_dict(list(tasks), manager), levels)
    except (OSError, ValueError) as error:
        raise DataError(f"The data of {', '.join(tasks)} cannot be read: {error}") from error
    return levels


def _guess(tree: Mapping[Any, Any], levels: dict[str, float]) -> list[tuple[Any, float, int]]:
    """Fill ``levels`` for all tasks and groups of the harness's ``tree``, where a group is the key of its members;
    return every task below with its level (0 without choices) and its number of items."""
    found = []
    for key, node in tree.items():
        if isinstance(node, Mapping):
            below = _guess(node, levels)
            scored = (key.config or {}).get("aggregate_metric_list")
            if scored:  # its accuracy, where it has one, comes first
                counted = [(level, size) for task, level, size in below if scored[0]["metric"] in task.aggregation()]
                weights = [size if scored[0]["weight_by_size"] else 1 for _, size in counted]
                total = sum(weight * level for weight, (level, _) in zip(weights, counted, strict=True))
                levels[key.group] = total / max(sum(weights), 1)
        else:
            documents = list(node.eval_docs)
            if node.OUTPUT_TYPE == "multiple_choice":
                levels[key] = sum(1 / len(node.doc_to_choice(item)) for item in documents) / len(documents)
            below = [(node, levels.get(key, 0.0), len(documents))]
        found += below
    return found


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("Tasks need lm-eval, which is not installed. Install it with: pip install 'secateur[tasks]'")


@lru_cache
def _resolve(names: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """The harness's task manager, and the tasks of ``names``. Raises InputError for a task that does not exist.

    The manager is kept for the process, because reading the thousands of task files of the harness takes up to minutes.
    They are not read when all tasks are in the user's own files.
    """
    from lm_eval.tasks import TaskManager

    paths = {name: path_of(name, "The task") for name in names}
    own = {name: path for name, path in paths.items() if path.exists()}
    folders = sorted({str(path if path.is_dir() else path.parent) for path in own.values()})
    tasks = [task for name in names for task in (tasks_in(own[name]) if name in own else [name])]
    manager = TaskManager(include_path=folders or None, include_defaults=len(own) < len(names))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"There is no task, task file or folder {', '.join(unknown)}. `lm-eval ls tasks` lists the known ones."
        )
    return manager, tuple(tasks)


def tasks_in(path: Path) -> list[str]:
    """Sorted names of the tasks in a YAML file or in those of a folder. Raises InputError when there are none."""
    path = path.expanduser()
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if files == [path] and path.suffix != ".yaml":
        raise InputError(f"{path} has the ending {path.suffix or '(none)'}; task files end in .yaml.")
    try:
        names = sorted({name for file in files for name in _TASK_NAME.findall(read_text(file))})
    except InputError as error:
        raise InputError(f"The task files of {path} cannot be read: {error}") from error
    if not names:
        what = "has no task files (*.yaml" if path.is_dir() else "is no task file (YAML"
        raise InputError(f"{path} {what} with a line `task: NAME`).")
    return names


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The harness's ``acc,none`` and ``acc_stderr,none`` without the name of the filter; numbers only."""
    return {
        key.split(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
