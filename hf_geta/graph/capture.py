"""A model and example inputs -> one flat ATen graph, with the Python integers that its operators were given.

What is traced is a copy that shares the weights: hooks, caches, train mode, gradients and random state of the model
itself are never touched.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind

from hf_geta.graph.integers import Attribute, Equation
from hf_geta.graph.recording import IntegerRecorder, trace_attributes_

CONSTANT, INPUT = "a constant of the forward", "an input of the model"
TRACING_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass
class Capture:
    """A traced forward.

    `tensors` has every parameter and buffer under its first name (tied names share it), `sources` says for each
    placeholder of the graph which of them it is, or that it is an INPUT or a CONSTANT. `integers` holds, for nodes
    that were given traced ints, all int arguments in order; `attributes` the values of all int attributes.
    """

    graph_module: fx.GraphModule
    sources: dict[str, str]
    tensors: dict[str, torch.Tensor]
    attributes: dict[Attribute, int]
    integers: dict[str, list[int]]
    equalities: list[Equation]


def capture(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    """Trace `model(**inputs)` in eval mode, on fake tensors, without a cache.

    Raises:
        ValueError: if the forward does not take these inputs, naming what it takes.
    """
    check_inputs(model, inputs)
    twin = structural_copy(model).eval()
    recorder = IntegerRecorder()
    attributes = trace_attributes_(twin, recorder.equalities)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad(), recorder:
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # a cache on a copy that goes away
            program = torch.export.export(twin, (), dict(inputs), strict=False)
    except TRACING_ERRORS as error:
        raise ValueError(
            f"{type(model).__name__}.forward cannot be traced with inputs {describe(inputs)}: {error}"
        ) from error
    names = named_tensors(model)
    first_names = {id(tensor): name for name, tensor in reversed(names.items())}
    sources = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in names:
            sources[node.name] = first_names[id(names[spec.target])]
        else:
            sources[node.name] = INPUT if spec.kind == InputKind.USER_INPUT else CONSTANT
    integers, equalities = recorder.resolved(program.graph)
    tensors = {first_names[id(tensor)]: tensor for tensor in names.values()}
    return Capture(program.graph_module, sources, tensors, attributes, integers, equalities)


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that are not named as the forward's arguments are."""
    parameters = inspect.signature(model.forward).parameters.values()
    takes = ", ".join(parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD)
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(f"inputs={inputs!r}: write a dict with arguments of {type(model).__name__}.forward: {takes}.")
    open_ended = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters) and not takes
    if not open_ended and (unknown := ", ".join(key for key in inputs if key not in takes.split(", "))):
        raise ValueError(f"{type(model).__name__}.forward does not take {unknown}; it takes {takes}.")


def describe(inputs: Mapping[str, Any]) -> str:
    """The inputs in words: their names, types and shapes."""
    words = (
        f"{name}: {value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{name}: {value!r}"
        for name, value in inputs.items()
    )
    return "{" + ", ".join(words) + "}"


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by every name they have; a tied tensor comes once per name."""
    parameters = dict[str, torch.Tensor](model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def transient_buffers(model: nn.Module) -> Iterator[str]:
    """The names of the buffers that no checkpoint holds."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name


def structural_copy(model: nn.Module) -> nn.Module:
    """A deep copy of the modules, configs and all other Python state around the same parameters and buffers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in named_tensors(model).values()}
    return copy.deepcopy(model, memo)
