"""The architecture contract over the model families that secateur names, all from tiny random models."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from secateur.testing.contracts import ArchitectureContract
from secateur.testing.tiny import SPECS, TINY, randomise

ONLY_FFN = {"bloom"}
"""ALiBi constants depend on the index of the head: no head can go."""


def _contract(family: str) -> type[ArchitectureContract]:
    kinds = ("ffn",) if family in ONLY_FFN else ("attention", "ffn")
    name = "Test" + "".join(part.capitalize() for part in family.split("-"))
    return type(name, (ArchitectureContract,), {"build": lambda self: TINY[family](), "kinds": kinds})


for _family in TINY:
    _class = _contract(_family)
    globals()[_class.__name__] = _class


class TestFalconSerial(ArchitectureContract):
    """Falcon with a KV head for each query head, attention before the feed-forward, and biases."""

    def build(self) -> PreTrainedModel:
        _, options = SPECS["falcon-mqa"]
        variant = {"multi_query": False, "parallel_attn": False, "bias": True}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **options, **variant))
        randomise(model)
        return model.eval()
