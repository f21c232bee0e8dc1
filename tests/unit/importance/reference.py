"""The criteria once more, slowly and plainly: one unit, one row, one element at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from secateur.types import DependencyGraph, Member, NodeGroup


def rows_of(member: Member, unit: int) -> list[int]:
    return [offset + unit * member.stride + step for offset in member.offsets for step in range(member.width)]


def slices(parameter: torch.Tensor, member: Member, unit: int) -> list[torch.Tensor]:
    """The slices of a parameter that belong to a unit."""
    return [parameter.select(member.axis, row) for row in rows_of(member, unit)]


def magnitude(model: nn.Module, group: NodeGroup, over: str) -> list[float]:
    parameters = dict(model.named_parameters())
    scores = []
    for unit in range(group.size):
        norms, squares = 0.0, 0.0
        for member in group.members:
            for piece in slices(parameters[member.parameter].detach(), member, unit):
                square = sum(float(value) ** 2 for value in piece.flatten())
                squares += square
                norms += square**0.5 if member.role == "in" else 0.0
        scores.append(norms if over == "consumers" else squares**0.5)
    return scores


def wanda(model: nn.Module, group: NodeGroup, ids: torch.Tensor, transposed: bool = False) -> list[float]:
    """``ids``: all blocks at once. Only for groups that are consumed by plain linears."""
    parameters, inputs = dict(model.named_parameters()), {}

    def keep(name: str) -> None:
        module = model.get_submodule(name.rpartition(".")[0])

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs[name] = args[0].reshape(-1, args[0].shape[-1])

        hooks.append(module.register_forward_pre_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    consumers = [member for member in group.members if member.role == "in"]
    for member in consumers:
        keep(member.parameter)
    with torch.no_grad():
        model(input_ids=ids)
    for handle in hooks:
        handle.remove()
    scores = []
    for unit in range(group.size):
        score = 0.0
        for member in consumers:
            weight, x = parameters[member.parameter].detach(), inputs[member.parameter]
            for channel in rows_of(member, unit):
                size = float((x[:, channel] ** 2).mean()) ** 0.5
                column = weight.select(member.axis, channel)
                score += sum(abs(float(value)) * size for value in column) / len(column)
        scores.append(score)
    return scores


def taylor(model: nn.Module, graph: DependencyGraph, ids: torch.Tensor, form: str) -> dict[str, list[float]]:
    """``ids``: all blocks in one batch; gradients of every parameter by one plain backward pass."""
    parameters = dict(model.named_parameters())
    loss = model(input_ids=ids, labels=ids).loss
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True)
    )
    scores: dict[str, list[float]] = {}
    for group in graph.prunable:
        scores[group.name] = []
        for unit in range(group.size):
            total = 0.0
            for member in group.members:
                weights = slices(parameters[member.parameter].detach(), member, unit)
                gradient = gradients[member.parameter]
                assert gradient is not None
                for w, g in zip(weights, slices(gradient, member, unit), strict=True):
                    product = w * g
                    total += float(product.abs().sum() if form == "element" else product.sum())
            scores[group.name].append(abs(total))
    return scores


def fisher(model: nn.Module, graph: DependencyGraph, ids: torch.Tensor) -> dict[str, list[float]]:
    """A switch for every unit, written into what consumes it (columns of W, and of LoRA's A beside it)."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = {group.name: torch.zeros(group.size) for group in graph.prunable}
    for block in ids:
        switches = {group.name: torch.ones(group.size, requires_grad=True) for group in graph.prunable}
        switched = dict(parameters)
        for group in graph.prunable:
            for member in group.members:
                if member.role == "in":
                    weight = switched[member.parameter]
                    factor = torch.ones(weight.shape[member.axis])
                    for unit in range(group.size):
                        for row in rows_of(member, unit):
                            factor = factor.index_put((torch.tensor(row),), switches[group.name][unit])
                    shape = [-1 if axis == member.axis else 1 for axis in range(weight.dim())]
                    switched[member.parameter] = weight * factor.reshape(shape)
        named = {"input_ids": block[None], "labels": block[None]}
        loss = torch.func.functional_call(model, switched, kwargs=named).loss
        for name, gradient in zip(switches, torch.autograd.grad(loss, list(switches.values())), strict=True):
            total[name] += gradient**2 / len(ids)
    return {name: values.tolist() for name, values in total.items()}


def hesso(model: nn.Module, group: NodeGroup, proxy: str, downhill: Mapping[str, torch.Tensor]) -> list[float]:
    """``downhill``: parameter → the direction in which the loss falls. Unit by unit, as flat vectors."""
    parameters = dict(model.named_parameters())
    scores = []
    for unit in range(group.size):
        x: list[float] = []
        d: list[float] = []
        for member in group.members:
            if member.role == "out" and ".lora_" not in member.parameter:
                pieces = slices(parameters[member.parameter].detach(), member, unit)
                x += [float(value) for piece in pieces for value in piece.flatten()]
                way = downhill.get(member.parameter, torch.zeros_like(parameters[member.parameter]))
                d += [float(value) for piece in slices(way, member, unit) for value in piece.flatten()]
        dot = sum(a * b for a, b in zip(x, d, strict=True))
        x_norm, d_norm = (sum(value**2 for value in values) ** 0.5 for values in (x, d))
        scores.append(
            {
                "magnitude": x_norm,
                "average-magnitude": x_norm / len(x),
                "cosine": 1 + (dot / (x_norm * d_norm) if d_norm else 0.0),
                "first-order": abs(dot),
                "second-order": dot**2 / 2,
            }[proxy]
        )
    return scores
