"""EvoPress (arXiv 2410.14649): the widths of all groups are searched, and each candidate is judged as a whole model."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur import progress
from secateur.compensation import Database, check_removable
from secateur.errors import InputError, ModelError
from secateur.evaluation import Divergence
from secateur.keeping import keep, take
from secateur.methods.base import Decision, Method, MethodNeeds, PruningTask, TextRead
from secateur.methods.saliency import Saliency, SaliencyWeights
from secateur.planning import Levels, Problem, Switches, solve
from secateur.surgery import masked, updated
from secateur.types import Cut, Removed, Settings
from secateur.walk import Calibration, borrowed, calibration_for

_Counts = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class EvoPressSettings(Settings):
    """The criteria that order the units of each group, and the size of the search."""

    saliency: SaliencyWeights = Field(default={"fisher": 1.0})
    """Criteria with their weights, as in lorashear. They determine which units of a group go first, and one of the two
    allocations to start from."""
    generations: int = Field(default=30, ge=1)
    """Number of generations. EvoPress has 400 for widths."""
    children: _Counts = (8, 2)
    """Candidates in each stage of a generation, not increasing: the best of a stage go on to the next. EvoPress has 64,
    8 and 2."""
    windows: _Counts = (1, 4)
    """Calibration windows that the candidates of each stage read, not decreasing, at most all there are. Each
    generation reads the next ones, and after the last the first again."""
    switches: int = Field(default=3, ge=1)
    """Most switches between parent and child; the number is min(U{1..n}, U{1..n})."""
    level: float = Field(default=0.0625, gt=0, le=1)
    """Share of a group's units that a switch moves, at least one unit."""
    compensated: bool = False
    """Whether candidates are judged with compensated weights, from a database that one run of optimal brain surgery
    makes first. It determines the order of the units too, in place of ``saliency``."""

    @model_validator(mode="after")
    def _stages(self) -> EvoPressSettings:
        children, windows = list(self.children), list(self.windows)
        if len(children) != len(windows):
            raise ValueError(
                f"children and windows need one number for each stage; got {len(children)} and {len(windows)} numbers"
            )
        if children != sorted(children, reverse=True) or windows != sorted(windows):
            raise ValueError(
                f"from stage to stage there are fewer candidates and more windows; got children={children}, "
                f"windows={windows}"
            )
        return self


class EvoPress(Method):
    """Searches how many units each group loses: switches between groups, judged by the KL to the dense model.

    ::

        budget: {ratio: 0.5}
        method: {name: evopress, generations: 30, children: [8, 2], windows: [1, 4]}
    """

    name: ClassVar[str] = "evopress"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.14649"
    summary: ClassVar[str] = (
        "evolutionary search of the widths, each candidate judged whole by its KL to the dense model"
    )
    needs: ClassVar[MethodNeeds] = "text"
    Settings: ClassVar[type[Settings]] = EvoPressSettings
    settings: EvoPressSettings

    @property
    def reading(self) -> TextRead:
        """See ``Method.reading``: scores, all candidates, and at the end the dense model and two candidates on all
        text."""
        settings, start = self.settings, Saliency(self.settings.saliency).reading
        last = settings.windows[-1]
        children = sum(many * each for many, each in zip(settings.children, settings.windows, strict=True))
        windows = settings.generations * (children + last) + 2 * last
        return replace(start, forward=start.forward + 3 + settings.compensated, forward_windows=windows)

    def run(self, task: PruningTask) -> Decision:
        """See ``Method.run``."""
        self.check(task)
        settings, text = self.settings, calibration_for(task.calibration, self.name)
        lineage, scores = Lineage(task.work), Saliency(settings.saliency).first_scores(task)
        problem = Problem.of(task.restricted, scores, task.budget)
        switches, database = Switches(problem, _starts(problem), settings.level), None
        if settings.compensated:
            database = _database(task, switches, text)
            switches = switches.ordered(database.orders)
        if len(switches.lots) == 1:
            progress.say("  This budget cuts one group, and there is nothing to search.")
        with borrowed(task.model), progress.Bar("searching", settings.generations) as bar:
            judge = _Judge(task, text, switches, database)
            state = lineage.state or _first(switches, judge, text.turn_rows(0, settings.windows[-1]))
            bar.advance(state.done)
            for number in range(state.done, settings.generations):
                state = self._generation(state, switches, judge, text, random.Random(f"{task.seed}/{number}"))
                lineage.keep(state)
                bar.advance(note=f"KL {state.kl:.3f}")
            winner, facts = _elected(state, judge, range(len(text)))
        facts = {"generations": settings.generations, "improved": state.improved, **facts}
        return Decision(switches.removed(winner), scores, metrics=facts)

    def _generation(
        self, state: State, switches: Switches, judge: _Judge, text: Calibration, draw: random.Random
    ) -> State:
        """The next parent: the best child, or the parent if none is better on the text of the last stage."""
        settings, parent = self.settings, state.parent
        rows = text.turn_rows(state.done, settings.windows[-1])
        drawn = [switches.child(parent, draw, settings.switches) for _ in range(settings.children[0])]
        left = [child for child in dict.fromkeys(drawn) if child != parent]
        found: list[tuple[float, Levels]] = []
        for many, windows in zip(settings.children, settings.windows, strict=True):
            found = judge.ranked(left[:many], rows[:windows])
            left = [child for _, child in found]
        own = judge.kl(parent, rows) if left else state.kl
        better = bool(found) and found[0][0] < own
        kl, parent = found[0] if better else (own, parent)
        tokens = state.tokens + judge.spent()
        update = {"done": state.done + 1, "parent": parent, "kl": kl, "tokens": tokens}
        return state.model_copy(update={**update, "improved": state.improved + better})

    def check(self, task: PruningTask) -> None:
        """See ``Method.check``: the criteria can read every group, and read no adapters."""
        super().check(task)
        if "vocab" in task.budget.kinds:
            raise InputError(
                f"{self.name} compares predictions of the dense model's tokens, and budget.kinds allows to remove "
                "tokens. Leave vocab out of budget.kinds, or choose a method such as magnitude."
            )
        Saliency(self.settings.saliency).check_plain(task, self.name)
        if self.settings.compensated:
            check_removable(task.model, task.restricted, [group.name for group in task.prunable], _COMPENSATED)


def _database(task: PruningTask, switches: Switches, text: Calibration) -> Database:
    """Compensated weights for every number of units that a candidate may lose; kept on disk when there is a folder."""
    folder = None if task.work is None else task.work / "database"
    database = Database(task.model, task.restricted, switches.deepest, folder)
    database.build(text, _COMPENSATED)
    return database


def _starts(problem: Problem) -> list[Removed]:
    """The ranked allocation, and the even one where widths may differ."""
    ranked = solve(problem)
    if problem.budget.equal_widths:
        return [ranked]
    even = problem.budget.model_copy(update={"floor": 1.0})
    return [ranked, solve(replace(problem, budget=even))]


class State(BaseModel):
    """The result of a generation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parent: Levels
    done: int = 0
    """Generations."""
    improved: int = 0
    """Generations that found a better parent."""
    tokens: int = 0
    """Tokens that candidates have read."""
    first: Levels
    """The first parent."""
    kl: float
    """KL of the parent, on the windows of its generation."""


def _first(switches: Switches, judge: _Judge, rows: Sequence[int]) -> State:
    """The better one of the starts. Raises ModelError when their KL is not finite."""
    kl, parent = judge.ranked(switches.starts, rows)[0]
    if not math.isfinite(kl):
        raise ModelError(
            "The model with the first candidate's units removed computes NaN or infinity on the calibration text, and "
            "candidates cannot be compared. Set calibration.precision=fp32. If that does not help, its weights are "
            "damaged."
        )
    return State(parent=parent, first=parent, tokens=judge.spent(), kl=kl)


def _elected(state: State, judge: _Judge, rows: Sequence[int]) -> tuple[Levels, dict[str, float]]:
    """The last parent, or the first one unless the last is better on all text; with the facts."""
    before = judge.kl(state.first, rows)
    after = judge.kl(state.parent, rows) if state.parent != state.first else before
    facts = {"kl_before": before, "kl_after": min(after, before), "search_tokens": state.tokens + judge.spent()}
    return (state.parent if after < before else state.first), facts


class _Judge:
    """Measures candidates: masks in the model, with the weights of the database if there is one."""

    def __init__(self, task: PruningTask, text: Calibration, switches: Switches, database: Database | None) -> None:
        self._database = database
        self._model, self._graph, self._switches = task.model, task.graph, switches
        self._divergence, self._window = Divergence(text), text.ids.shape[1]
        self._tokens = 0

    def kl(self, levels: Levels, rows: Sequence[int]) -> float:
        """KL(dense || candidate) on the windows ``rows``."""
        self._divergence.read(self._model, rows)
        self._tokens += len(rows) * self._window
        removed = self._switches.removed(levels)
        counts = {name: len(units) for name, units in removed.items()}
        weights = self._database.weights(counts) if self._database is not None else {}
        with updated(self._model, weights), masked(self._model, self._graph, Cut.removing(self._graph, removed)):
            return self._divergence.of(self._model, rows)

    def ranked(self, candidates: Iterable[Levels], rows: Sequence[int]) -> list[tuple[float, Levels]]:
        """The candidates with their KL, lowest first; of equal ones the earlier first."""
        return sorted(((self.kl(each, rows), each) for each in candidates), key=lambda found: found[0])

    def spent(self) -> int:
        """Tokens that were read since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens


class Lineage:
    """The state after each generation, kept on disk when there is a folder."""

    def __init__(self, folder: Path | None) -> None:
        self.file = None if folder is None else folder / "parent.json"
        self.state = take(self.file, lambda file: State.model_validate_json(file.read_bytes()))
        if self.state is not None:
            progress.say(f"  resuming after generation {self.state.done}")

    def keep(self, state: State) -> None:
        keep(self.file, lambda scratch: scratch.write_text(state.model_dump_json()))


_COMPENSATED = "method.compensated"
