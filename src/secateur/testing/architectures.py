"""The results of a sweep as a page: what may be cut out of each model type, and why not the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import transformers

Facts = Mapping[str, Any]

_INTRODUCTION = """# Architectures

Written by `make sweep`, which builds a tiny random model of every type that `AutoModelForCausalLM` of transformers
{version} knows, with odd sizes drawn by a seed. For each it traces, cuts every group that may be cut by half, alone and
all together and in random subsets, compares slicing with masking in fp32 to 1e-4 of the largest logit, generates with
and without a cache, does the same with LoRA on all linears, saves, opens the folder in a fresh process without
secateur, and compares logits. How groups are found and what exact means: [The dependency graph](graph.md).

{summary}

## How to read the table

* **ffn**, **attention**: in how many places the widths of feed-forward layers and experts, and the KV heads (query
  heads where there is one KV head, or one each), are cut exactly. `2 of 3`: the third place is protected. `-`: it has
  none.
* **on request**: kinds that are protected by default and are cut exactly when `budget.kinds` names them; `query` are
  query heads within their KV heads.
* **stays**: why groups are protected that are not protected by default.
* **saved**: how a model is written whose layers were cut alike, and whose layers differ. `plain` opens with nothing but
  transformers; `uneven` carries sizes of layers and `listed` a list of the tensors that are smaller, both with a
  modelling file (`trust_remote_code=True`); `refused` is not written, and says why. A dash: there was nothing to cut.

| type | ffn | attention | on request | stays | saved |
| --- | --- | --- | --- | --- | --- |
"""


def summary(results: Sequence[Facts]) -> str:
    """The numbers of a sweep, as a list in Markdown."""
    built = [facts for facts in results if facts.get("built")]
    asked = [facts.get("on_request", {}) for facts in built]
    on_request = ", ".join(
        f"{kind} in {sum(each.get(kind) == 'exact' for each in asked)} of {sum(kind in each for each in asked)}"
        for kind in sorted({kind for each in asked for kind in each})
    )
    mistakes = wrong(results)
    named = ", ".join(f"{facts['type']}: {what}" for facts, what in mistakes)
    minutes = sum(facts.get("seconds", 0.0) for facts in results) / 60
    text = f"""{len(built)} of {len(results)} model types can be built offline.
Feed-forward widths are cut exactly in {_share(built, "ffn")} types that have them, attention heads in \
{_share(built, "attention")}.
On request, exactly: {on_request}.
Wrong results: {len(mistakes)}.{f" ({named})" if named else ""}
Generation with and without a cache agrees in {_count(built, "generate")} types; LoRA on all linears gives the same \
groups and exact cuts in {_count(built, "lora")}.
Saved and opened again with the same logits: {_saved(built, "same")} when all layers are cut alike, \
{_saved(built, "differing")} when they differ, \
{_saved(built, "query")} with half of the query heads of every KV head, \
{_saved(built, "asked")} with everything cut that is cut on request.
All this took {minutes:.0f} minutes of one processor, besides opening the folders again."""
    return "\n".join(f"* {line}" for line in text.splitlines())


def _share(built: Sequence[Facts], kind: str) -> str:
    having = [facts for facts in built if facts.get("kinds", {}).get(kind, [0, 0])[1] > 0]
    return f"{sum(facts['kinds'][kind][0] > 0 for facts in having)} of the {len(having)}"


def _count(built: Sequence[Facts], name: str) -> int:
    return sum(facts.get(name) == "same" for facts in built)


def wrong(results: Sequence[Facts]) -> list[tuple[Facts, str]]:
    """What must be empty: groups that were offered and computed something else, or did not run, and bad folders."""
    found = []
    for facts in results:
        silent = "no visible effect"
        failures = [message for message in facts.get("failures", {}).values() if silent not in message]
        found += [(facts, message) for message in failures]
        for name in ("generate", "lora", *(name for name in facts if name.startswith("save_"))):
            if str(facts.get(name, "")).startswith("FAILED"):
                found.append((facts, f"{name}: {facts[name]}"))
        if "crashed" in facts:
            found.append((facts, facts["crashed"]))
    return found


def _saved(built: Sequence[Facts], name: str) -> str:
    good = [facts for facts in built if isinstance(facts.get(f"reload_{name}"), float)]
    ways = {way: sum(facts.get(f"save_{name}") == way for facts in good) for way in ("plain", "uneven", "listed")}
    return f"{len(good)} types ({', '.join(f'{count} {way}' for way, count in ways.items())})"


def table(results: Sequence[Facts]) -> str:
    """The whole page."""
    page = _INTRODUCTION.format(version=transformers.__version__, summary=summary(results))
    rows = sorted((facts for facts in results if facts.get("built")), key=lambda facts: facts["type"])
    page += "".join(_row(facts) for facts in rows)
    page += "\n## Types that are not built\n\n"
    page += "".join(f"* `{facts['type']}`: {facts['why']}\n" for facts in results if not facts.get("built"))
    return page


def _row(facts: Facts) -> str:
    asked = facts.get("on_request", {})
    exact = ", ".join(kind for kind, answer in asked.items() if answer == "exact") or "-"
    cells = [
        f"`{facts['type']}`",
        _places(facts, "ffn"),
        _places(facts, "attention"),
        exact,
        _stays(facts),
        _ways(facts),
    ]
    return "| " + " | ".join(cells) + " |\n"


def _places(facts: Facts, kind: str) -> str:
    offered, every = facts.get("kinds", {}).get(kind, [0, 0])
    return "-" if not every else str(every) if offered == every else f"{offered} of {every}"


def _stays(facts: Facts) -> str:
    if "refused" in facts or "crashed" in facts:
        return _short(facts.get("refused", facts.get("crashed")))
    reasons = [f"{kind}: {_short(why)}" for kind, all_why in facts.get("protected", {}).items() for why in all_why]
    reasons += [
        f"{kind}: {_short(answer)}" for kind, answer in facts.get("on_request", {}).items() if answer != "exact"
    ]
    return "; ".join(dict.fromkeys(reasons)) or "-"


_REASONS: tuple[tuple[str, str], ...] = (
    (r"shape '(\[.*?\])' is invalid for input", r"its code writes a shape down, \1"),
    (r"split_sizes to sum exactly.*split_sizes=(\[.*?\])", r"its code writes the sizes of a split down, \1"),
    (r"Given normalized_shape=(\[.*?\])", r"a norm without weights keeps its width, \1"),
    (
        r"The size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)",
        r"its code keeps a size, \1 meets \2",
    ),
    (
        r"(?:out of range|out of bounds|out of DATA bounds|source tensor shape must match)",
        "its code keeps the old size",
    ),
    (r"would build layer \d+ in another way \((\S+) is", r"the index of a layer decides what it is (\1)"),
)
"""What is found in a message, and what a reader of the table is told."""


def _short(reason: str) -> str:
    reason = re.sub(r"^cutting it failed a check: (together: )?", "", reason)
    for message, meaning in _REASONS:
        found = re.search(message, reason)
        if found is not None:
            return found.expand(meaning).replace("|", "/")
    return re.sub(r"^(\S+: )?(\w*(Error|Exception): )?", "", reason).replace("|", "/")[:110]


def _ways(facts: Facts) -> str:
    ways = []
    for name in ("same", "differing"):
        way, opened = str(facts.get(f"save_{name}", "-")), facts.get(f"reload_{name}")
        ways.append("refused" if way.startswith(("refused", "FAILED")) or isinstance(opened, str) else way)
    return ways[0] if ways[0] == ways[1] else " / ".join(ways)
