"""Dynamic recovery: shares follow what was lost, in one run of the Trainer, and an interrupted one ends the same."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur import progress
from secateur.data import TokenBlocks
from secateur.data.order import ReadingOrder
from secateur.errors import InputError, ModelError
from secateur.recovery import Recovered, RecoverySettings, RecoveryTask, recover, source_losses
from secateur.recovery.curriculum import Curriculum, RecoveryStage, floored, reweigh
from secateur.testing.tiny import TINY
from secateur.training import LoraSettings, TrainingSettings

TRAINING = TrainingSettings(batch_size=2, micro_batch_size=2, precision="fp32", checkpoint_steps=2)


def _blocks(seed: int = 0, **counts: int) -> TokenBlocks:
    """Each source has its own few tokens, so that it can be learned and told from the others."""
    generator, ids, names = torch.Generator().manual_seed(seed), [], []
    for number, (name, count) in enumerate(counts.items()):
        ids.append(torch.randint(10 * number + 3, 10 * number + 9, (count, 12), generator=generator))
        names += [name] * count
    return TokenBlocks(torch.cat(ids), tuple(names))


def _recover(task: RecoveryTask, steps: int = 8, training: TrainingSettings = TRAINING, **settings: Any) -> Any:
    model = TINY["llama-gqa"]()
    chosen = RecoverySettings(steps=steps, window=12, validation_tokens=96, **settings)
    done = recover(model, task, chosen, lora=LoraSettings(rank=2), training=training, seed=0)
    return model, done


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source of every block, in the order of reading."""
    seen: list[str] = []
    following = ReadingOrder._next

    def spy(self: ReadingOrder) -> int:
        row = following(self)
        seen.append(self._sources[row])
        return row

    monkeypatch.setattr(ReadingOrder, "_next", spy)
    return seen


def test_the_formula_is_that_of_sheared_llama() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    losses, reference = {"a": 3.0, "b": 2.0, "c": 1.0}, {"a": 2.0, "b": 1.5, "c": 1.4}
    raw = {"a": 0.5 * math.e, "b": 0.3 * math.exp(0.5), "c": 0.2}  # c is ahead of the dense model: no less than before
    expected = {name: value / sum(raw.values()) for name, value in raw.items()}
    assert reweigh(weights, losses, reference) == pytest.approx(expected)
    assert reweigh(weights, {}, {}) == pytest.approx(weights)
    assert reweigh({"a": 0.5, "b": 0.5}, {"a": 9000.0, "b": 0.0}, {"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(loss: float) -> None:
    weights, fine = {"a": 0.5, "b": 0.5}, {"a": 1.0, "b": 1.0}
    with pytest.raises(ModelError, match="trained has no finite loss on a,"):
        reweigh(weights, {"a": loss, "b": 1.5}, fine)
    with pytest.raises(ModelError, match="dense model has no finite loss on b,"):
        reweigh(weights, fine, {"a": 1.0, "b": loss})


def test_every_source_keeps_its_floor() -> None:
    shares = floored({"a": 1.0, "b": 0.0, "c": 0.0}, 0.05)
    assert shares == pytest.approx({"a": 0.9, "b": 0.05, "c": 0.05})
    assert floored({"a": 1.0, "b": 0.0}, 0.9) == pytest.approx({"a": 0.5, "b": 0.5})
    assert floored({"a": 3.0}, 0.02) == {"a": 1.0}
    lifted = floored({"a": 0.939, "b": 0.051, "c": 0.01}, 0.05)  # with c at the floor, b falls below it as well
    assert lifted == pytest.approx({"a": 0.9, "b": 0.05, "c": 0.05})


def test_the_floor_leaves_what_is_above_it_in_proportion() -> None:
    weights = {"a": 0.6, "b": 0.39, "c": 0.01}
    once = floored(weights, 0.05)
    assert once["c"] == 0.05
    assert once["a"] / once["b"] == pytest.approx(0.6 / 0.39)
    assert floored(once, 0.05) == pytest.approx(once)
    assert floored({"a": 9.0, "b": 1.0}, 0.05) == pytest.approx({"a": 0.9, "b": 0.1})
    assert floored({"a": 9.0, "b": 0.0}, 0.0) == pytest.approx({"a": 1.0, "b": 0.0})


def _staged(
    stages: list[RecoveryStage], initial: dict[str, float], losses: dict[str, float], floor: float
) -> Curriculum:
    """A curriculum whose rounds always find these losses; the dense model's are 1."""
    return Curriculum(
        order=ReadingOrder(list(initial), initial, 0),
        stages=stages,
        initial=initial,
        round_steps=1,
        floor=floor,
        patience=0,
        measure=lambda model: losses,
        reference=dict.fromkeys(initial, 1.0),
    )


@pytest.mark.parametrize("loss", [0.5, 1.0, 1.7])
def test_where_all_are_equally_far_behind_the_shares_stay(loss: float) -> None:
    shares = {"a": 9.0, "b": 1.0}
    curriculum = _staged([RecoveryStage("text", ("a", "b"), 100)], shares, dict.fromkeys(shares, loss), floor=0.05)
    model = torch.nn.Linear(1, 1)
    for step in range(20):
        curriculum._round(step, model)
    assert curriculum.rounds[-1]["weights"] == pytest.approx({"a": 0.9, "b": 0.1})


def test_in_the_second_stage_as_well_no_source_is_below_the_floor() -> None:
    stages = [RecoveryStage("text", tuple("abcd"), 1), RecoveryStage("instructions", ("i", "j"), 100)]
    losses = dict.fromkeys("abcdj", 1.0) | {"i": 9.0}  # i is far behind, j is not
    curriculum, model = _staged(stages, dict.fromkeys("abcdij", 1.0), losses, floor=0.1), torch.nn.Linear(1, 1)
    curriculum._round(0, model)
    curriculum._next_stage(1, model)
    for step in range(2, 6):
        curriculum._round(step, model)
        shares = curriculum.rounds[-1]["weights"]
        assert shares == pytest.approx(dict.fromkeys("abcdj", 0.1) | {"i": 0.5})


def test_shares_of_reading_follow_the_weights_and_nothing_is_repeated_early() -> None:
    sources = ["a"] * 6 + ["b"] * 30 + ["c"] * 4
    order = ReadingOrder(sources, {"a": 0.25, "b": 0.75}, seed=0)
    first = [order(position) for position in range(24)]
    assert Counter(sources[row] for row in first) == {"a": 6, "b": 18}
    assert len(set(first)) == 24
    order.set_weights({"c": 1.0})
    assert order(3) == first[3]
    assert {order(position) for position in range(24, 28)} == {36, 37, 38, 39}
    resumed = ReadingOrder(sources, {"a": 1.0}, seed=0)
    resumed.load_state(order.state())
    order.set_weights({"a": 1.0, "b": 1.0})
    resumed.set_weights({"a": 1.0, "b": 1.0})
    assert [order(p) for p in range(60)] == [resumed(p) for p in range(60)]
    ahead, behind = (ReadingOrder(sources, {"a": 1.0, "b": 1.0}, seed=0) for _ in range(2))
    ahead(11)  # two processes, one of which has asked for more
    behind(8)
    for other in (ahead, behind):
        other.set_weights({"b": 1.0}, position=12)
    assert [ahead(p) for p in range(40)] == [behind(p) for p in range(40)]
    with pytest.raises(ValueError, match="positive"):
        order.set_weights({"unknown": 1.0})


def test_what_has_fallen_behind_is_read_more(read: list[str]) -> None:
    task = RecoveryTask(
        text=_blocks(a=20, b=20),
        validation=_blocks(1, a=4, b=4),
        reference={"a": 0.0, "b": 100.0},  # a is far behind its reference, b is not
    )
    _, done = _recover(task, round_steps=3, patience=0, floor=0.1)
    assert [entry["step"] for entry in done.rounds] == [0, 3, 6]
    assert all(entry["weights"]["a"] > 0.85 and entry["weights"]["b"] >= 0.1 for entry in done.rounds)
    assert read.count("a") / len(read) == pytest.approx(done.rounds[0]["weights"]["a"], abs=0.1)
    losses = [entry["losses"]["a"] for entry in done.rounds]
    assert losses[-1] < losses[0]
    assert [entry["learning_rate"] for entry in done.log][-1] < max(entry["learning_rate"] for entry in done.log)


def test_a_source_at_the_floor_comes_back_when_it_falls_behind_later() -> None:
    """Round after round w ∝ w · exp(max(0, loss − ref)), with the floor in w: nothing sinks out of reach."""
    behind = [{"a": 3.0, "b": 0.0}] * 6 + [{"a": 0.0, "b": 3.0}] * 2
    curriculum = Curriculum(
        order=ReadingOrder(["a", "b"], {"a": 1.0, "b": 1.0}, 0),
        stages=[RecoveryStage("text", ("a", "b"), 100)],
        initial={"a": 1.0, "b": 1.0},
        round_steps=1,
        floor=0.1,
        patience=0,
        measure=lambda model: behind.pop(0),
        reference={"a": 0.0, "b": 0.0},
    )
    model, weight = torch.nn.Linear(1, 1), 0.5
    for step in range(8):
        curriculum._round(step, model)
        odds = weight / (1 - weight) * math.exp(3.0 if step < 6 else -3.0)
        weight = min(max(odds / (1 + odds), 0.1), 0.9)
        assert curriculum.rounds[-1]["weights"] == pytest.approx({"a": weight, "b": 1 - weight})
    assert curriculum.rounds[5]["weights"]["b"] < 0.15
    assert curriculum.rounds[7]["weights"]["b"] > 0.7


def _watching(losses: list[float], **settings: Any) -> Curriculum:
    """A curriculum of one source whose rounds find these losses."""
    found = list(losses)
    return Curriculum(
        order=ReadingOrder(["a"], {"a": 1.0}, 0),
        stages=[RecoveryStage("text", ("a",), 100)],
        initial={"a": 1.0},
        round_steps=1,
        measure=lambda model: {"a": found.pop(0)},
        reference={"a": 1.0},
        **settings,
    )


@pytest.mark.parametrize(
    ("losses", "ends_at"),
    [
        pytest.param([3.0, 3.2] * 3, 2, id="up and down"),
        pytest.param([3.0, 3.1, 2.999, 3.3, 3.2, 3.5], 2, id="rising with dips"),
        pytest.param([3.0, 3.1, 2.9, 3.0, 2.8, 2.9], None, id="each second round is a new best"),
        pytest.param([3.0, 2.9, 2.8, 2.79, 2.785], 4, id="levelling out"),
    ],
)
def test_a_gain_is_measured_against_the_best_round_of_the_stage(losses: list[float], ends_at: int | None) -> None:
    curriculum, model = _watching(losses, patience=2), torch.nn.Linear(1, 1)
    ended = [step for step in range(len(losses)) if curriculum._round(step, model)]
    assert (ended[0] if ended else None) == ends_at


def test_the_best_round_is_part_of_a_checkpoint() -> None:
    model = torch.nn.Linear(1, 1)
    before, after = _watching([3.0, 3.2], patience=2), _watching([3.1], patience=2)
    assert not any(before._round(step, model) for step in range(2))
    after.load_state_tensors(before.state_tensors())
    assert after._round(2, model)


def test_one_source_is_enough() -> None:
    validation = _blocks(1, a=4)
    task = RecoveryTask(text=_blocks(a=10), validation=validation, reference={"a": 1.0})
    _, done = _recover(task, round_steps=4, patience=0)
    assert [entry["weights"] for entry in done.rounds] == [{"a": 1.0}] * 2


def test_instructions_come_second_and_the_text_is_not_forgotten(read: list[str]) -> None:
    task = RecoveryTask(text=_blocks(a=20, b=20), instructions=_blocks(2, talk=30))
    _, done = _recover(task, steps=40, instruction_share=0.5, floor=0.1)
    assert [(entry["step"], entry["stage"]) for entry in done.rounds] == [(0, "text"), (20, "instructions")]
    assert done.rounds[1]["weights"] == pytest.approx({"a": 0.1, "b": 0.1, "talk": 0.8})
    assert Counter(read[:40]) == {"a": 20, "b": 20}
    later = Counter(read[40:])
    assert later["talk"] > 30
    assert min(later["a"], later["b"]) >= 3


def test_a_stage_that_no_longer_helps_ends(read: list[str]) -> None:
    text, validation = _blocks(a=20), _blocks(1, a=4, talk=4)
    task = RecoveryTask(text=text, instructions=_blocks(2, talk=20), validation=validation, reference={"a": 1.0})
    _, done = _recover(task, steps=40, round_steps=2, patience=2, min_gain=0.9)
    stages = [(entry["step"], entry["stage"]) for entry in done.rounds]
    assert stages == [
        (0, "text"),
        (2, "text"),
        (4, "text"),
        (4, "instructions"),
        (6, "instructions"),
        (8, "instructions"),
    ]
    assert "stopped" in done.rounds[-1]
    assert max(entry["step"] for entry in done.log) <= 8


def test_killed_after_it_stopped_early_and_resumed_it_stops_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = _blocks(1, a=4)
    task = RecoveryTask(_blocks(a=20), validation=validation, reference={"a": 1.0}, checkpoints=tmp_path / "steps")
    options: dict[str, Any] = {"steps": 20, "round_steps": 3, "patience": 2, "min_gain": 0.9}

    def dies(adapted: Any) -> None:
        raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr("secateur.recovery.finetune.merge_lora", dies)
        with pytest.raises(_KilledError):
            _recover(task, **options)
    _, done = _recover(task, **options)
    assert [entry["step"] for entry in done.rounds] == [0, 3, 6]
    assert "stopped" in done.rounds[-1]


@pytest.mark.parametrize(("steps", "begins"), [(2, 1), (3, 2), (4, 3), (8, 6)])
@pytest.mark.parametrize("round_steps", [0, 1])
def test_each_stage_has_a_step_and_is_read_in_it(steps: int, begins: int, round_steps: int, read: list[str]) -> None:
    validation = _blocks(1, a=2, talk=2)
    task = RecoveryTask(text=_blocks(a=10), instructions=_blocks(2, talk=10), validation=validation)
    _, done = _recover(task, steps=steps, floor=0.0, round_steps=round_steps, patience=0)
    first = {entry["stage"]: entry["step"] for entry in reversed(done.rounds)}
    assert first == {"text": 0, "instructions": begins}
    assert read[: 2 * steps] == ["a"] * 2 * begins + ["talk"] * 2 * (steps - begins)


def test_one_step_is_too_few_for_two_stages() -> None:
    with pytest.raises(InputError, match=r"recovery\.steps = 1 is too few for two stages"):
        _recover(RecoveryTask(text=_blocks(a=10), instructions=_blocks(2, talk=10)), steps=1)
    with pytest.raises(ValueError, match="at least 2 for two stages"):
        RecoverySettings(steps=1, instructions=["self"])
    assert RecoverySettings(steps=0, instructions=["self"]).steps == 0


def test_sources_that_no_round_can_measure_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    text, talk = _blocks(a=10, b=10), _blocks(2, talk=10)
    progress.show()
    try:
        known = RecoveryTask(text=text, validation=_blocks(1, a=2, b=2), reference={"a": 1.0, "b": 1.0})
        _recover(known, steps=4, round_steps=2)
        assert "no text to measure" not in capsys.readouterr().err
        part = RecoveryTask(text=text, instructions=talk, validation=_blocks(1, a=2), reference={"a": 1.0})
        _recover(part, steps=4, round_steps=2)
        said = " ".join(capsys.readouterr().err.split())
        assert "b: no text to measure" in said
        assert "talk: no text to measure" in said
        assert "instructions stage of recovery cannot end before step 4" in said
        assert "text stage of recovery can" not in said
        _recover(part, steps=4)
        assert "no text to measure" not in capsys.readouterr().err
    finally:
        progress.show(False)


class _KilledError(BaseException):
    pass


def test_killed_and_resumed_it_ends_like_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def task(folder: str) -> RecoveryTask:
        return RecoveryTask(
            text=_blocks(a=20, b=20),
            instructions=_blocks(2, talk=20),
            validation=_blocks(1, a=4, b=4, talk=4),
            reference={"a": 2.0, "b": 4.0, "talk": 3.0},
            checkpoints=tmp_path / folder,
        )

    options: dict[str, Any] = {"steps": 12, "round_steps": 3, "patience": 0, "instruction_share": 0.4}
    model, done = _recover(task("whole"), **options)
    step_end = Curriculum.on_step_end

    def dies(self: Curriculum, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if state.global_step == 9:
            raise _KilledError
        step_end(self, args, state, control, model=model, **more)

    monkeypatch.setattr(Curriculum, "on_step_end", dies)
    with pytest.raises(_KilledError):
        _recover(task("killed"), **options)
    monkeypatch.undo()
    resumed, again = _recover(task("killed"), **options)
    assert again.rounds == done.rounds
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=0)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="is named in text and in instructions"):
        RecoverySettings(text=["news", "self"], instructions=["self"])
    with pytest.raises(ValueError, match="at least one window"):
        RecoverySettings(validation_tokens=100, window=512)
    few = {"text": ["news", "wikipedia"], "instructions": ["self"], "window": 64, "validation_tokens": 128}
    assert RecoverySettings.model_validate(few).validation_text is None
    with pytest.raises(ValueError, match="each of the 3 sources"):
        RecoverySettings.model_validate(few | {"round_steps": 5})
    with pytest.raises(ValueError, match=r"instruction_tokens \(20\) must be at least one window \(64\)"):
        RecoverySettings.model_validate(few | {"instruction_tokens": 20})
    for more in ({"round_steps": 5, "validation_tokens": 192}, {}):
        with pytest.raises(ValueError, match=r"floor \(0\.34\) must be below 1 / 3"):
            RecoverySettings.model_validate(few | {"floor": 0.34} | more)
    assert RecoverySettings(text=["news"], floor=0.9, round_steps=5).floor == 0.9


def test_without_rounds_and_stages_it_reads_and_logs_as_plain_training_does() -> None:
    _, done = _recover(RecoveryTask(text=_blocks(a=10)))
    assert isinstance(done, Recovered)
    assert done.rounds == []
    assert done.log
    losses = source_losses(TINY["llama-gqa"](), _blocks(a=2, b=2), TRAINING)
    assert set(losses) == {"a", "b"}
