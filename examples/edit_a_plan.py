"""A plan is a small object that can be changed by hand before it is applied.

Makes a plan for 20 % of all parameters, gives the first layer's feed-forward channels back, and applies the rest to a
fresh copy of the model. Run as: python examples/edit_a_plan.py [MODEL]
"""

from __future__ import annotations

import sys

import secateur


def main(name: str) -> None:
    model, _ = secateur.load(name)
    graph = secateur.trace(model)
    # without a tokenizer nothing is read, measured or recovered: this is the quickest way to a plan
    plan = secateur.prune(model, ratio=0.2, method="magnitude").plan
    print(f"the plan:   {plan.parameters_before:,} -> {plan.parameters_after:,} parameters")

    kept = {group: units for group, units in plan.kept.items() if group != "layers.0.mlp"}
    edited = plan.model_copy(update={"kept": kept, "parameters_after": graph.parameter_count(kept)})

    fresh, _ = secateur.load(name)
    smaller = secateur.apply_plan(edited, fresh)
    print(f"as edited:  {sum(parameter.numel() for parameter in smaller.parameters()):,} parameters")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
