"""What must hold for every pruning method: inherit ``MethodContract`` in a test and name the method."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from transformers import PreTrainedModel

from secateur.data import TokenBlocks
from secateur.graph import trace
from secateur.methods.base import Decision, Method, PruningTask
from secateur.planning import Budget, Problem, allocate, make_plan
from secateur.surgery import apply_updates, check_updates, masked, slice_model, updated
from secateur.testing.graphs import allowed_miss
from secateur.testing.tiny import VOCAB, build
from secateur.training import LoraSettings, TrainingSettings
from secateur.types import Cut, Settings
from secateur.walk import Calibration

RATIOS = (0.05, 0.2, 0.5)


class MethodContract:
    """Inherit it in a class whose name starts with ``Test`` and set ``method``."""

    method: ClassVar[type[Method]]
    settings: ClassVar[Settings | None] = None
    """The method's settings; choose few steps for a method that trains. None: its defaults."""
    family: ClassVar[str] = "llama-gqa"
    """A name from ``secateur.testing.tiny``; at least half of its parameters must be prunable."""

    def model(self) -> PreTrainedModel:
        """A fresh model; the same weights every time."""
        return build(self.family)

    def task(self, ratio: float = 0.2, seed: int = 0, **budget: Any) -> PruningTask:
        """A task on a fresh model, with as much text as the method asks for."""
        model, needs = self.model(), self.method.needs
        return PruningTask(
            model=model,
            tokenizer=None,
            graph=trace(model),
            budget=Budget(ratio=ratio, **budget),
            calibration=Calibration(noise(6, 1)) if needs != "nothing" else None,
            training_blocks=noise(16, 2) if needs == "training" else None,
            lora=LoraSettings(rank=4),
            training=TrainingSettings(batch_size=4, precision="fp32"),
            seed=seed,
        )

    def decide(self, task: PruningTask) -> Decision:
        return self.method(self.settings).run(task)

    def test_it_introduces_itself(self) -> None:
        assert self.method.name
        assert self.method.name == self.method.name.lower()
        assert self.method.summary
        assert "\n" not in self.method.summary
        assert self.method.needs in ("nothing", "text", "training")
        assert self.method.paper == "" or self.method.paper.startswith("https://")
        assert isinstance(self.method.Settings(), Settings)
        assert isinstance(self.method.changes_weights, bool)
        trains = self.method.needs == "training"
        assert (self.method(self.settings).training_steps > 0) == trains

    @pytest.mark.parametrize("ratio", RATIOS)
    def test_it_ends_within_one_unit_of_the_target(self, ratio: float) -> None:
        task = self.task(ratio)
        plan = make_plan(task.graph, self.decide(task).removed, task.budget, method=self.method.name)
        plan.check(task.graph)
        assert abs(plan.parameters_after - (1 - ratio) * plan.parameters_before) <= allowed_miss(task.graph)

    def test_every_choice_on_the_way_only_shrinks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        choices: list[dict[str, list[int]]] = []
        choose = Problem.choose

        def watched(*args: Any, **kwargs: Any) -> dict[str, list[int]]:
            choices.append(choose(*args, **kwargs))
            return choices[-1]

        monkeypatch.setattr(Problem, "choose", watched)
        removed = self.decide(self.task()).removed
        for earlier, later in zip(choices, [*choices[1:], removed], strict=True):
            assert all(set(units) <= set(later.get(name, ())) for name, units in earlier.items())

    def test_the_same_seed_gives_the_same_answer(self) -> None:
        assert self.decide(self.task(seed=5)).removed == self.decide(self.task(seed=5)).removed

    def test_the_budget_is_obeyed(self) -> None:
        task = self.task(0.1, protect=("layers.0.*",), kinds=("ffn",))
        assert set(self.decide(task).removed) == {"layers.1.mlp"}

    def test_equal_widths_when_asked_for(self) -> None:
        task = self.task(0.2, ranking="layer")
        removed = self.decide(task).removed
        for kind in ("ffn", "attention"):
            assert len({len(removed.get(group.name, ())) for group in task.graph.prunable if group.kind == kind}) == 1

    def test_query_heads_go_in_step_from_each_kv_head(self) -> None:
        task = self.task(0.05, kinds=("query",), floor=0)
        if not any(group.kind == "query" for group in task.graph):
            pytest.skip(f"{self.family} has no query heads within KV heads")
        decision = self.decide(task)
        kept = Cut.removing(task.graph, decision.removed)
        task.graph.check_kept(kept)
        assert {task.graph[name].kind for name in kept} == {"query"}

    def test_scores_cover_what_can_go(self) -> None:
        task = self.task()
        scores = self.decide(task).scores
        if scores is not None:
            assert {group.name for group in task.graph.prunable} <= set(scores)

    @pytest.mark.parametrize("ranking", ["global", "layer"])
    def test_scores_that_decide_alone_give_the_answer(self, ranking: str) -> None:
        if not self.method(self.settings).ranks:
            pytest.skip(f"{self.method.name} chooses by more than its scores")
        task = self.task(ranking=ranking)
        decision = self.decide(task)
        assert decision.scores is not None
        assert allocate(task.graph, decision.scores, task.budget) == decision.removed

    def test_shapes_stay_and_weights_change_only_if_the_method_says_so(self) -> None:
        task = self.task()
        before = copy.deepcopy(task.model.state_dict())
        self.decide(task)
        after = task.model.state_dict()
        assert {name: value.shape for name, value in after.items()} == {n: v.shape for n, v in before.items()}
        if not self.method.changes_weights:
            assert all(torch.equal(value, before[name]) for name, value in after.items())

    def test_updates_are_declared_and_fit_and_come_off_again_bit_by_bit(self) -> None:
        task = self.task()
        decision = self.decide(task)
        assert self.method(self.settings).compensates == bool(decision.updates)
        kept = Cut.removing(task.graph, decision.removed)
        check_updates(task.model, task.graph, kept, decision.updates)
        before = copy.deepcopy(task.model.state_dict())
        with updated(task.model, decision.updates):
            for path, value in decision.updates.items():
                assert torch.equal(task.model.get_parameter(path), value.to(task.model.dtype))
        after = task.model.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(value, before[name]) for name, value in after.items())

    def test_slice_equals_mask_afterwards(self) -> None:
        task = self.task(0.5)
        decision = self.decide(task)
        kept = Cut.removing(task.graph, decision.removed)
        task.model.eval()
        ids = noise(2, 3).ids
        with torch.no_grad():
            with updated(task.model, decision.updates), masked(task.model, task.graph, kept):
                expected = task.model(ids).logits
            apply_updates(task.model, decision.updates)
            slice_model(task.model, task.graph, kept)
            torch.testing.assert_close(task.model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def noise(blocks: int, seed: int, window: int = 12) -> TokenBlocks:
    """Random token ids as text."""
    ids = torch.randint(3, VOCAB, (blocks, window), generator=torch.Generator().manual_seed(seed))
    return TokenBlocks(ids, ("noise",) * blocks)
