"""The database: every level is the joint solution for the kept units, masks and slices agree, a kill costs a layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.compensation import Database
from secateur.compensation.gram import typical
from secateur.compensation.obs import DAMPING
from secateur.data import TokenBlocks
from secateur.errors import DataError, ModelError
from secateur.graph import trace
from secateur.surgery import apply_updates, masked, slice_model, updated
from secateur.testing.tiny import TINY
from secateur.types import Cut
from secateur.walk import Calibration, Inputs, watched

SKIPPED = 4
TEXT = Calibration(
    TokenBlocks(torch.randint(3, 97, (12, 12), generator=torch.Generator().manual_seed(0)), ("noise",) * 12)
)


def built(name: str, folder: Path | None = None, text: Calibration | None = TEXT) -> Database:
    """Of all groups, down to a quarter of their units."""
    model = TINY[name]()
    graph = trace(model)
    database = Database(
        model, graph, {group.name: group.size - -(-group.size // 4) for group in graph.prunable}, folder
    )
    database.build(text, "method.compensated")
    return database


def inputs_of(database: Database, path: str) -> torch.Tensor:
    """The inputs of one linear in the dense model, ``[tokens, inputs]``, float64."""
    seen = Inputs()
    with watched(database.model, {path: seen}), torch.no_grad():
        database.model(TEXT.ids)
    return seen.values.view(*TEXT.ids.shape, -1)[:, SKIPPED:].flatten(0, 1).double()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "qwen2", "gemma3"])
def test_every_level_is_the_ridge_solution_for_the_kept_units(name: str) -> None:
    database = built(name)
    for group in (database.graph[one] for one in database.deepest):
        order = database.orders[group.name]
        assert len(set(order)) == database.deepest[group.name] < group.size
        for count in {1, len(order) // 2, len(order)} - {0}:
            [(path, new)] = database.weights({group.name: count}).items()
            [member] = [member for member in group.members if member.parameter == path and member.role == "in"]
            dense = database.model.get_parameter(path).detach()
            assert new.shape == dense.shape
            assert new.dtype == dense.dtype
            weight, new = (each.movedim(member.axis, -1).double() for each in (dense, new))
            x = inputs_of(database, path)
            h = x.T @ x
            h += DAMPING * typical(h.diagonal()) * torch.eye(len(h))
            gone = member.rows(order[:count]).flatten()
            kept = [column for column in range(len(h)) if column not in set(gone.tolist())]
            expected = (weight @ h)[:, kept] @ torch.linalg.inv(h[kept][:, kept])
            torch.testing.assert_close(new[:, kept], expected, atol=1e-4, rtol=1e-4)
            assert float(new[:, gone].abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "qwen2", "gemma2", "gemma3", "olmo2"])
def test_a_mask_with_the_weights_of_a_level_is_the_slice_and_nearer_to_the_dense_model(name: str) -> None:
    database = built(name)
    model, graph = database.model, database.graph
    ids = TEXT.ids[:4]
    for share in (0.25, 0.7):
        counts = {one: max(1, int(share * deepest)) for one, deepest in database.deepest.items()}
        kept = Cut.removing(graph, {one: sorted(database.orders[one][:count]) for one, count in counts.items()})
        weights = database.weights(counts)
        with torch.no_grad():
            dense = model(ids).logits
            with masked(model, graph, kept):
                plain = model(ids).logits
            with updated(model, weights), masked(model, graph, kept):
                found = model(ids).logits
            small: Any = copy.deepcopy(model)
            apply_updates(small, weights)
            slice_model(small, graph, kept)
            torch.testing.assert_close(small(ids).logits, found, atol=1e-4, rtol=1e-4)
            assert torch.equal(model(ids).logits, dense)
        if name != "olmo2":  # where removed heads change the statistics of a norm, other inputs are compensated for
            assert float((found - dense).square().sum()) < float((plain - dense).square().sum())


def test_query_heads_go_in_step_from_each_kv_head() -> None:
    model = TINY["llama-gqa"]()
    graph = trace(model).opened(("query",))
    deepest = {group.name: 2 for group in graph if group.kind == "query"}
    database = Database(model, graph, deepest, None)
    database.build(TEXT, "method.compensated")
    for name, order in database.orders.items():
        graph.check_kept(Cut.removing(graph, {name: sorted(order)}))


def test_weights_are_the_same_whatever_was_asked_before() -> None:
    database, [name, other, *_] = (found := built("llama-gqa")), found.deepest
    first = database.weights({name: 3})
    database.weights({name: 1, other: 1})
    assert not database.weights({name: 0})
    again = database.weights({name: 3})
    assert first.keys() == again.keys()
    assert all(torch.equal(first[path], again[path]) for path in first)


class KilledError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_with_the_next_layer(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = built("llama-odd")
    made: list[int] = []
    make = Database._made

    def killed(self: Database, walker: Any, here: Any) -> Any:
        if len(made) == 2:
            raise KilledError
        made.append(walker.layer)
        return make(self, walker, here)

    monkeypatch.setattr(Database, "_made", killed)
    with pytest.raises(KilledError):
        built("llama-odd", tmp_path)
    if damaged:
        file = tmp_path / "layer-0.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    made.clear()
    monkeypatch.setattr(Database, "_made", lambda *args: (made.append(args[1].layer), make(*args))[1])
    found = built("llama-odd", tmp_path)
    assert made == ([0, 2] if damaged else [2])
    assert {path.name for path in tmp_path.iterdir()} == {f"layer-{layer}.safetensors" for layer in range(3)}
    assert found.orders == expected.orders
    one, other = found.weights(found.deepest), expected.weights(expected.deepest)
    assert all(torch.equal(one[path], other[path]) for path in other)


def test_what_it_cannot_do_is_refused() -> None:
    for name in ("mixtral", "qwen3-moe"):
        with pytest.raises(ModelError, match="needs one linear that consumes"):
            built(name)
    model = TINY["llama-gqa"]()
    graph = trace(model).opened(("layer", "hidden"))
    [hidden] = [group.name for group in graph if group.kind == "hidden"]
    with pytest.raises(ModelError, match=r"of kind hidden.*method\.compensated=false"):
        Database(model, graph, {hidden: 1}, None).build(TEXT, "method.compensated")
    with pytest.raises(DataError, match="reads text"):
        built("llama-gqa", text=None)
