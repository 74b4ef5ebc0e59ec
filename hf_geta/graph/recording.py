"""While a model is traced: ints that remember their origin go in, and what operators are given of them is noted."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode

from hf_geta.graph.integers import (
    Attribute,
    Equation,
    Expression,
    SizeOf,
    TracedInt,
    expression_of,
    flat_integers,
    substitute,
)

MARK = "hf_geta_mark"  # key of nodes' metadata, which an export keeps
# How a forward runs while it is traced: without a cache, and experts by a product of any size, for any number of rows.
TRACEABLE = {"use_cache": False, "_experts_implementation_internal": "batched_mm"}
SHAPE_GETTER = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
COUNTING = (torch.Tensor.numel, torch.Tensor.nelement, torch.numel)
MAKING_TENSORS = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, torch.Tensor.new_tensor)


def trace_attributes_(model: nn.Module, equalities: list[Equation]) -> dict[Attribute, int]:
    """Replace the int attributes of modules, and of the configs they hold, by traced ones; returns their values.

    Every module gets a copy of its config, set to be `TRACEABLE`. The root's own config stays as it is: config.json is
    written from it, so a pruned model cannot have another one.
    """
    found: dict[Attribute, int] = {}

    def replace(owner: Any, prefix: str) -> None:
        for name, value in list(owner.__dict__.items()):
            path = f"{prefix}.{name}" if prefix else name
            if type(value) is int:
                found[Attribute(path)] = value
                owner.__dict__[name] = TracedInt(value, Attribute(path), equalities)
            elif is_config(value):
                owner.__dict__[name] = config = copy.copy(value)
                config.__dict__.update({name: value for name, value in TRACEABLE.items() if name in config.__dict__})
                if path != "config":
                    replace(config, path)

    for path, module in model.named_modules():
        replace(module, path)
    return found


def is_config(value: Any) -> bool:
    """Whether an object is a transformers config, told by what it can do."""
    return hasattr(value, "model_type") and hasattr(value, "to_dict") and hasattr(value, "__dict__")


class IntegerRecorder(TorchFunctionMode):
    """While active, sizes read from tensors are `TracedInt`s, and nodes that are given traced ints are noted.

    `integers` maps a node to all its int arguments in order, `equalities` has the comparisons that held in Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.integers: dict[fx.Node, list[int]] = {}
        self.equalities: list[Equation] = []
        self._marked: set[fx.Node] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        mode = get_proxy_mode()
        if mode is None:
            return result
        if func == SHAPE_GETTER or func is torch.Tensor.size:
            return self._traced_sizes(result, args, kwargs, mode.tracer)
        if func in COUNTING:
            return math.prod(self._traced_sizes(args[0].shape, args, kwargs, mode.tracer))
        if func is torch.Tensor.__len__:
            length = self._traced_sizes(result, (args[0], 0), kwargs, mode.tracer)
            return length.as_number() if isinstance(length, TracedInt) else length  # `len` makes a plain int of it
        if func is torch.Tensor.__getitem__:
            self._record_slices(result, *args, tracer=mode.tracer)
        else:
            traced = [value for value in flat_integers((args, kwargs)) if isinstance(value, TracedInt)]
            if func in MAKING_TENSORS:
                for value in traced:
                    value.as_number()
            elif traced:
                self._record(result, args, kwargs, mode.tracer)
        return result

    def _mark(self, node: Any) -> Any:
        """Mark a node, so that it is known again in the exported program, where it may have another name."""
        if node is not None:
            node.meta.setdefault(MARK, len(self._marked))
            self._marked.add(node)
        return node

    def _traced_sizes(self, result: Any, args: Any, kwargs: Any, tracer: Any) -> Any:
        if (node := self._mark(node_of(args[0], tracer))) is None:
            return result
        if type(result) is int:
            dim = args[1] if len(args) > 1 else kwargs["dim"]
            return TracedInt(result, SizeOf(node, dim % args[0].ndim), self.equalities)
        if not isinstance(result, torch.Size) or not all(type(size) is int for size in result):
            return result
        return torch.Size([TracedInt(size, SizeOf(node, dim), self.equalities) for dim, size in enumerate(result)])

    def _record(self, result: Any, args: Any, kwargs: dict[str, Any], tracer: Any) -> None:
        is_sequence = isinstance(result, tuple | list)
        node: Any = node_of(result[0] if is_sequence and result else result, tracer)
        if node is not None and is_sequence:
            node = node.args[0]  # split and its like: the results are getitem nodes
        if isinstance(node, fx.Node) and (integers := _lined_up(node, args, kwargs)) is not None:
            self.integers[self._mark(node)] = integers

    def _record_slices(self, result: Any, x: Any, index: Any, *, tracer: Any) -> None:
        slices = [part for part in (index if isinstance(index, tuple) else (index,)) if isinstance(part, slice)]
        if not any(isinstance(value, TracedInt) for part in slices for value in (part.start, part.stop)):
            return
        source, node = node_of(x, tracer), node_of(result, tracer)
        chain: list[Any] = []
        while isinstance(node, fx.Node) and node is not source and node.args:
            if node.target is torch.ops.aten.slice.Tensor:
                chain.insert(0, node)
            node = node.args[0]
        for node in chain:  # in the order of the dimensions, as the slices are; `:` leaves no node
            dim, start, stop = (*node.args[1:4], None)[:3]
            while slices:
                part = slices.pop(0)
                bounds = [dim, part.start or 0, stop if part.stop is None else part.stop]
                if [int(bound) for bound in bounds[1:]] == [start, stop]:
                    self.integers[self._mark(node)] = bounds
                    break

    def resolved(self, program: fx.GraphModule) -> tuple[dict[str, list[int]], list[Equation]]:
        """The notes by the names of the exported program's nodes; sizes that it no longer holds become constants."""
        parts = [part for part in program.modules() if isinstance(part, fx.GraphModule)]  # with those under autocast
        names = {node.meta[MARK]: node.name for part in parts for node in part.graph.nodes if MARK in node.meta}

        def resolve(leaf: Any) -> Expression:
            if not isinstance(leaf, SizeOf):
                return leaf
            name = names.get(leaf.node.meta[MARK])
            return leaf.node.meta["val"].shape[leaf.dim] if name is None else SizeOf(name, leaf.dim)

        def resolve_all(values: list[int]) -> list[int]:
            return [TracedInt(value, substitute(expression_of(value), resolve)) for value in values]

        integers = {
            names[node.meta[MARK]]: resolve_all(values)
            for node, values in self.integers.items()
            if node.meta[MARK] in names
        }
        equalities = dict.fromkeys(
            equation._replace(left=substitute(equation.left, resolve), right=substitute(equation.right, resolve))
            for equation in self.equalities
        )
        return integers, [equation for equation in equalities if equation.left != equation.right]


def _lined_up(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> list[int] | None:
    """The ints of a call in the order of a node's; those that only the node has (defaults) as they are.

    None where the call's ints are not the node's: then it computed with them first.
    """
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    positional = iter(list(flat_integers(args)))
    found: list[int] = []
    for name, value in (*zip(names, node.args, strict=False), *node.kwargs.items()):
        given = list(flat_integers((value,)))
        traced = list(flat_integers((kwargs[name],))) if name in kwargs else [next(positional, one) for one in given]
        found += traced if len(traced) == len(given) else given
        if [int(value) for value in found[len(found) - len(given) :]] != given:
            return None
    return found


def node_of(value: Any, tracer: Any) -> Any:
    """The graph node that computes a tensor while it is being traced; None for anything else."""
    slot = get_proxy_slot(value, tracer, None) if isinstance(value, torch.Tensor) else None
    proxy = getattr(slot, "proxy", slot)
    return getattr(proxy, "node", None)
