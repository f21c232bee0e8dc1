"""Layers that nobody would write, or that torch offers and hardly any language model uses: right or refused.

Like ``test_toys``, with layers that hold more than two projections, or state of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from secateur.errors import SecateurError
from secateur.graph import record
from secateur.surgery import protect_failing
from secateur.surgery.stand_in import randomise
from secateur.surgery.verify import checks

VOCAB, HIDDEN, WIDTH, HEADS = 61, 24, 36, 3


class Layer(nn.Module):
    """An up and a down projection, other modules by name, and a function of the layer and what was projected up."""

    def __init__(
        self,
        function: Callable[[Layer, torch.Tensor], torch.Tensor],
        rows: int = WIDTH,
        columns: int | None = None,
        **modules: nn.Module | nn.Parameter | torch.Tensor,
    ) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, rows), nn.Linear(columns or rows, HIDDEN)
        for name, module in modules.items():
            if isinstance(module, nn.Module | nn.Parameter):
                setattr(self, name, module)
            else:
                self.register_buffer(name, module)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.function(self, self.up(x)))


def plain() -> Layer:
    return Layer(lambda layer, x: x.relu())


class Toy(nn.Module):
    def __init__(self, *middle: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([plain(), *middle, plain()])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape) - 0.5)  # not empty: what lies in memory may be NaN


def over_positions(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return layer.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2).relu()


def heads(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values: ``[batch, heads, length, 8]`` each."""
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in x.chunk(3, -1))
    return q, k, v


def slopes(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Each head has a number of its own, which is a parameter."""
    q, k, v = heads(layer, x)
    weights = (q @ k.transpose(-1, -2) * layer.slope[:, None, None]).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def fixed_slopes(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Each head has a number of its own, which is computed from how many there are (ALiBi)."""
    q, k, v = heads(layer, x)
    steps = torch.arange(1, q.shape[1] + 1, device=x.device)[:, None, None]
    weights = (q @ k.transpose(-1, -2) * 2.0 ** (-8 * steps / q.shape[1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def talking(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Scores of all heads are mixed with each other."""
    q, k, v = heads(layer, x)
    scores = torch.einsum("bhqk,hg->bgqk", q @ k.transpose(-1, -2), layer.mix).softmax(-1)
    return (scores @ v).transpose(1, 2).flatten(-2)


def grouped_queries(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Four query heads share two keys and values, by what torch offers for it."""
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in x.split([32, 16, 16], -1))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(-2)


def rotated(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Neighbouring channels are pairs that are turned by an angle."""
    one, two = x[..., ::2], x[..., 1::2]
    return torch.stack([one * 0.6 - two * 0.8, one * 0.8 + two * 0.6], -1).flatten(-2).relu()


def in_place(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    x = x.relu().clone()
    x.mul_(2.0).add_(layer.shift)
    x[:, 1:] += x[:, :-1].clone()
    return x


def some_in_place(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    x = x.relu().clone()
    x[..., :5] = 0.5
    x[..., ::2] *= 3.0
    return x


def two_halves(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """One parameter holds two weights, one on the other."""
    one, two = F.linear(x, layer.both[:WIDTH]), F.linear(x, layer.both[WIDTH:])
    return one.relu() * two


def listed(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return sum((F.linear(x, weight).relu() for weight in layer.list), start=torch.zeros_like(x))


def recalled(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Channels look themselves up in a table of channels."""
    return layer.table(x.relu().argmax(-1)) + x.relu()


def gated(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Which of two experts takes a token is decided by a mask, and written in its place."""
    out = torch.zeros_like(x)
    chosen = layer.gate(x)[..., 0] > 0
    out[chosen], out[~chosen] = layer.one(x[chosen]).relu(), layer.two(x[~chosen]).tanh()
    return out


def mixture(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Every expert answers, and the best two are summed: one batched product over stacked experts."""
    scores = F.linear(x, layer.gate).softmax(-1)
    best, index = scores.topk(2, -1)
    every = torch.einsum("bti,eij->btej", x, layer.experts).relu()
    picked = every.gather(2, index[..., None].expand(-1, -1, -1, every.shape[-1]))
    return (picked * best[..., None]).sum(2)


LAYERS: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "grouped convolution": (lambda: Layer(over_positions, conv=nn.Conv1d(WIDTH, WIDTH, 3, 1, 2, groups=4)), None),
    "wide convolution": (lambda: Layer(over_positions, conv=nn.Conv1d(WIDTH, WIDTH, 3, 1, 2)), None),
    "depthwise convolution": (lambda: Layer(over_positions, conv=nn.Conv1d(WIDTH, WIDTH, 3, 1, 2, groups=WIDTH)), None),
    "transposed convolution": (lambda: Layer(over_positions, conv=nn.ConvTranspose1d(WIDTH, WIDTH, 3)), 0),
    "attention of torch": (
        lambda: Layer(lambda s, x: s.mha(x, x, x)[0], HIDDEN, mha=nn.MultiheadAttention(24, 3)),
        None,
    ),
    "gated recurrent unit": (lambda: Layer(lambda s, x: s.gru(x)[0], gru=nn.GRU(WIDTH, WIDTH, batch_first=True)), None),
    "long short-term memory": (lambda: Layer(lambda s, x: s.lstm(x)[0], lstm=nn.LSTM(WIDTH, WIDTH)), None),
    "bilinear": (lambda: Layer(lambda s, x: s.two(x, x).relu(), two=nn.Bilinear(WIDTH, WIDTH, WIDTH)), None),
    "slopes in a parameter": (lambda: Layer(slopes, 72, 24, slope=parameter(HEADS)), 1),
    "slopes in the code": (lambda: Layer(fixed_slopes, 72, 24), 0),
    "slopes in a buffer": (lambda: Layer(slopes, 72, 24, slope=torch.tensor([0.5, 0.25, 0.125])), 1),
    "talking heads": (lambda: Layer(talking, 72, 24, mix=parameter(HEADS, HEADS)), None),
    "grouped queries": (lambda: Layer(grouped_queries, 64, 32), 0),  # sizes of the split are written down
    "pairs that are turned": (lambda: Layer(rotated), None),
    "in place": (lambda: Layer(in_place, shift=parameter(WIDTH)), None),
    "some in place": (lambda: Layer(some_in_place), None),
    "two weights in one": (lambda: Layer(two_halves, both=parameter(2 * WIDTH, WIDTH)), None),
    "a list of parameters": (
        lambda: Layer(listed, list=nn.ParameterList(parameter(WIDTH, WIDTH) for _ in range(3))),
        None,
    ),
    "chosen by a buffer": (lambda: Layer(lambda s, x: x.relu()[..., s.order], order=torch.arange(WIDTH).flip(0)), 0),
    "masked by a buffer": (
        lambda: Layer(lambda s, x: x.relu()[..., s.mask], columns=18, mask=torch.arange(36) % 2 > 0),
        0,
    ),
    "a table of channels": (lambda: Layer(recalled, table=nn.Embedding(WIDTH, WIDTH)), None),
    "divided by the width": (lambda: Layer(lambda s, x: x.relu() / math.sqrt(x.shape[-1])), 0),
    "centred by the width": (lambda: Layer(lambda s, x: x.relu() - x.relu().sum(-1, keepdim=True) / x.shape[-1]), 0),
    "norm of the root": (lambda: Layer(lambda s, x: s.norm(x.relu()), norm=nn.RMSNorm(WIDTH)), 1),
    "norm in groups": (
        lambda: Layer(lambda s, x: s.norm(x.flatten(0, 1)).view(x.shape).relu(), norm=nn.GroupNorm(4, WIDTH)),
        None,
    ),
    "norm of batches": (
        lambda: Layer(lambda s, x: s.norm(x.transpose(1, 2)).transpose(1, 2).relu(), norm=nn.BatchNorm1d(WIDTH)),
        None,
    ),
    "norm in the code": (lambda: Layer(lambda s, x: F.layer_norm(x.relu(), x.shape[-1:])), 0),
    "slope of each channel": (
        lambda: Layer(lambda s, x: s.act(x.transpose(1, 2)).transpose(1, 2), act=nn.PReLU(WIDTH)),
        None,
    ),
    "weights with a norm": (
        lambda: Layer(lambda s, x: s.inner(x).relu(), inner=weight_norm(nn.Linear(WIDTH, WIDTH))),
        None,
    ),
    "experts by a mask": (
        lambda: Layer(gated, gate=nn.Linear(WIDTH, 1), one=nn.Linear(WIDTH, WIDTH), two=nn.Linear(WIDTH, WIDTH)),
        None,
    ),
    "experts all at once": (
        lambda: Layer(mixture, WIDTH, 10, gate=parameter(5, WIDTH), experts=parameter(5, WIDTH, 10)),
        None,
    ),
}


def tied_layers() -> Toy:
    """The middle layer has the weights of the first one, and one of its own."""
    toy = Toy(plain())
    toy.layers[1].up = toy.layers[0].up
    return toy


def one_layer_twice() -> Toy:
    """The same layer stands in two places."""
    middle = plain()
    return Toy(middle, middle)


def tied_embedding() -> Toy:
    """Tokens that the middle layer thinks of are looked up in the embedding, transposed, which is the head as well."""
    toy = Toy()
    toy.head.weight = toy.embed.weight
    recall = Layer(lambda s, x: (x @ s.tokens.weight.T).softmax(-1) @ s.tokens.weight, HIDDEN, tokens=toy.embed)
    toy.layers.insert(1, recall)
    return toy


MODELS: dict[str, Callable[[], Toy]] = {
    "tied layers": tied_layers,
    "one layer twice": one_layer_twice,
    "tied embedding": tied_embedding,
}


def right_or_refused(toy: Toy) -> list[str]:
    """Names of the groups of the middle layer that are offered; everything that is offered is cut exactly."""
    randomise(toy)
    toy.eval()
    run = record(toy)
    for kinds in ((), ("hidden", "vocab", "expert", "state", "query", "layer")):
        graph = protect_failing(toy, run.graph.opened(kinds))  # type: ignore[arg-type]
        for seed in range(2):
            torch.manual_seed(seed)
            found = checks(toy, 0.5, replace(run, graph=graph))
            wrong = [check for check in found if not check.ok and "no visible effect" not in check.message]
            assert wrong == []
    graph = protect_failing(toy, run.graph)
    return [group.name for group in graph.prunable if group.layer == 1]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    make, expected = LAYERS[name]
    torch.manual_seed(0)
    toy = Toy(make())
    try:
        offered = right_or_refused(toy)
    except SecateurError:  # a model that cannot be traced says so
        assert expected in (0, None)
        return
    assert expected is None or len(offered) == expected, offered


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    torch.manual_seed(0)
    right_or_refused(MODELS[name]())


def tiled_keys(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    """Four query heads share two keys and values in turns, and not in runs: the n-th uses the one of n mod 2."""
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in x.split([32, 16, 16], -1))
    k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(-2)


ODD_CALLS: dict[str, Callable[[], Layer]] = {
    "a dimension added in place": lambda: Layer(lambda s, x: x.clone().unsqueeze_(1).squeeze_(1).relu()),
    "a quantile": lambda: Layer(lambda s, x: x.relu() - x.quantile(0.5)),
    "nothing joined with nothing": lambda: Layer(lambda s, x: x.relu() + torch.cat([x[:, :0], x[:, :0]], 1).sum()),
    "keys in turns": lambda: Layer(tiled_keys, 64, 32),
}


@pytest.mark.parametrize("name", ODD_CALLS)
def test_what_is_not_understood_is_protected_and_the_rest_can_be_cut(name: str) -> None:
    torch.manual_seed(0)
    toy = Toy(ODD_CALLS[name]())
    right_or_refused(toy)
    assert {"layers.0.mlp", "layers.2.mlp"} <= {group.name for group in record(toy).graph.prunable}
