"""What must hold for every model family: inherit ``ArchitectureContract`` in a test and provide ``build``."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import PlanError
from secateur.graph import trace
from secateur.surgery import masked, sharing_copy, slice_model
from secateur.surgery.stand_in import randomise
from secateur.types import DependencyGraph, Kept, PruningPlan

TOLERANCE = 1e-4
RATIOS = (0.05, 0.2, 0.5, 0.8)

Traced = tuple[Any, DependencyGraph]


class ArchitectureContract:
    """Inherit it in a class whose name starts with ``Test``; small random fp32 models in eval mode are best."""

    kinds: ClassVar[tuple[str, ...]] = ("attention", "ffn")
    """Kinds of groups that every decoder layer must have and allow to cut."""

    def build(self) -> PreTrainedModel:
        """A fresh model; the same weights every time."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def plain(self) -> Traced:
        model = type(self)().build()
        return model, trace(model)

    @pytest.fixture(scope="class")
    def adapted(self) -> Traced:
        model = with_adapters(type(self)().build())
        return model, trace(model)

    @pytest.fixture(params=["plain", "lora"])
    def traced(self, request: pytest.FixtureRequest, plain: Traced, adapted: Traced) -> Traced:
        """A model without and with adapters on every linear, and its graph; tests leave it as it is."""
        return plain if request.param == "plain" else adapted

    def test_every_layer_can_be_cut(self, plain: Traced) -> None:
        model, graph = plain
        layers = range(model.config.get_text_config().num_hidden_layers)
        for kind in self.kinds:
            assert {group.layer for group in graph.prunable if group.kind == kind} == set(layers), kind

    def test_no_group_reaches_into_another_layer(self, traced: Traced) -> None:
        for group in traced[1].prunable:
            if group.layer is not None:
                places = {re.findall(r"\.(\d+)\.", member.parameter)[0] for member in group.members}
                assert places == {str(group.layer)}, group.name

    def test_adapters_do_not_change_what_can_be_cut(self, plain: Traced, adapted: Traced) -> None:
        facts = [[(g.name, g.kind, g.size, g.protected) for g in graph] for _, graph in (plain, adapted)]
        assert facts[0] == facts[1]
        assert plain[1].fingerprint == adapted[1].fingerprint

    @pytest.mark.parametrize("ratio", RATIOS)
    def test_slice_equals_mask(self, traced: Traced, ratio: float) -> None:
        model, graph = traced
        dense, wrong = logits(model), {}
        for name, kept in choices(graph, ratio):
            with masked(model, graph, kept):
                expected = logits(model)
            small = sharing_copy(model)
            slice_model(small, graph, kept)
            difference = float((logits(small) - expected).abs().max())
            effect = float((expected - dense).abs().max())
            same = difference <= TOLERANCE * max(1.0, float(dense.abs().max()))  # not so when it is NaN
            seen = effect > 10 * difference or ratio < 0.5  # few units may be silent on these tokens
            if not (same and seen):
                wrong[name] = f"difference {difference:.1e}, effect of the mask {effect:.1e}"
            assert sum(parameter.numel() for parameter in small.parameters()) == graph.parameter_count(kept), name
        assert wrong == {}
        assert torch.equal(logits(model), dense)

    def test_removing_nothing_is_the_identity(self, traced: Traced) -> None:
        model, graph = traced
        small, everything = sharing_copy(model), {group.name: list(range(group.size)) for group in graph.prunable}
        slice_model(small, graph, plan_keeping(graph, everything).kept)
        assert torch.equal(logits(small), logits(model))

    def test_a_plan_survives_json_and_refuses_another_model(self, plain: Traced) -> None:
        model, graph = plain
        plan = plan_keeping(graph, uneven(graph))
        again = PruningPlan.model_validate_json(plan.model_dump_json())
        assert again == plan
        plan.check(graph)
        small = sharing_copy(model)
        slice_model(small, graph, plan.kept)
        with pytest.raises(PlanError):
            plan.check(trace(small))  # the model that was cut already is another one

    def test_generation_agrees_with_and_without_cache(self, plain: Traced) -> None:
        model, graph = plain
        small = sharing_copy(model)
        slice_model(small, graph, uneven(graph))
        cached, fresh = (
            small.generate(
                input_ids=ids(model)[:, :5],
                max_new_tokens=5,
                do_sample=False,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=None,
                pad_token_id=0,
            )
            for use_cache in (True, False)
        )
        assert torch.equal(cached.sequences, fresh.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(fresh.logits), atol=1e-4, rtol=1e-4)

    def test_merging_adapters_after_the_cut_changes_nothing(self, adapted: Traced) -> None:
        model, graph = adapted
        small = copy.deepcopy(model)
        slice_model(small, graph, uneven(graph))
        expected = logits(small)
        merged = small.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)

    def test_tied_embeddings_stay_tied(self, traced: Traced) -> None:
        model, graph = traced
        small = sharing_copy(model)
        slice_model(small, graph, uneven(graph))
        assert ties(small) == ties(model)


def with_adapters(model: PreTrainedModel, exclude: Sequence[str] = ()) -> PeftModel:
    """LoRA of rank 4 on every linear but modules called ``exclude``; B is random, so that the adapters matter.

    Linears that do something else (routers that return several things) are left out: peft takes them for plain.
    """
    own = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and not _is_plain(module)]
    excluded = [*own, *exclude] or None
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", exclude_modules=excluded, task_type="CAUSAL_LM")
    )
    adapters = nn.ParameterList(parameter for name, parameter in adapted.named_parameters() if "lora_" in name)
    randomise(adapters, seed=1)
    return adapted.eval()


def _is_plain(linear: nn.Linear) -> bool:
    """Whether it makes one tensor of its outputs from one of its inputs, with a forward of its own or not."""
    if type(linear).forward is nn.Linear.forward:
        return True
    try:
        outputs: Any = linear(linear.weight.new_zeros(1, linear.in_features))
    except Exception:  # whatever its code raises for inputs that are not what it expects
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (1, linear.out_features)


def ids(model: Any) -> torch.Tensor:
    """Token ids of shape [2, 12]."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=ids(model), use_cache=False).logits
    return answer


def choices(graph: DependencyGraph, ratio: float) -> Iterator[tuple[str, Kept]]:
    """Each group alone, then all of them, without ``ratio`` of their units (at least one goes and one stays)."""
    generator, everything = torch.Generator().manual_seed(0), {}
    for group in graph.prunable:
        goes = min(max(1, round(ratio * group.size)), group.size - 1)
        kept = sorted(torch.randperm(group.size, generator=generator)[goes:].tolist())
        everything[group.name] = kept
        yield group.name, {group.name: kept}
    yield "all groups", everything


def uneven(graph: DependencyGraph) -> Kept:
    """Random units, and another number of them, in every group."""
    generator, kept = torch.Generator().manual_seed(3), {}
    for group in graph.prunable:
        stays = int(torch.randint(1, group.size + 1, (), generator=generator))
        kept[group.name] = sorted(torch.randperm(group.size, generator=generator)[:stays].tolist())
    return kept


def plan_keeping(graph: DependencyGraph, kept: Kept) -> PruningPlan:
    before, after = graph.parameter_count(), graph.parameter_count(kept)
    return PruningPlan(
        fingerprint=graph.fingerprint,
        method="contract",
        ratio_asked=0.0,
        ratio_reached=1 - after / before,
        parameters_before=before,
        parameters_after=after,
        sizes={name: graph[name].size for name in kept},
        kept={name: list(units) for name, units in kept.items()},
    )


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Names that stand for one and the same parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
