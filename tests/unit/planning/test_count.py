"""Counting by differences is counting by shapes: for any numbers of kept units of any groups."""

from __future__ import annotations

import random
from typing import get_args

import pytest
import torch
from transformers import PreTrainedModel

from secateur.graph import trace
from secateur.planning.stacks import Count, build_stack
from secateur.testing.tiny import TINY
from secateur.types import Kind, NodeGroup, Scores

KINDS: tuple[Kind, ...] = get_args(Kind)


@pytest.fixture(params=sorted(TINY))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built: PreTrainedModel = TINY[request.param]()
    return built


def without(group: NodeGroup, chance: random.Random) -> set[int]:
    """Some units, equally many of each run."""
    length = group.size // group.runs
    many = chance.randint(0, length - 1)
    return {run * length + unit for run in range(group.runs) for unit in chance.sample(range(length), many)}


@pytest.mark.parametrize("left_out", ["query", "attention"])  # of the two, whose rows are the same, one is cut
@pytest.mark.parametrize("kinds", [("ffn", "attention", "query"), KINDS])
def test_it_is_what_the_shapes_say(model: PreTrainedModel, kinds: tuple[Kind, ...], left_out: Kind) -> None:
    graph = trace(model).opened(kinds)
    cut = [group for group in graph.prunable if group.kind in kinds and group.kind != left_out]
    chance = random.Random(0)
    scores = Scores({group.name: torch.rand(group.size, generator=torch.Generator().manual_seed(0)) for group in cut})
    # nothing is gone yet; or of some groups something, whether more of them may go or not
    for gone in ({}, {group.name: without(group, chance) for group in cut[::2]}):
        stacks = [
            build_stack(graph, group, scores, gone.get(group.name, ()), "none") for group in cut[len(gone) // 2 :]
        ]
        count = Count(graph, gone, stacks)
        now = {name: [unit for unit in range(graph[name].size) if unit not in units] for name, units in gone.items()}
        assert count({}) == graph.parameter_count(now)
        for _ in range(4):
            some = chance.sample(stacks, chance.randint(1, len(stacks)))  # the others stay as they are
            kept = {stack.group.name: chance.randint(1, stack.left) for stack in some}
            units = now | {stack.group.name: stack.highest(kept[stack.group.name]) for stack in some}
            assert count(kept) == graph.parameter_count(units)
            stack = chance.choice(some)
            fewer = chance.randint(1, kept[stack.group.name])
            after = units | {stack.group.name: stack.highest(fewer)}
            assert count.step(kept, stack.group, fewer) == count(kept) - graph.parameter_count(after)
