"""What the units that go knew is carried over to those that stay: benchmarks/knowledge_transfer.py, small."""

from __future__ import annotations

import copy

from scripts import script

from secateur.surgery import slice_model


def test_lhspg_carries_knowledge_over_before_the_cut_and_training_before_a_cut_in_one_shot_does_not() -> None:
    benchmark = script("knowledge_transfer")
    world = benchmark.build(0, modulus=13, layers=2, hidden=24, steps=400)
    assert benchmark.knows(world.model, world.ids)["accuracy"] == 1.0
    masked = copy.deepcopy(world.model)
    slice_model(masked, world.graph, world.kept)
    gone = benchmark.knows(masked, world.ids)
    one_shot = benchmark.train_then_cut(world, 40, 0)
    progressive = benchmark.lhspg(world, 40, 0, benchmark.Decay, share=1.0)
    # equal tokens, and neither has made a step without the units that are gone
    assert progressive["accuracy"] > one_shot["accuracy"] + 0.15
    assert progressive["accuracy"] > gone["accuracy"] + 0.15
    assert progressive["loss"] < 0.6 * one_shot["loss"]
