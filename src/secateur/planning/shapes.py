"""Shapes that the runtimes support: which groups may be cut, and which numbers of units a group may keep.

Source: trials of pruned checkpoints against transformers 5.23 and llama.cpp, and vLLM's model files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.precision import GROUPED_MULTIPLE
from secateur.types import DependencyGraph, Kind, NodeGroup

RunsOn = Literal["transformers", "everywhere", "vllm", "llama.cpp"]


@dataclass(frozen=True)
class RuntimeRules:
    """The shapes that a runtime for plain checkpoints supports."""

    ffn_multiple: int
    """FFN widths: 64 divides over up to 64 GPUs of tensor parallelism; llama.cpp's K-quants need rows of 256."""
    heads: frozenset[str]
    """Model types whose head counts it reads from the config together with an explicit ``head_dim``."""
    fixed_heads: frozenset[str] = frozenset()
    """Model types whose attention it is known to size by the hidden width. Cut heads give a load error or wrong shapes
    there. Families in neither set were not tested, and their heads are not pruned."""


_VLLM = RuntimeRules(
    ffn_multiple=64,
    heads=frozenset({"llama", "mistral", "phi3", "qwen3", "gemma", "gemma2"}),
    fixed_heads=frozenset({"qwen2"}),
)
_LLAMA_CPP = RuntimeRules(
    ffn_multiple=256,
    heads=frozenset({"llama", "mistral", "qwen3", "gemma", "gemma2"}),
    fixed_heads=frozenset({"qwen2", "phi3"}),
)
RUNTIMES: Mapping[RunsOn, RuntimeRules] = {
    "vllm": _VLLM,
    "llama.cpp": _LLAMA_CPP,
    "everywhere": RuntimeRules(ffn_multiple=256, heads=frozenset({"llama", "mistral", "qwen3", "gemma"})),
}
"""Runtimes that need equal widths in all layers; transformers is not among them."""

_HEADS: tuple[Kind, ...] = ("attention", "query")
"""Kinds whose cut changes the number of query heads."""

HEADS_DIVIDE_HIDDEN = frozenset({"llama", "gemma2", "gemma3_text"})
"""Model types whose config refuses a number of query heads that does not divide the hidden width."""


def needs_equal_widths(runs_on: RunsOn) -> bool:
    """Whether every layer must have the same widths."""
    return runs_on in RUNTIMES


def refusal(group: NodeGroup, model_type: str, runs_on: RunsOn) -> str | None:
    """Why the runtime cannot open this model after a cut of ``group``; None when it can."""
    runtime = RUNTIMES.get(runs_on)
    if runtime is None or group.kind not in (*_HEADS, "hidden", "state") or model_type in runtime.heads:
        return None
    where = "vllm and llama.cpp" if runs_on == "everywhere" else runs_on
    if group.kind not in _HEADS:  # after a cut of the hidden width, heads do not add up to it
        return f"{model_type} with another number of {group.kind} units is not known to open in {where}"
    if runs_on != "everywhere" and model_type not in runtime.fixed_heads:
        return f"{model_type} with other head counts is not known to open in {where}"
    return f"{model_type} with other head counts does not open in {where}"


def legal_counts(
    group: NodeGroup, graph: DependencyGraph, runs_on: RunsOn, round_to: Mapping[Kind, int]
) -> Sequence[int]:
    """The numbers of units that ``group`` may keep, ascending; its full size is always the last.

    They respect the multiples in ``round_to``, the rules of the runtime, the limits of the group itself (``least``,
    ``runs``, ``fixed``) and, for the width of stacked experts, the limits of the kernels.
    """
    size, multiple = group.size, round_to.get(group.kind, 1)
    multiple = math.lcm(multiple, group.runs)
    if group.kind == "hidden" and graph.model_type in HEADS_DIVIDE_HIDDEN:
        heads = max((other.size * _queries_per_unit(other) for other in graph if other.kind == "attention"), default=1)
        multiple = math.lcm(multiple, heads)
    length = size // group.runs
    most_fixed = max(Counter(unit // length for unit, _ in group.fixed).values(), default=0)
    least = max(group.least, most_fixed * group.runs, 1)
    counts: Sequence[int] = range(-(-least // multiple) * multiple, size + 1, multiple)
    if _stacked(group, graph):
        step = ffn_step(size, GROUPED_MULTIPLE)
        counts = [count for count in counts if count % step == 0]
    runtime = RUNTIMES.get(runs_on)
    if runtime is not None and group.kind == "ffn":
        step = ffn_step(size, runtime.ffn_multiple)
        counts = [count for count in counts if count % step == 0]
    if runtime is not None and group.kind in _HEADS and graph.model_type in HEADS_DIVIDE_HIDDEN:
        hidden, queries = _hidden_width(group, graph), _queries_per_unit(group)
        counts = [count for count in counts if hidden % (count * queries) == 0]
    return counts if size in counts else [*counts, size]


def _stacked(group: NodeGroup, graph: DependencyGraph) -> bool:
    """Whether the units are rows or columns of the matrices of stacked experts ``[experts, rows, columns]``.

    transformers runs these by ``torch.nn.functional.grouped_mm``, which supports only rows of a multiple of 16 bytes (8
    numbers in half precision). With other widths a model still runs, one expert after the other, but slowly.
    """
    return any(len(graph.shapes.get(member.parameter, ())) == 3 and member.axis > 0 for member in group.members)


def ffn_step(size: int, multiple: int) -> int:
    """The multiple to round an FFN of ``size`` channels to.

    It is ``multiple`` itself when the FFN has at least four times as many channels. A smaller FFN, which no quantised
    kernel reads, uses the largest power of two that leaves at least four steps (8 for 40 channels).
    """
    while multiple > 1 and multiple * 4 > size:
        multiple //= 2
    return multiple


def _hidden_width(group: NodeGroup, graph: DependencyGraph) -> int:
    """Outputs of the matrix that consumes the group's units (``o_proj``)."""
    for member in group.members:
        shape = graph.shapes.get(member.parameter, ())
        if member.role == "in" and len(shape) == 2:
            return shape[1 - member.axis]
    return 0


def _queries_per_unit(group: NodeGroup) -> int:
    """Query heads of one unit: rows of a unit in the consumer, over those in its narrowest producer."""
    if group.kind == "query":
        return 1
    consumed = max((member.rows_per_unit for member in group.members if member.role == "in"), default=1)
    produced = min((member.rows_per_unit for member in group.members if member.role == "out"), default=consumed)
    return max(1, consumed // produced)
