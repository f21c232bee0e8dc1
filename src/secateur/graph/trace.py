"""Discovering the graph: one tiny forward pass, recorded operator by operator."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from secateur.errors import ModelError
from secateur.graph.axes import Axis, Conflict, leaf, mark, refuse, unify
from secateur.graph.blocks import WatchBlocks
from secateur.graph.groups import find_groups
from secateur.graph.rules import RULES, protect
from secateur.graph.symbols import Call, SymbolTable, operator_name
from secateur.graph.twin import twin_of
from secateur.types import DependencyGraph

BATCH, LENGTH = 2, 7
EMPTY_ALLOWED = {
    f"aten.{name}"
    for name in (
        "cat mm addmm linear t transpose split split_with_sizes silu gelu mul add zeros_like new_zeros new_empty detach"
    ).split()
}
"""Operators whose rules say the same of an empty tensor: what is left for an expert that no token was sent to."""


@dataclass(frozen=True)
class Trace:
    """A recorded run: the graph that was found, and the operators with the symbols of their tensors."""

    graph: DependencyGraph
    calls: Sequence[Call]
    table: SymbolTable
    units: Mapping[str, Axis]
    """What each group's units are, by the group's name: a leaf; of query heads, the KV heads' and the one within."""
    token_ids: torch.Tensor
    logits: torch.Tensor


def trace(model: nn.Module) -> DependencyGraph:
    """The node groups of a causal LM, plain or with peft adapters, with real weights or on the meta device.

    The model is not changed, and its weights are not read. Raises ModelError when its forward pass cannot be recorded.
    """
    return record(model).graph


def record(model: nn.Module) -> Trace:
    """Run a weightless twin of ``model`` on a few tokens and find its node groups.

    Code that reads computed values cannot run without weights. For such code real weights are used, if there are any.
    """
    try:
        return _record(twin_of(model), model)
    except ModelError:
        raise
    except Exception as error:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise _cannot(model, error) from error
    try:
        return _record(twin_of(model, weights=True), model)
    except ModelError:
        raise
    except Exception as error:
        raise _cannot(model, error) from error


def _cannot(model: nn.Module, error: Exception) -> ModelError:
    first_line = (str(error).splitlines() or [""])[0]
    return ModelError(
        f"Cannot trace {type(model).__name__}: its forward pass failed with {type(error).__name__}: {first_line}. "
        "Give a causal language model whose forward takes input_ids and returns logits."
    )


def _record(twin: nn.Module, model: nn.Module) -> Trace:
    table = SymbolTable(
        parameters={id(parameter): name for name, parameter in twin.named_parameters()},
        persistent_buffers=_buffers(twin, persistent=True),
        other_buffers=_buffers(twin, persistent=False),
    )
    embedding = _input_embedding(twin)
    vocabulary = leaf(embedding.shape[0])
    mark(vocabulary, "vocab")
    mark(table[embedding].axes[1], "hidden")
    token_ids = (torch.arange(BATCH * LENGTH) * 5 + 3).reshape(BATCH, LENGTH) % embedding.shape[0]
    table.put(token_ids, (leaf(BATCH), leaf(LENGTH)), vocabulary)
    recorder = Recorder(table)
    blocks = WatchBlocks(twin, recorder.calls)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Escapes(table), recorder, blocks:
        logits = logits_of(twin, token_ids)
    output = table[logits].axes[-1]
    if logits.shape[-1] == embedding.shape[0]:
        unify(output, vocabulary)
    mark(output, "vocab")
    graph, units = find_groups(model, table, recorder.calls, blocks.spans)
    return Trace(graph, recorder.calls, table, units, token_ids, logits)


def _buffers(twin: nn.Module, persistent: bool) -> dict[int, str]:
    found = {}
    for path, module in twin.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if (name not in module._non_persistent_buffers_set) == persistent:
                found[id(buffer)] = f"{path}.{name}" if path else name
    return found


def _input_embedding(twin: Any) -> torch.Tensor:
    try:
        return twin.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(twin).__name__} has no input embedding, and is not a causal language model. Give a model that "
            "AutoModelForCausalLM builds."
        ) from error


def logits_of(model: nn.Module, token_ids: torch.Tensor, use_cache: bool = False, **more: Any) -> torch.Tensor:
    """Logits ``[batch, length, vocabulary]``; the model may return them directly or as an attribute.

    ``use_cache``: whether the model makes a cache, if it has this argument; ``more``: further arguments.
    """
    base = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    caching = {"use_cache": use_cache} if "use_cache" in inspect.signature(base.forward).parameters else {}
    return _logits(model(input_ids=token_ids, **caching, **more))


def _logits(output: Any) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise ModelError("The model's forward returns no logits, and it is not a causal language model.")
    return logits


class Escapes(TorchFunctionMode):
    """Notices what passes by the operators: values that leave the run (``tolist``), and constants that enter it.

    Numbers written in the code would lose their values on the meta device: those of ``torch.tensor``, and lists used
    as indices, which become tensors on the device of what they index.
    """

    def __init__(self, table: SymbolTable) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            symbol = self.table[args[0]]
            for axis in (*symbol.axes, symbol.domain or ()):
                refuse(axis, f"its values steer the code (.{func.__name__}())")
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__getitem__:
            args = (args[0], _lists_to_tensors(args[1]))
        elif func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _lists_to_tensors(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(_lists_to_tensors(item) for item in key)
    return torch.tensor(key) if isinstance(key, list) and all(type(item) is int for item in key) else key


class Recorder(TorchDispatchMode):
    """Runs every operator, follows the axes through it, and keeps the list of calls.

    Weights and what is computed from them may be on the meta device, while integers that are made from nothing stay on
    the CPU, since code that builds masks looks at their values.
    """

    def __init__(self, table: SymbolTable) -> None:
        super().__init__()
        self.table = table
        self.calls: list[Call] = []
        self._unreal: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = self._run(func, args, kwargs)
        call = Call(func, args, kwargs, out)
        self.calls.append(call)
        self._follow(call)
        return out

    def _follow(self, call: Call) -> None:
        rule = RULES.get(str(call.func)) or RULES.get(call.name)
        if rule is None:
            protect(self.table, call, f"the operator {call.name} has no rule")
            return
        if call.name not in EMPTY_ALLOWED and any(tensor.numel() == 0 for tensor in call.tensors):
            protect(self.table, call, f"an empty tensor ({call.name})")
            return
        try:
            rule(self.table, call)
        except Conflict as conflict:
            protect(self.table, call, f"conflicting factorisation ({call.name}: {conflict})")
        except Exception:  # shapes and arguments that nobody thought of: what is understood elsewhere can still be cut
            protect(self.table, call, f"the operator {call.name} has no rule for these arguments")

    # --- devices ----------------------------------------------------------------------------------------------------

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = Call(func, args, kwargs, None).tensors
        meta = any(tensor.is_meta for tensor in tensors)
        real = [tensor for tensor in tensors if not tensor.is_meta]
        if str(kwargs.get("device")) == "meta" and _stays_real(func, tensors, args, kwargs):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if self._unreal and any(_storage(tensor) in self._unreal for tensor in real):
            if func is torch.ops.aten._local_scalar_dense.default:
                raise RuntimeError("the code looks at a value that was computed from weights")
            out = func(*args, **kwargs) if not meta else self._on_meta(func, args, kwargs)
            self._unreal |= {_storage(tensor) for tensor in Call(func, (), {}, out).outputs if not tensor.is_meta}
            return out
        if meta and kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":
            kwargs = {**kwargs, "device": torch.device("meta")}  # there are no values that could be moved
        if not meta or not real:
            return func(*args, **kwargs)
        return self._on_meta(func, args, kwargs)

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Operands on both devices meet on meta; a real target that is written to holds no real values any more."""
        written = args[0] if func._schema.is_mutable and args and isinstance(args[0], torch.Tensor) else None
        out = func(*tree_map(_to_meta, args), **tree_map(_to_meta, kwargs))
        if written is None or written.is_meta:
            return out
        self._unreal.add(_storage(written))
        return written


def _stays_real(func: Any, tensors: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator that was asked for a result on meta makes integers that need no weights."""
    if any(tensor.is_meta for tensor in tensors):
        return False
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else None)
    if dtype is None:  # the range of integers is one of integers; other factories make floats
        return operator_name(func) == "aten.arange" and all(isinstance(arg, int) for arg in args)
    return not dtype.is_floating_point


def _to_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) and not value.is_meta else value


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
