"""A model and example inputs -> one flat ATen graph, with the Python integers that its operators were given.

What is traced is a copy that shares the weights: hooks, caches, train mode, gradients and random state of the model
itself are never touched. (Hooks of the copy run, on what is traced.)
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import fx, nn
from transformers import PreTrainedModel

from hf_geta.graph.integers import Attribute, Equation
from hf_geta.graph.recording import IntegerRecorder, trace_attributes_
from hf_geta.graph.tracing import Trace, export, named_tensors, repeated_keys, trace_concretely
from hf_geta.quantization.quantizers import Quantizer

logger = logging.getLogger(__name__)

ATTENTION = ("sdpa", "eager")  # what transformers computes by torch's operators
MAX_CONSTANTS = 64  # ints in a list that a forward spells out
TRACING_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


@dataclass
class Capture:
    """A traced forward.

    `tensors` has every parameter and buffer under its first name (tied names share it), `sources` says for each
    placeholder of the graph which of them it is, or that it is an INPUT or a CONSTANT; `constants` has the numbers of
    short lists of ints that the forward spells out. `integers` holds, for nodes that were given traced ints, all int
    arguments in order; `attributes` the values of all int attributes; `classes` those of all modules, after the
    forward. `is_concrete`: the graph is the path that these inputs took through data-dependent control flow; others
    may take another.
    """

    graph_module: fx.GraphModule
    sources: dict[str, str]
    constants: dict[str, list[int]]
    tensors: dict[str, torch.Tensor]
    attributes: dict[Attribute, int]
    integers: dict[str, list[int]]
    equalities: list[Equation]
    classes: dict[str, type[nn.Module]]
    is_concrete: bool = False


def capture(model: nn.Module, inputs: Mapping[str, Any]) -> Capture:
    """Trace `model(**inputs)` in eval mode, without a cache.

    On fake tensors where the graph does not depend on their numbers, else on the tensors themselves.

    Raises:
        ValueError: if the forward does not take these inputs, naming what it takes.
    """
    check_inputs(model, inputs)
    _check_forwards(model)
    try:
        return _capture(model, inputs, export)
    except TRACING_ERRORS as error:
        try:
            captured = _capture(model, inputs, trace_concretely)
        except TRACING_ERRORS as second:
            if should_reduce_batch_size(second):
                raise
            first = type(error).__name__
            raise ValueError(
                f"{type(model).__name__}.forward cannot be traced with inputs {describe(inputs)}: {second}; "
                f"it takes {_takes(model)} "
                f"(on fake tensors: {first}: {str(error).partition(chr(10))[0]})"
            ) from second
        captured.is_concrete = True
        logger.warning(
            "%s could not be exported (%s), so it was traced along the path that these inputs take.",
            type(model).__name__,
            str(error).strip().partition("\n")[0],
        )
        return captured


def _capture(model: nn.Module, inputs: Mapping[str, Any], trace: Callable[..., Trace]) -> Capture:
    twin = plain_copy(model).train().eval()  # entering train mode, models forget what they computed from weights
    for module in twin.modules():
        if isinstance(module, Quantizer):
            module.blocks = None  # which inputs share a multiplier ties no groups: what is left is divided anew
    recorder = IntegerRecorder()
    attributes = trace_attributes_(twin, recorder.equalities)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad(), recorder, repeated_keys():
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)  # a cache on a copy that goes away
        traced = trace(twin, inputs)
    names = named_tensors(model)
    first_names = {id(tensor): name for name, tensor in reversed(names.items())}
    sources = {
        node: first_names[id(names[source])] if source in names else source for node, source in traced.sources.items()
    }
    constants = {
        name: tensor.tolist()
        for name, tensor in traced.constants.items()
        if tensor.dtype == torch.int64 and tensor.ndim == 1 and tensor.numel() <= MAX_CONSTANTS
    }
    integers, equalities = recorder.resolved(traced.graph_module)
    tensors = {first_names[id(tensor)]: tensor for tensor in names.values()}
    classes = {name: type(module) for name, module in twin.named_modules(remove_duplicate=False)}
    return Capture(traced.graph_module, sources, constants, tensors, attributes, integers, equalities, classes)


def forget_wrappers_(twin: nn.Module) -> None:
    """Give a copy its class's forward back, where the original was given a method around it.

    accelerate's, for bf16 and fp16, casts (its own `unwrap_model` would take transformers' decorators off as well).
    trl's, for its fused loss, has the original's forward in its closure: the copy would run the original.
    """
    for module in twin.modules():
        own = vars(module)
        if "_original_forward" in own:  # accelerate's name for what it went around
            own["forward"] = own.pop("_original_forward")
        forward = own.get("forward")
        if getattr(forward, "__func__", None) is type(module).forward or _runs_another(forward, module):
            del own["forward"]


def _runs_another(forward: Any, module: nn.Module) -> bool:
    """Whether a method that was set on `module` has a method of another module in its closure."""
    cells = getattr(getattr(forward, "__func__", None), "__closure__", None) or ()
    empty = types.CellType()  # of a variable without a value
    owners = [getattr(cell.cell_contents, "__self__", None) for cell in cells if cell != empty]
    return any(isinstance(owner, nn.Module) and owner is not module for owner in owners)


def check_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that are not named as the forward's arguments are."""
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(
            f"inputs={inputs!r}: write a dict with arguments of {type(model).__name__}.forward: {_takes(model)}."
        )
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    if unknown := ", ".join(key for key in inputs if key not in parameters):
        raise ValueError(f"{type(model).__name__}.forward does not take {unknown}; it takes {_takes(model)}.")


def _check_forwards(model: nn.Module) -> None:
    """Refuse what a copy does not take along: it would run the original's modules, at the original's sizes."""
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled: give the model itself (compiled._orig_mod), and compile it later.")
    for name, module in model.named_modules():
        if isinstance(vars(module).get("forward"), types.FunctionType):
            raise ValueError(
                f"{name or type(module).__name__} has a function as its own forward, which stays with the original "
                "when the model is copied: write it as a method of a class, or set it afterwards."
            )


def _takes(model: nn.Module) -> str:
    return ", ".join(inspect.signature(model.forward).parameters)


def describe(inputs: Mapping[str, Any]) -> str:
    """The inputs in words: their names, types and shapes."""
    words = (
        f"{name}: {value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{name}: {value!r}"
        for name, value in inputs.items()
    )
    return "{" + ", ".join(words) + "}"


def transient_buffers(model: nn.Module) -> Iterator[str]:
    """The names of the buffers that no checkpoint holds."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name in module._non_persistent_buffers_set:
            yield f"{path}.{name}" if path else name


def structural_copy(
    model: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor] = operator.attrgetter("data")
) -> nn.Module:
    """A deep copy of the modules, configs and all other Python state, with tensors of its own around the same numbers.

    Args:
        convert: what becomes of the numbers: shared as they are, or cast, or made fake. Ties stay.
    """
    memo: dict[int, Any] = {}
    for tensor in named_tensors(model).values():
        if id(tensor) not in memo:
            converted = convert(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(converted, tensor.requires_grad) if is_parameter else converted
    return copy.deepcopy(model, memo)


def plain_copy(model: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor] = operator.attrgetter("data")) -> Any:
    """A `structural_copy` that computes the same by torch's own operators, in the precision of its tensors.

    No wrapper around its forward comes along, such as accelerate's autocast, nor a kernel of attention (flash, flex),
    of which a trace sees one opaque operator, and which takes some devices and dtypes only.
    """
    twin = structural_copy(model, convert)
    forget_wrappers_(twin)
    for part in twin.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation not in (None, *ATTENTION):
            part.set_attn_implementation("eager")
            with contextlib.suppress(ValueError):  # some have no other
                part.set_attn_implementation("sdpa")
    return twin
