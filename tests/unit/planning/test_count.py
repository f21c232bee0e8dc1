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
from secateur.types import DependencyGraph, Kind, NodeGroup, Scores

KINDS: tuple[Kind, ...] = get_args(Kind)


def counts(graph: DependencyGraph, cut: list[NodeGroup], chance: random.Random) -> dict[str, int]:
    return {group.name: chance.randint(1, group.size) for group in cut}


@pytest.fixture(params=sorted(TINY))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built: PreTrainedModel = TINY[request.param]()
    return built


@pytest.mark.parametrize("kinds", [("ffn", "attention"), KINDS])
def test_it_is_what_the_shapes_say(model: PreTrainedModel, kinds: tuple[Kind, ...]) -> None:
    graph = trace(model).opened(kinds)
    cut = [group for group in graph.prunable if group.kind in kinds and (len(kinds) == 2 or group.kind != "query")]
    scores = Scores({group.name: torch.arange(group.size).float() for group in cut})
    stacks = [build_stack(graph, group, scores, (), "none") for group in cut]
    highest = {stack.group.name: stack for stack in stacks}
    chance = random.Random(0)
    for fixed in ({}, counts(graph, cut[:1], chance)):
        count = Count(graph, fixed, stacks)
        for _ in range(5):
            kept = counts(graph, cut, chance)
            units = {name: sorted(highest[name].highest(many)) for name, many in kept.items()}
            assert count(kept) == graph.parameter_count(units)
            group = chance.choice(cut)
            fewer = chance.randint(1, kept[group.name])
            after = units | {group.name: highest[group.name].highest(fewer)}
            assert count.step(kept, group, fewer) == count(kept) - graph.parameter_count(after)
        assert count({}) == graph.parameter_count({name: highest[name].highest(many) for name, many in fixed.items()})
