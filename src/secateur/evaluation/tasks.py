"""Zero-shot tasks by EleutherAI's lm-evaluation-harness, which is an optional extra."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import DataError, InputError

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
        names: tasks of the harness (most fetch their data from the hub), or folders of task files in its YAML format,
            of which every task is run; those can name local data and need no network.
        limit: only the first so many items of each task.
        batch_size: sequences per forward pass.

    Returns:
        Task → metric → value, with standard errors under ``<metric>_stderr``.

    Raises:
        InputError: the extra is not installed, or a task or folder does not exist.
        DataError: there is no tokenizer, or a task's data cannot be read.
    """
    _require_harness()
    if tokenizer is None:
        raise DataError("The model has no tokenizer, so it cannot be given tasks. Put its files into the folder.")
    if not names or (limit is not None and limit < 1):
        raise InputError(
            f"Give at least one task and a limit of at least 1; got tasks {list(names)} and limit {limit}."
        )
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager, tasks = _resolve(names)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        # errors of means have a formula; the harness leaves them out when it is told to draw no samples for others
        found = simple_evaluate(harness, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=1)
    except (OSError, ValueError) as error:  # what datasets raises for data that cannot be fetched or read
        raise DataError(f"The data of {', '.join(tasks)} cannot be read: {error}") from error
    return {task: _numbers(values) for task, values in found["results"].items()}


def chance_levels(names: Sequence[str]) -> dict[str, float]:
    """Task → accuracy of guessing: the mean of 1 / choices over its items; tasks without choices are left out.

    Raises as ``evaluate_tasks`` does.
    """
    _require_harness()
    from lm_eval.tasks import get_task_dict

    manager, tasks = _resolve(names)
    try:
        found = {name: task for name, task in get_task_dict(tasks, manager).items() if isinstance(name, str)}
        levels = {}
        for name, task in found.items():
            if getattr(task, "OUTPUT_TYPE", "") == "multiple_choice":
                documents = list(task.eval_docs)
                levels[name] = sum(1 / len(task.doc_to_choice(item)) for item in documents) / len(documents)
        return levels
    except (OSError, ValueError) as error:
        raise DataError(f"The data of {', '.join(tasks)} cannot be read: {error}") from error


def _require_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("Tasks need lm-eval, which is not installed. Install it with: pip install 'secateur[tasks]'")


def _resolve(names: Sequence[str]) -> tuple[Any, list[str]]:
    """The harness's task manager, and the tasks that ``names`` stand for; InputError for one that does not exist."""
    from lm_eval.tasks import TaskManager

    folders = [name for name in names if Path(name).expanduser().is_dir()]
    manager = TaskManager(include_path=[str(Path(folder).expanduser()) for folder in folders] or None)
    tasks = [task for name in names for task in (tasks_in(Path(name)) if name in folders else [name])]
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"There is no task or folder {', '.join(unknown)}. `lm-eval ls tasks` lists the known ones.")
    return manager, tasks


def tasks_in(folder: Path) -> list[str]:
    """Names of the tasks that the YAML files of a folder define, sorted; raises InputError when there are none."""
    files = sorted(folder.expanduser().glob("*.y*ml"))
    names = sorted({name for file in files for name in _TASK_NAME.findall(file.read_text(encoding="utf-8"))})
    if not names:
        raise InputError(f"{folder} has no task files (*.yaml with a line `task: NAME`).")
    return names


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The harness's ``acc,none`` and ``acc_stderr,none`` without the name of the filter, and only what is a number."""
    return {
        key.split(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
