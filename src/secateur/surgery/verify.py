"""Verifies that cutting a group equals masking it, in two independent ways.

The model's own forward on sliced parameters is compared with the masked model. This finds members that are missing,
misaligned or superfluous, and attributes with old values. The recorded operators, replayed on sliced parameters, are
compared with a masked replay. This finds the same faults of the graph, independently of the model's code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from secateur.errors import InputError, ModelError
from secateur.finite import all_finite, first_not_finite
from secateur.graph import Trace, record
from secateur.graph.replay import NotReplayable, replay
from secateur.progress import track
from secateur.reading import brief
from secateur.surgery.configs import changed_configs
from secateur.surgery.mask import masked
from secateur.surgery.slice import sharing_copy, slice_model
from secateur.surgery.stand_in import signature, stand_in
from secateur.surgery.tokens import kept_tokens, new_ids
from secateur.surgery.ways import LENGTH, Way, filling_a_cache, other_ways, plain
from secateur.types import DependencyGraph, Kind, NodeGroup

TOLERANCE = 1e-4
"""Largest difference of logits in fp32, relative to the largest logit (at least 1)."""
_ROUNDING = 1e-2
"""Differences up to this may be rounding errors that have grown. They are computed again in double precision."""
WHOLE_UP_TO = 300_000_000
"""Larger models are replaced by a stand-in with few layers and random weights, in parameters."""
ALL, SOME = "all groups", "some groups"


@dataclass(frozen=True)
class Check:
    """The result for one group, for ``all groups`` or for ``some groups``."""

    group: str
    ok: bool
    max_difference: float
    """Largest absolute difference of logits between the sliced and the masked model; inf when one did not run."""
    effect: float
    """Largest absolute change of logits by the mask. A check without a visible effect proves nothing, and is not ok."""
    message: str


def verify_cuts(model: PreTrainedModel | PeftModel, *, seed: int = 0, ratio: float = 0.5) -> list[Check]:
    """Compare slicing with masking: each group that may be cut alone, all together, and a random subset.

    Args:
        seed: seed of the token ids, the removed units, and the weights of a stand-in.
        ratio: fraction of each group's units to remove (at least one is removed and one is kept).

    The given model is not changed: a copy in fp32 is cut. A model with more than ``WHOLE_UP_TO`` parameters, or without
    weights, is replaced by one of the same configuration with fewer layers (the messages say so). Raises ModelError
    when the model cannot be traced, or no stand-in can be built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size <= WHOLE_UP_TO and not any(parameter.is_meta for parameter in model.parameters()):
            return checks(copy.deepcopy(model).float().eval(), ratio)
        small = stand_in(model, record(model).graph)
        note = f" on random weights and {small.config.get_text_config().num_hidden_layers} layers"
        return [replace(check, message=check.message + note) for check in checks(small, ratio)]


def checked_trace(model: PreTrainedModel | PeftModel, kinds: Iterable[Kind] = ()) -> DependencyGraph:
    """``graph.trace``, in which groups that fail the check of an exact cut are protected. Users and runs start from it.

    Groups of ``kinds`` that are protected only for their kind (experts, layers, hidden, vocabulary, states) are checked
    too, and may be cut when they pass.

    Raises ModelError as ``graph.trace`` and ``protect_failing`` do, and InputError for an object that is no module or
    no kind.
    """
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"A {type(model).__name__} is not a model. Open it first: model, _ = secateur.load(name).")
    wanted: list[Any] = list(kinds) if isinstance(kinds, Iterable) and not isinstance(kinds, str) else [kinds]
    if any(kind not in get_args(Kind) for kind in wanted):
        raise InputError(f"{brief(kinds)} are no kinds of groups. Give a list of: {', '.join(get_args(Kind))}.")
    return protect_failing(model, record(model).graph.opened(wanted))


def protect_failing(
    model: PreTrainedModel | PeftModel, graph: DependencyGraph, *, seed: int = 0, ratio: float = 0.5
) -> DependencyGraph:
    """``graph``, in which every group is protected, with the reason, whose counterparts fail in a stand-in.

    ``model`` is not changed, and needs no weights. When no stand-in can be built, a model of up to ``WHOLE_UP_TO``
    parameters is checked whole. Raises ModelError for a larger one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            small: Any = stand_in(model, graph)
        except ModelError:
            if sum(parameter.numel() for parameter in model.parameters()) > WHOLE_UP_TO:
                raise
            small = copy.deepcopy(model).float().eval()
        run = _opened(record(small), graph)
        failed = _failing(small, run, ratio)
    reasons = {signature(group): failed[group.name] for group in run.graph if group.name in failed}
    groups = tuple(
        replace(group, protected=f"cutting it failed a check: {reasons[signature(group)]}", on_request=False)
        if group.protected is None and signature(group) in reasons
        else group
        for group in graph
    )
    return replace(graph, groups=groups)


def _opened(run: Trace, graph: DependencyGraph) -> Trace:
    """``run`` with those kinds open to be cut that are open in ``graph`` by request."""
    kinds = {group.kind for group in graph.prunable if group.on_request}
    return replace(run, graph=run.graph.opened(kinds))


def _failing(model: Any, run: Trace, ratio: float) -> dict[str, str]:
    """Groups that must not be cut, with the reason: those that fail alone, or all of a kind that fails together.

    The remaining groups were checked together: every prunable group has passed a check.
    """
    found = {check.group: check.message for check in checks(model, ratio, run) if not check.ok}
    failed = {name: message for name, message in found.items() if name not in (ALL, SOME)}
    if not found:
        return failed
    rest = _without(run, failed)
    if failed and not (found := _together(model, rest, ratio)):
        return failed
    for kind in sorted({group.kind for group in rest.graph.prunable}):
        names = [group.name for group in rest.graph.prunable if group.kind == kind]
        others = {group.name: "" for group in rest.graph.prunable if group.kind != kind}
        for message in _together(model, _without(rest, others), ratio).values():
            failed |= dict.fromkeys(names, f"together: {message}")
    rest = _without(rest, failed)
    for message in _together(model, rest, ratio).values():
        failed |= {group.name: f"together: {message}" for group in rest.graph.prunable}
    return failed


def _without(run: Trace, protected: Mapping[str, str]) -> Trace:
    groups = (replace(group, protected="") if group.name in protected else group for group in run.graph)
    return replace(run, graph=replace(run.graph, groups=tuple(groups)))


def _together(model: Any, run: Trace, ratio: float) -> dict[str, str]:
    """Messages of the checks of several groups at once that fail."""
    return {check.group: check.message for check in checks(model, ratio, run, alone=False) if not check.ok}


def checks(model: Any, ratio: float, run: Trace | None = None, *, alone: bool = True) -> list[Check]:
    """What ``verify`` does with a small fp32 model in eval mode, by torch's present random state.

    ``run`` is a record of ``model``; of its graph only the groups that may be cut are tried, each ``alone`` as well.
    """
    run = record(model) if run is None else run
    choices = {name: kept for name, kept in _choices(model, run.graph, ratio).items() if alone or name in (ALL, SOME)}
    if not choices:
        return []
    ids = _ids(model)
    dense = _dense(model, ids)
    asked = _Asked(
        filling_a_cache if _fills_a_cache(model, ids, dense) else plain, other_ways(partial(sharing_copy, model), ids)
    )
    everything = ALL if ALL in choices else next(iter(choices))
    return [
        _check(model, run, name, kept, ids, dense, asked if name == everything else replace(asked, others={}))
        for name, kept in track(choices.items(), "verify", total=len(choices))
    ]


@dataclass(frozen=True)
class _Asked:
    """How a cut model is asked: all that it answers, it answers like the masked one."""

    first: Way
    """``plain``, or making a cache where the whole model does: its size may be written in the config."""
    others: Mapping[str, Way]


def _ids(model: Any) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (2, LENGTH), device=next(model.parameters()).device)


def _dense(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the whole model; raises ModelError where they say nothing about a cut."""
    try:
        logits = plain(sharing_copy(model), ids)
    except Exception as error:
        reason = _first_line(error)
        raise ModelError(
            f"This {type(model).__name__} does not run on {ids.shape[1]} tokens ({type(error).__name__}: {reason}), "
            "and no cut can be checked."
        ) from error
    if not all_finite(logits):
        raise ModelError(
            f"This {type(model).__name__} computes NaN or infinity before anything is cut, first in "
            f"{first_not_finite(sharing_copy(model), ids)}. Correct or train the model first."
        )
    return logits


def _choices(model: Any, graph: DependencyGraph, ratio: float) -> dict[str, dict[str, list[int]]]:
    """Name of a check → units to keep."""
    kept = {}
    for group in graph.prunable:
        goes = min(max(1, round(ratio * group.size)), group.size - 1)
        units = legal_units(group, group.size - goes)
        if group.modules:
            units = _layers_in_a_pattern(model, graph, group, units)
        if len(units) < group.size:
            kept[group.name] = units
    choices = {name: {name: units} for name, units in kept.items()}
    together = _compatible(graph, kept)
    if len(together) > 1:
        choices[ALL] = {name: kept[name] for name in together}
        some = [name for name in together if torch.rand(()) < 0.5] or together[:1]
        # every group its own number of units, as in a globally ranked plan
        stay = {name: int(torch.randint(1, len(kept[name]) + 1, ())) for name in some}
        choices[SOME] = {
            name: kept[name] if graph[name].modules else legal_units(graph[name], count) for name, count in stay.items()
        }
    return choices


def _layers_in_a_pattern(model: Any, graph: DependencyGraph, group: NodeGroup, units: list[int]) -> list[int]:
    """``units``, or the first layers that the config can describe if it cannot describe ``units``.

    Families that compute from a layer's index what the layer is can lose whole periods of the pattern only; that some
    choice breaks it says nothing against the others, which are refused one by one when they are cut.
    """
    first = [list(range(stay)) for stay in range(group.size - 1, group.least - 1, -1)]
    fixed = {unit for unit, _ in group.fixed}
    for kept in (units, *(some for some in first if fixed <= set(some))):
        try:
            changed_configs(model, graph, {group.name: kept})
        except ModelError:
            continue
        return kept
    return units


def _compatible(graph: DependencyGraph, names: Iterable[str]) -> list[str]:
    """Those of ``names`` that one plan may cut: of two groups one within the other, the inner, which was asked for."""
    around = {graph[name].within for name in names}
    return [name for name in names if name not in around]


def legal_units(group: NodeGroup, stay: int) -> list[int]:
    """Random units of ``group`` that a plan may keep: ``stay`` of them, or the next larger number that is legal.

    Never the leading units alone: numbers that a model draws or stores by position would stay with their units.
    """
    length = group.size // group.runs
    in_each = -(-max(stay, group.least) // group.runs)
    fixed = {unit for unit, _ in group.fixed}
    units: list[int] = []
    for run in range(group.runs):
        must = [unit for unit in range(run * length, (run + 1) * length) if unit in fixed]
        rest = [unit for unit in range(run * length, (run + 1) * length) if unit not in fixed]
        order, count = torch.randperm(len(rest)).tolist(), max(0, in_each - len(must))
        if 0 < count < len(rest) and set(order[:count]) == set(range(count)):
            order = [*order[1:], order[0]]
        units += must + [rest[place] for place in order[:count]]
    return sorted(units)


def _check(
    model: Any,
    run: Trace,
    name: str,
    kept: Mapping[str, list[int]],
    ids: torch.Tensor,
    dense: torch.Tensor,
    asked: _Asked,
) -> Check:
    graph, way = run.graph, ""
    try:
        tokens = kept_tokens(graph, kept)
        if tokens is not None:  # only those that stay can be read, and compared
            ids = tokens[ids % len(tokens)]
            dense = _dense(model, ids)[..., tokens]
        allowed = TOLERANCE * max(1.0, _largest(dense))
        difference, expected = _difference(model, graph, kept, ids, tokens, asked.first, allowed)
        effect = _largest(expected - dense)
        # once over for the graph as a whole: replaying every group would take several times as long as the rest
        replayed = _replayed(model, run, kept, allowed) if name in (ALL, SOME) else 0.0
        others = {}
        for way, ask in asked.others.items():
            others[way], _ = _difference(model, graph, kept, ids, tokens, ask, allowed)
    except Exception as error:  # whatever the code of a family raises when sizes do not fit
        reason = _first_line(error)
        return Check(name, False, float("inf"), 0.0, f"{type(error).__name__}{f' on {way}' if way else ''}: {reason}")
    worst = max(difference, replayed, *others.values())
    # every comparison with NaN is false, therefore each condition states the good case
    if not difference <= allowed:
        return Check(name, False, worst, effect, f"slicing differs from masking by {difference:.1e}")
    if not replayed <= allowed:
        return Check(name, False, worst, effect, f"replaying the sliced operators differs from masking by {worst:.1e}")
    for way, other in others.items():
        if not other <= allowed:
            return Check(name, False, worst, effect, f"slicing differs from masking on {way} by {other:.1e}")
    if not effect > 10 * max(worst, allowed / 100) and tokens is None:  # the logits of other tokens are what they were
        return Check(name, False, worst, effect, f"the mask has no visible effect ({effect:.1e})")
    return Check(name, True, worst, effect, "slice = mask")


def _difference(
    model: Any,
    graph: DependencyGraph,
    kept: Mapping[str, list[int]],
    ids: torch.Tensor,
    tokens: torch.Tensor | None,
    way: Way,
    allowed: float,
) -> tuple[float, torch.Tensor]:
    """``_sliced_and_masked``, once more in double precision where a deep recurrence may make rounding errors grow."""
    difference, expected = _sliced_and_masked(model, graph, kept, ids, tokens, way)
    if allowed < difference < allowed * _ROUNDING / TOLERANCE:
        difference, _ = _sliced_and_masked(copy.deepcopy(model).double(), graph, kept, ids, tokens, way)
    return difference, expected


def _sliced_and_masked(
    model: Any,
    graph: DependencyGraph,
    kept: Mapping[str, list[int]],
    ids: torch.Tensor,
    tokens: torch.Tensor | None,
    way: Way,
) -> tuple[float, torch.Tensor]:
    """The largest difference between the logits of the sliced and of the masked model, and the latter's.

    Both are copies that have not run yet: what a family's code changes in itself while it runs, it changes in both.
    """
    whole, small = sharing_copy(model), sharing_copy(model)
    with masked(whole, graph, kept):
        expected = (plain if way is filling_a_cache else way)(whole, ids)
        expected = expected[..., tokens if tokens is not None else slice(None)]
    slice_model(small, graph, kept)
    return _largest(way(small, new_ids(tokens, ids)) - expected), expected


def _replayed(model: Any, run: Trace, kept: Mapping[str, list[int]], allowed: float) -> float:
    """How much the replay differs; nothing can be said, and 0 is, when the operators depend on the data.

    More than what is ``allowed`` is looked at again in double precision: a deep recurrence makes rounding errors grow.
    """
    replayable = {name: units for name, units in kept.items() if name in run.units}
    try:
        difference = replay(model, run, replayable).difference
    except NotReplayable:  # a loop over the experts that were hit: the model's own forward has to do
        return 0.0
    if difference <= allowed:
        return difference
    try:
        return replay(model, run, replayable, torch.float64).difference
    except ModelError:  # an operator that knows no such numbers
        return difference


def _fills_a_cache(model: Any, ids: torch.Tensor, without: torch.Tensor) -> bool:
    """Whether the whole model answers the same when it makes a cache."""
    try:
        difference = _largest(filling_a_cache(sharing_copy(model), ids) - without)
    except Exception:  # whatever a family raises that has no such cache
        return False
    return difference <= TOLERANCE * max(1.0, _largest(without))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
