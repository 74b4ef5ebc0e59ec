"""One forward -> a graph of ATen operators: by torch.export on fake tensors, or of the operators that really ran."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from transformers.integrations import sdpa_attention

TALKERS = ("torch._subclasses.fake_tensor", "torch.export", "torch.fx.experimental.symbolic_shapes")
CONSTANT, INPUT, OUTPUT = "a constant of the forward", "an input of the model", "an output of the model"


@dataclass
class Trace:
    """A graph, and what each of its placeholders (or constant attributes) is: a name of the model's, or the tensor."""

    graph_module: fx.GraphModule
    sources: dict[str, str]
    constants: dict[str, torch.Tensor]


def export(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """The graph by `torch.export`, on fake tensors."""
    with quiet_torch(), only_tensors_returned(model):
        program = torch.export.export(model, (), dict(inputs), strict=False)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    sources, constants = {}, {}
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            sources[node.name] = spec.target
        else:
            sources[node.name] = INPUT if spec.kind == InputKind.USER_INPUT else CONSTANT
        if spec.kind == InputKind.CONSTANT_TENSOR:
            constants[node.name] = program.constants[spec.target]
    return Trace(program.graph_module, sources, constants)


def trace_concretely(model: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """The graph of the operators that really ran, at the same level as an export's."""
    tensors, given = named_tensors(model), dict(inputs)
    names = [*tensors, *given]
    leaves: list[str] = []
    for name, value in zip(names, (*tensors.values(), *given.values()), strict=True):
        leaves += [name if name in tensors else INPUT] * len(pytree.tree_leaves(value))

    def forward(tensors: dict[str, torch.Tensor], given: dict[str, Any]) -> Any:
        return torch.func.functional_call(model, tensors, (), given, tie_weights=True)

    with fx.traceback.preserve_node_meta(), _module_stack(model), only_tensors_returned(model):
        graph_module = make_fx(forward, pre_dispatch=True, _error_on_data_dependent_ops=False)(tensors, given)
    graph_module.graph.eliminate_dead_code()  # such as sums that only a decision looked at
    placeholders = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    constants = {
        node.name: getattr(graph_module, node.target) for node in graph_module.graph.nodes if node.op == "get_attr"
    }
    return Trace(graph_module, dict(zip(placeholders, leaves, strict=True)), constants)


@contextlib.contextmanager
def _module_stack(model: nn.Module) -> Iterator[None]:
    """While active, traced nodes know in which modules' forwards they ran, as in an export."""
    stack: dict[str, Any] = {}

    def enter(path: str, module: nn.Module) -> None:
        stack[f"{path}@{len(stack)}"] = (path, type(module))
        fx.traceback.current_meta["nn_module_stack"] = dict(stack)

    def leave() -> None:
        stack.popitem()
        fx.traceback.current_meta["nn_module_stack"] = dict(stack)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda module, _, path=path: enter(path, module)))
        handles.append(module.register_forward_hook(lambda *_: leave()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def repeated_keys() -> Iterator[None]:
    """While active, keys are repeated for grouped queries, as they are beside a mask and in eager attention.

    Without a mask, which transformers leaves out where nothing is padded, attention is told to repeat them itself: a
    trace would not see how many queries a module counts for each key.
    """
    original = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_, **__: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = original


@contextlib.contextmanager
def only_tensors_returned(model: nn.Module) -> Iterator[None]:
    """While active, `model` returns its float tensors only: tracers do not know all kinds of caches."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> list[Tensor]:
        return list(float_tensors(original(*args, **kwargs)).values())

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def float_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """All float tensors in nested mappings and sequences, by name; caches are not looked into."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() and output.numel() else {}
    parts: Any = ()
    if isinstance(output, Mapping | list | tuple):
        parts = output.items() if isinstance(output, Mapping) else enumerate(output)
    found: dict[str, Tensor] = {}
    for key, value in parts:
        found.update(float_tensors(value, f"{name}.{key}" if name else str(key)))
    return found


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers by every name they have; a tied tensor comes once per name."""
    parameters = dict[str, torch.Tensor](model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


@contextlib.contextmanager
def quiet_torch(*more: str) -> Iterator[None]:
    """While active, torch does not print graphs and tracebacks of what is only tried; `more`: loggers as well."""
    talkers = [logging.getLogger(name) for name in (*TALKERS, *more)]
    disabled = [talker.disabled for talker in talkers]
    try:
        for talker in talkers:
            talker.disabled = True
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for talker, before in zip(talkers, disabled, strict=True):
            talker.disabled = before
