"""Ways of calling a model, because its code may depend on the length of a text, on padding or on a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.finite import all_finite
from secateur.graph.trace import logits_of

LENGTH = 12
"""Tokens of the text that most checks read."""
LONG = 24
"""Tokens of a long one: more than the windows, chunks and blocks of attention of a stand-in."""
_PADDING = 3
_SAME = 1e-5
"""Of the largest logit: how far two answers of one model may be apart."""

Way = Callable[[Any, torch.Tensor], torch.Tensor]
"""Logits ``[batch, positions, vocabulary]`` of a model for token ids ``[batch, LENGTH]``."""


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, ids)


def filling_a_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, ids, use_cache=True)


def _one_token(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return plain(model, ids[:, :1])


def _long(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return plain(model, torch.cat([ids, ids.flip(1)], 1)[:, :LONG])


def _padded(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The first row is shorter, with its padding on the left; that is read with the others and not answered."""
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    with torch.no_grad():
        return logits_of(model, ids, attention_mask=mask)[:, _PADDING:]


def _with_a_cache(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last token is read alone, and what came before it from the cache."""
    with torch.no_grad():
        first = model(input_ids=ids[:, :-1], use_cache=True)
        name = next((name for name in ("past_key_values", "cache_params") if first.get(name) is not None), None)
        if name is None:
            raise ModelError("The model makes no cache.")
        return torch.Tensor(model(input_ids=ids[:, -1:], use_cache=True, **{name: first[name]}).logits)


_OTHERS: Mapping[str, Way] = {
    "one token": _one_token,
    "longer text": _long,
    "padded text": _padded,
    "a cache": _with_a_cache,
}


def other_ways(whole: Callable[[], Any], ids: torch.Tensor) -> dict[str, Way]:
    """Those ways besides ``plain`` in which the model works that ``whole`` makes copies of: what each is, and the way.

    Every way gets a copy of its own, since there are families that change themselves while they run.
    """
    return {name: way for name, way in _OTHERS.items() if works(way, whole, ids)}


def works(way: Way, whole: Callable[[], Any], ids: torch.Tensor) -> bool:
    """Whether the model that ``whole`` makes copies of answers by numbers when it is asked in this way.

    They must be the same numbers again: where a model draws some, two copies differ, whatever is cut.
    """
    try:
        first, second = way(whole(), ids), way(whole(), ids)
    except Exception:  # whatever a family raises that knows no padding, or has no such cache
        return False
    return all_finite(first) and torch.allclose(first, second, rtol=0, atol=_SAME * max(1.0, float(first.abs().max())))
