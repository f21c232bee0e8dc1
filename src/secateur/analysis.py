"""The file of a knowledge distribution analysis: how much the model depends on each node group."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from secateur.digest import digest
from secateur.errors import PlanError
from secateur.progress import say
from secateur.reading import path_of, read_json, shortened
from secateur.types import DependencyGraph, Kind

_ADVICE = "Give the analysis.json that `secateur analyze` wrote."

Deviation = Literal["kl", "perplexity"]
"""Measure of the deviation of a pruned model: KL from the dense model's predictions, or change of perplexity."""


_ROUNDING = 1e-3
"""Tolerance for rounding: the KL of a cut that changes nothing may be this far below 0."""


class Trial(BaseModel):
    """One node group cut by one ratio; all others are whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    group: str
    kind: Kind
    layer: int | None = Field(ge=0)
    ratio: float = Field(gt=0, lt=1)
    """Fraction of the group's units, as asked."""
    units: int = Field(ge=2)
    """Units of the group."""
    removed: int = Field(ge=1)
    """Number of removed units: the nearest to ``ratio`` that the group can lose; at least one is removed and one is
    kept. Several ratios may give the same number, which is measured once."""
    loss: float = Field(ge=0)
    """Mean next-token loss, nats."""
    kl: float = Field(ge=-_ROUNDING)
    """Mean over the predicted tokens of KL(dense || cut), nats."""

    @model_validator(mode="after")
    def _one_unit_stays(self) -> Trial:
        if self.removed >= self.units:
            raise ValueError(f"removed is {self.removed} and units is {self.units}: at least one unit must be kept")
        return self


class Analysis(BaseModel):
    """Alg. 3 of LoRAShear (arXiv 2310.18356), measured: every prunable group alone, at each ratio."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    format: Literal[1] = 1
    base_model: str = ""
    revision: str | None = None
    fingerprint: str
    """``DependencyGraph.fingerprint`` of the model."""
    weights: str | None = None
    """``digest`` of the model's weights, which differs between a fine-tune and its base; None when not known."""
    recipe: str = ""
    """All settings of the analysis, as text. A finished analysis is reused only for the same settings."""
    criterion: str
    """Criterion that chose the units within a group."""
    text: list[str]
    tokens: int = Field(ge=1)
    """Tokens read, in windows of ``window``."""
    window: int = Field(ge=1)
    seed: int = 0
    dense_loss: float = Field(ge=0)
    """Mean next-token loss of the whole model, nats."""
    trials: list[Trial] = Field(min_length=1)
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _every_trial_once(self) -> Analysis:
        seen: dict[tuple[str, float], Trial] = {}
        for number, trial in enumerate(self.trials):
            other = seen.setdefault((trial.group, trial.ratio), trial)
            if other is not trial:
                raise ValueError(f"trials.{number} is of {trial.group} at {trial.ratio:g}, like an earlier one")
        return self

    def check(self, graph: DependencyGraph, file: Path) -> None:
        """Raise PlanError unless the analysis, read from ``file``, is of a model with this graph."""
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"The analysis {file} is of another model ({self.base_model or 'unnamed'}, fingerprint "
                f"{self.fingerprint}); this {graph.model_type} model has fingerprint {graph.fingerprint}. "
                "Analyse this one with `secateur analyze`."
            )
        groups = {group.name: (group.kind, group.layer, group.size) for group in graph}
        for number, trial in enumerate(self.trials):
            said = (trial.kind, trial.layer, trial.units)
            if said != groups.get(trial.group):
                raise PlanError(
                    f"{file} is not an analysis of this {graph.model_type} model: trials.{number} is of "
                    f"{trial.group} ({trial.kind}, layer {trial.layer}, {trial.units} units), which it does not have. "
                    f"{_ADVICE}"
                )

    def deviations(self, by: Deviation) -> dict[str, float]:
        """Group name → deviation, summed over the ratios (Alg. 3, line 4), most sensitive first.

        Each is scaled from the fraction that was removed to the one asked. Otherwise a group of few units (two KV
        heads, of which one is removed at 25 %) would be ranked by the rounding.
        """
        found: dict[str, float] = {}
        for trial in self.trials:
            asked = trial.ratio * trial.units / trial.removed
            found[trial.group] = found.get(trial.group, 0.0) + asked * self.deviation(trial, by)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def deviation(self, trial: Trial, by: Deviation) -> float:
        """``kl``: KL(dense || cut); ``perplexity``: |perplexity(cut) - perplexity(dense)|."""
        if by == "kl":
            return trial.kl
        return abs(_perplexity(trial.loss) - _perplexity(self.dense_loss))

    def sensitive(self, share: float, by: Deviation) -> list[str]:
        """The ``share`` of the analysed groups (rounded, at least one) with the largest deviation: G_unprunable of
        Alg. 3, line 7."""
        ranked = list(self.deviations(by))
        return ranked[: max(1, round(share * len(ranked)))]

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Analysis:
        """Read an analysis. Raises PlanError when the file is missing or invalid, with the place of the fault."""
        file = path_of(path, "The analysis", PlanError)
        try:
            return cls.model_validate(read_json(file, error=PlanError, advice=_ADVICE), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            reason = shortened(first["msg"].removeprefix("Value error, "), 300)
            raise PlanError(f"{file} is not an analysis: {where}: {reason}. {_ADVICE}") from error


def check_weights(model: nn.Module, file: Path) -> None:
    """Raise PlanError when the analysis in ``file`` is of a model with other weights. Shapes are not checked."""
    analysis = Analysis.load(file)
    if analysis.weights is None:
        say(f"{file} has no digest of its weights (an older analysis). Only shapes were compared.")
    elif analysis.weights != digest(model):
        raise PlanError(
            f"The analysis {file} is of {analysis.base_model or 'a model without a name'} with other weights, such as "
            "before a fine-tune, or in another type. Analyse this one with `secateur analyze`."
        )


def percent(fraction: float) -> str:
    """A fraction as text: ``25%``, ``99.99%`` (never rounded up to 100)."""
    return f"{100 * fraction:.10g}%"


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
