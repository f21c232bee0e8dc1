"""The model card and the report: right numbers, nothing unescaped, nothing fetched."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from secateur.export import Story, Verification, licence_of
from secateur.export.card import model_card
from secateur.export.report import html_report
from secateur.export.runtimes import runtimes_of
from secateur.export.story import compare_rounds, compare_states, curves, widths
from secateur.graph import trace
from secateur.pages import markdown_page
from secateur.testing.tiny import TINY
from secateur.types import PruningPlan

NASTY = "</pre><script>alert(1)</script>|\n``` & \"x'"
METRICS: dict[str, Any] = {
    "dense": {
        "perplexity": {"wiki": 20.0, NASTY: 30.0},
        "parameters": 134_515_008,
        "bytes": 538_060_032,
        "decode_tokens_per_s": 10.0,
    },
    "pruned": {"perplexity": {"wiki": 200.0, NASTY: 3000.0}, "parameters": 107_612_006, "bytes": 430_448_024},
    "recovered": {
        "perplexity": {"wiki": 25.0, NASTY: float("nan")},
        "parameters": 107_612_006,
        "bytes": 430_448_024,
        "decode_tokens_per_s": 12.5,
    },
    "baseline": {"name": "wanda without LoRA", "perplexity": {"wiki": 150.0}},
    "tokens": {"wiki": 3000, NASTY: 1000},
    "window": 512,
    "machine": {"processor": "a processor", "threads": 2, "gpu": None, "torch": "2.13", "python": "3.11"},
    "speed": {"batch 1": {}},
    "method": {"training": [{"step": step % 4 + 1, "loss": 5.0 - 0.1 * step} for step in range(8)]},
    "recovery": {"log": [{"step": 5, "loss": 4.0}, {"step": 10, "loss": 3.0}, {"step": 15, "loss": float("nan")}]},
    "seconds": {"dense": 12.5},
}


@pytest.fixture(scope="module")
def story() -> Story:
    graph = trace(TINY["llama-odd"]())
    kept = {"layers.0.mlp": list(range(17)), "layers.1.attention": [1]}
    plan = PruningPlan(
        base_model=NASTY,
        fingerprint=graph.fingerprint,
        method="lorashear",
        ratio_asked=0.2,
        ratio_reached=0.198,
        parameters_before=134_515_008,
        parameters_after=107_612_006,
        sizes={name: graph[name].size for name in kept},
        kept=kept,
    )
    verification = Verification(
        class_name="PrunedLlamaForCausalLM",
        trust_remote_code=True,
        note=NASTY,
        dtype="float32",
        parameters=107_612_006,
        logits_difference=1e-6,
        logits_scale=12.0,
        same_top_token=1.0,
        dynamic_cache_difference=1e-6,
        tokenizer="Fast",
        seconds_to_open=1.0,
        versions={"transformers": "5.23"},
        sample=NASTY,
        runtimes=runtimes_of({"pruned_layers": {}}),
    )
    return Story(plan, graph, verification, recipe=f"model:\n  name: {NASTY}\n", metrics=METRICS)


def test_numbers_stand_beside_their_change() -> None:
    table = compare_states(METRICS)
    assert table.columns == ["dense", "wanda without LoRA", "pruned", "recovered"]
    rows = dict(table.rows)
    assert rows["perplexity, wiki"] == ["20.00", "150.00", "200.00", "25.00"]
    assert rows["parameters"] == ["134.5 M", "", "107.6 M (-20.0%)", "107.6 M (-20.0%)"]
    assert rows["size on disk"][::2] == ["538 MB", "430 MB (-20.0%)"]
    assert rows["decode, tokens/s"] == ["10.00", "", "", "12.50 (+25.0%)"]
    assert "prefill, tokens/s" not in rows
    assert "4,000 tokens in windows of 512" in table.caption
    assert "2 threads, torch 2.13; speed of one sequence" in table.caption


def test_nothing_measured_is_no_table() -> None:
    assert compare_states({}).rows == []
    machine = {"processor": "p", "threads": 1, "torch": "2"}
    caption = compare_states({"machine": machine, "dense": {"parameters": 3}}).caption
    assert caption == "Measured on p, 1 thread, torch 2."


def test_widths_follow_the_plan(story: Story) -> None:
    parts = {part.name: part for part in widths(story)}
    assert parts["layers.*.mlp"].layers == [(0, 17, 37), (1, 37, 37), (2, 37, 37)]
    assert parts["layers.*.attention"].layers == [(0, 3, 3), (1, 1, 3), (2, 3, 3)]


def test_curves_are_found_and_put_in_a_row() -> None:
    found = curves(METRICS)
    assert [step for step, _ in found["method, training"]] == list(range(8)), "periods that each count from 1"
    assert found["recovery, log"] == [(5, 4.0), (10, 3.0)]


def test_the_card_loads_as_yaml_and_says_how_to_open(story: Story) -> None:
    card = model_card(story)
    assert "Verified with transformers 5.23" in card
    assert 'after "The quick brown fox"' in card
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "secateur", "lorashear"],
    }
    assert "trust_remote_code=True" in body
    assert "licence of the base model is not known" in body
    assert "Gone are attention heads, feed-forward channels, each" in body
    assert "134,515,008 parameters before, 107,612,006 after" in body
    prose, fenced = body.split("````yaml")
    assert not re.search(r"(?<!\\)<", prose)
    assert NASTY.splitlines()[0] in fenced
    for row in re.findall(r"^\| (?:perplexity|parameters|size).*$", body, re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 6, row


def test_the_licence_of_the_base_is_passed_on(story: Story, tmp_path: Path) -> None:
    assert licence_of("smollm2-135m") == "apache-2.0"
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == "mit"
    (tmp_path / "README.md").write_text("no head")
    assert licence_of(str(tmp_path)) is None
    known = Story(story.plan, story.graph, story.verification, licence="mit")
    assert "license: mit" in model_card(known)
    assert "not known" not in model_card(known)


def test_foreign_text_is_safe_in_markdown_wherever_it_is_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "__init__.py").touch()
    (tmp_path / "foreign" / "t.jinja").write_text("# {{ a }}\n{{ b | fence }}\n{{ b | safe }}\n{{ b | fence }}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert markdown_page("foreign", "t.jinja", {"a": "<b>|\n# *x*", "b": "```"}) == (
        "# \\<b\\>\\| \\# \\*x\\*\n````\n```\n````\n"
    )
    with pytest.raises(jinja2.UndefinedError):
        markdown_page("foreign", "t.jinja", {"a": ""})


class _Page(HTMLParser):
    """Collects what a browser would fetch or run, and checks that tags are closed."""

    void = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_closed_page(story: Story) -> None:
    page = _Page()
    page.feed(html_report(story))
    assert page.open == []
    assert page.links == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.seen)
    assert page.seen.count("polyline") == 2
    assert page.seen.count("rect") == 2 * 2 * 3
    assert NASTY.splitlines()[0] in page.text, "shown, as text"
    for said in ("25.00", "107.6 M (-20.0%)", "layer 1: 1 of 3 kept", "llama.cpp", "12.5"):
        assert said in page.text


def test_a_report_of_several_rounds_shows_each_with_its_losses(story: Story) -> None:
    def numbers(left: int, loss: float) -> dict[str, Any]:
        repair = {"step": 1.0, "loss_before": loss + 2, "loss_after": loss + 1}
        log = [{"step": 2, "loss": loss + 0.5}, {"step": 40, "loss": loss}]
        return {"parameters": left, "repair": repair, "recovery": {"log": log, "rounds": []}}

    first, last = numbers(121_000_000, 4.0), numbers(0, 6.0)
    metrics = {**METRICS, "rounds": [first], **{name: last[name] for name in ("repair", "recovery")}}
    table = compare_rounds(metrics)
    assert table.columns == ["parameters left", "loss by repair", "loss in recovery"], "nothing was reconstructed"
    assert table.rows == [
        ("1", ["121,000,000", "6.000 → 5.000", "4.500 (step 2) → 4.000 (step 40)"]),
        ("2", ["107,612,006", "8.000 → 7.000", "6.500 (step 2) → 6.000 (step 40)"]),
    ]
    assert curves(metrics)["round 1, recovery, log"] == [(2, 4.5), (40, 4.0)]
    page = _Page()
    page.feed(html_report(replace(story, metrics=metrics)))
    assert page.open == []
    for said in ("Round by round", "121,000,000", "8.000 → 7.000", "4.500 (step 2) → 4.000 (step 40)"):
        assert said in page.text


def test_a_round_without_losses_shows_what_it_left() -> None:
    table = compare_rounds({"rounds": [{"parameters": 9}], "pruned": {"parameters": 8}})
    assert (table.columns, table.rows) == (["parameters left"], [("1", ["9"]), ("2", ["8"])])


def test_a_report_of_one_round_has_no_table_of_rounds(story: Story) -> None:
    assert compare_rounds(METRICS).rows == []
    assert "Round by round" not in html_report(story)


def test_a_report_without_metrics_is_fine(story: Story) -> None:
    page = _Page()
    page.feed(html_report(Story(story.plan, story.graph, story.verification)))
    assert page.open == []
    assert "Before and after" not in page.text
