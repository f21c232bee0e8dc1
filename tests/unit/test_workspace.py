"""An unfinished run: found again, refused when it would be overwritten, gone when it is finished."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import InputError
from secateur.workspace import Workspace


def test_without_output_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = Workspace.open(None, "recipe", resume=False, contents={})
    space.write_json("metrics.json", {"a": 1})
    space.log({"stage": "dense"})
    assert space.read_json("metrics.json", dict[str, int]) is None
    assert not list(tmp_path.iterdir())
    assert space.events[0]["stage"] == "dense"


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str, **_: object) -> None:
        path.open("w").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    space = Workspace.open(tmp_path / "kept", "recipe", resume=False, contents={})
    space.write_json("metrics.json", {"a": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left"):
        Workspace.open(tmp_path / "out", "recipe", resume=False, contents={})
    with pytest.raises(OSError, match="No space left"):
        space.write_json("metrics.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == [".kept.secateur"]
    assert {path.name for path in (tmp_path / ".kept.secateur").iterdir()} == {
        "recipe.yaml",
        "contents.json",
        "metrics.json",
    }
    assert space.read_json("metrics.json", dict[str, int]) == {"a": 1}


def test_an_unfinished_run_is_resumed_only_when_asked_and_with_the_same_recipe(tmp_path: Path) -> None:
    first = Workspace.open(tmp_path / "out", "seed: 0", resume=False, contents={})
    first.write_json("metrics.json", {"dense": 1})
    first.log({"stage": "dense"})
    with pytest.raises(InputError, match="--resume"):
        Workspace.open(tmp_path / "out", "seed: 0", resume=False, contents={})
    with pytest.raises(InputError, match=r"another recipe .*'seed: 0' there, 'seed: 1' here"):
        Workspace.open(tmp_path / "out", "seed: 1", resume=True, contents={})
    again = Workspace.open(tmp_path / "out", "seed: 0", resume=True, contents={})
    assert again.read_json("metrics.json", dict[str, int]) == {"dense": 1}
    assert [event["stage"] for event in again.events] == ["dense"]
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_goes_on_only_with_the_contents_that_it_was_started_with(tmp_path: Path) -> None:
    started = {"the model's weights": "1", "the text of recovery": "2", "the text of evaluation": "3"}
    first = Workspace.open(tmp_path / "out", "", resume=False, contents=started)
    Workspace.open(tmp_path / "out", "", resume=False, contents={**started, "the model's weights": "0"})  # nothing kept
    Workspace.open(tmp_path / "out", "", resume=False, contents=started)
    first.write_json("metrics.json", {"dense": 1})
    changed = {**started, "the text of recovery": "4"}
    with pytest.raises(InputError, match=r"Changed since: the text of recovery\. Put back .* delete that folder"):
        Workspace.open(tmp_path / "out", "", resume=True, contents=changed)
    with pytest.raises(InputError, match="Changed since: the model's weights, the text of recovery"):
        Workspace.place(tmp_path / "out", "", resume=True, contents={**changed, "the model's weights": "0"})
    Workspace.place(tmp_path / "out", "", resume=True, contents={"the model's weights": "1"})
    again = Workspace.open(tmp_path / "out", "", resume=True, contents=started)
    assert again.read_json("metrics.json", dict[str, int]) == {"dense": 1}


@pytest.mark.parametrize("cut", ['{"time": 12.5, "stage": "warm', '{"stage": "x", "more": {"a": 1}', '{"stage": "x"'])
def test_a_line_that_was_cut_short_is_forgotten_for_good(cut: str, tmp_path: Path) -> None:
    first = Workspace.open(tmp_path / "out", "", resume=False, contents={})
    first.write_json("metrics.json", {})
    first.log({"stage": "dense"})
    with (tmp_path / ".out.secateur" / "run.jsonl").open("a") as file:
        file.write(cut)
    second = Workspace.open(tmp_path / "out", "", resume=True, contents={})
    second.log({"stage": "decide"})
    third = Workspace.open(tmp_path / "out", "", resume=True, contents={})
    assert [event["stage"] for event in third.events] == ["dense", "decide"]


@pytest.mark.parametrize("text", ["", "{}", "null", '"a"', '["a"]', "[1", "\0\0"])
def test_what_is_not_of_its_kind_counts_as_missing(text: str, tmp_path: Path) -> None:
    space = Workspace.open(tmp_path / "out", "", resume=False, contents={})
    space.write_json("trials.json", [1, 2])
    assert space.read_json("trials.json", list[int]) == [1, 2]
    (tmp_path / ".out.secateur" / "trials.json").write_text(text)
    assert space.read_json("trials.json", list[int]) is None


def test_a_run_that_kept_nothing_is_started_anew(tmp_path: Path) -> None:
    first = Workspace.open(tmp_path / "out", "seed: 0", resume=False, contents={})
    first.log({"stage": "dense"})
    again = Workspace.open(tmp_path / "out", "seed: 1", resume=False, contents={})
    assert again.events == []
    again.write_json("trials.json", [])
    with pytest.raises(InputError, match="--resume"):
        Workspace.open(tmp_path / "out", "seed: 1", resume=False, contents={})


def test_a_finished_run_leaves_no_workspace(tmp_path: Path) -> None:
    space = Workspace.open(tmp_path / "out", "", resume=False, contents={})
    space.remove()
    assert not list(tmp_path.iterdir())


def test_weights_come_back_as_they_were_also_when_tied(tmp_path: Path) -> None:
    space = Workspace.open(tmp_path / "out", "", resume=False, contents={})
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    expected = model["head"].weight.detach().clone()
    space.write_weights("model.safetensors", model)
    with torch.no_grad():
        model["embed"].weight.zero_()
    space.read_weights("model.safetensors", model)
    assert torch.equal(model["head"].weight, expected)
    assert model["head"].weight is model["embed"].weight


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Choose another"):
        Workspace.open(tmp_path / "file" / "out", "", resume=False, contents={})


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_name_of_a_run_and_is_none_stays(kind: str, tmp_path: Path) -> None:
    place = tmp_path / ".out.secateur"
    (tmp_path / "mine.txt").write_text("mine")
    if kind == "file":
        (tmp_path / "mine.txt").rename(place)
    else:
        place.symlink_to("mine.txt")
    with pytest.raises(InputError, match=r"\.out\.secateur is in the way"):
        Workspace.open(tmp_path / "out", "recipe", False, {})
    assert place.read_text() == "mine"


@pytest.mark.parametrize("kept", [False, True])
def test_a_stage_that_fails_before_anything_is_kept_leaves_nothing(kept: bool, tmp_path: Path) -> None:
    work = Workspace.open(tmp_path / "out", "recipe", False, {})
    if kept:
        work.write_json("trials.json", [])
    with pytest.raises(KeyboardInterrupt), work.tidied():
        raise KeyboardInterrupt
    assert (tmp_path / ".out.secateur").exists() == kept
