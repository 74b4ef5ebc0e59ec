"""Stacked experts as layers: transformers keeps the weights of all experts of a layer in one 3-D parameter each.

`split_experts_` puts a `StackedLinear` in the place of such a parameter: a layer that can be quantized, calibrated,
pruned and packed as any other. The parameter stays the same object, under the name `<experts>.gate_up_proj.weight`;
routers are left alone.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

logger = logging.getLogger(__name__)

IMPLEMENTATION = "geta"  # the name of our forward, among those that transformers knows for experts
PROJECTIONS = ("gate_up_proj", "down_proj")
# What transformers' decorator for experts leaves on a module, and every forward of experts goes by.
TRAITS = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


class StackedLinear(nn.Module):
    """One linear map for each expert: weight (experts, out, in), or (experts, in, out) if `is_transposed`.

    Called with rows and what `per_expert` has for their expert; indexed by experts as the parameter that it stands for.
    """

    weight: Any

    def __init__(self, weight: nn.Parameter, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = weight
        self.register_parameter("bias", None)
        self._is_hf_initialized = True  # transformers has nothing to initialize here

    def per_expert(self) -> Any:
        """Expert -> what `forward` takes for it."""
        return self.weight.unbind(0)  # indexed one by one, each expert's gradient would be as large as the stack

    def forward(self, x: Tensor, weight: Any) -> Tensor:
        """Rows (rows, in) through one expert: (rows, out)."""
        return self.product(x, weight)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x times the weight of one expert."""
        return nn.functional.linear(x, weight.t() if self.is_transposed else weight)

    def __getitem__(self, experts: Any) -> Tensor:
        return self.weight[experts]

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}, is_transposed={self.is_transposed}"


def router_names(model: nn.Module) -> set[str]:
    """Linear layers that choose experts, or weigh a shared one: few weights, which a rounding would let choose others.

    They are known by their names: within a "router", or a "gate" beside "experts".
    """
    names = set()
    for name, module in model.named_modules(remove_duplicate=False):
        parts = name.split(".") if isinstance(module, nn.Linear) else ()
        for place, part in enumerate(parts):
            is_gate = part == "gate" or part.endswith("expert_gate")
            if part == "router" or (is_gate and hasattr(model.get_submodule(".".join(parts[:place])), "experts")):
                names.add(name)
    return names


def split_experts_(model: nn.Module, skipped: Collection[str] = ()) -> None:
    """Make layers of the stacked weights of experts, in place; a layer has the name that the parameter had.

    Experts are left as they are, and that is logged, where `forward_experts` is not known to be what they compute:
    without a gate, or with a forward of their own; or where their names must stay: saving goes by those of weights that
    several share, `fully_shard` by those of what it has cut.

    Args:
        skipped: runs of dotted components, as `modules_to_not_convert`; experts that one of them names stay, too.
    """
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for path, module in list(model.named_modules()):
        names = _stack_names(path, module)
        if not names or any(f".{run}." in f".{name}." for name in names for run in skipped):
            continue
        is_tied = any(users[id(module._parameters.get(name))] > 1 for name in PROJECTIONS)
        if not is_tied and is_stack_of_experts(module) and _computes_what_ours_does(module):
            _split_(module)
        else:
            logger.warning("%s: experts of this kind stay in float", path)


def split_named_experts_(model: nn.Module, names: Collection[str]) -> None:
    """Make layers of the experts both of whose stacked weights are named, in place."""
    for path, module in list(model.named_modules()):
        if is_stack_of_experts(module) and all(name in names for name in _stack_names(path, module)):
            _split_(module)


def stacked_parameters(model: nn.Module) -> list[str]:
    """The names of all stacked weights of experts that are parameters, not layers."""
    return [name for path, module in model.named_modules() for name in _stack_names(path, module)]


def stacked_layers(model: nn.Module) -> list[str]:
    """The names of all layers that stand for stacked parameters: those of the parameters."""
    return [name for name, module in model.named_modules() if isinstance(module, StackedLinear)]


def join_experts_(model: nn.Module) -> None:
    """Undo `split_experts_` where the layers are in float again."""
    for module in list(model.modules()):
        if all(type(module._modules.get(name)) is StackedLinear for name in PROJECTIONS):
            _join_(module)


def is_stack_of_experts(module: Any) -> bool:
    """Whether this module has the weights of gated experts in stacked parameters."""
    stacks = [module._parameters.get(name) for name in PROJECTIONS]
    known = all(hasattr(module, trait) for trait in TRAITS) and hasattr(module, "config")
    if not known or not module.has_gate or any(isinstance(stack, DTensor) for stack in stacks):
        return False
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def forward_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the chosen experts make of each token, weighted and summed: one expert after the other.

    Args:
        experts: a module with split experts.
        hidden_states: (tokens, hidden).
        top_k_index: the experts of each token, (tokens, k); the number of experts stands for none.
        top_k_weights: their weights, (tokens, k).
    """
    up, down = experts.gate_up_proj.per_expert(), experts.down_proj.per_expert()
    result = torch.zeros_like(hidden_states)
    for expert, chosen in _assignments(top_k_index, experts.num_experts):
        tokens, places = chosen // top_k_index.shape[1], chosen % top_k_index.shape[1]
        rows = experts.gate_up_proj(hidden_states[tokens], up[expert])
        if experts.has_bias:
            rows = rows + experts.gate_up_proj_bias[expert]
        rows = experts.down_proj(experts._apply_gate(rows), down[expert])
        if experts.has_bias:
            rows = rows + experts.down_proj_bias[expert]
        if experts.has_post_expert_norm:
            rows = experts.post_expert_norm(rows)
        rows = rows * top_k_weights[tokens, places, None]
        result = result.index_add(0, tokens, rows.to(result.dtype))
    return result


def _assignments(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, where it is in the flat index), without those that are nowhere; spread evenly without numbers."""
    flat = top_k_index.flatten()
    if flat.is_meta or isinstance(flat, FakeTensor):  # a plan
        yield from enumerate(torch.arange(len(flat), device=flat.device).tensor_split(num_experts))
        return
    for expert in flat.unique().tolist():
        if expert < num_experts:
            yield expert, (flat == expert).nonzero()[:, 0]


def _stack_names(path: str, module: nn.Module) -> list[str]:
    stacks = (name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 3)
    return [f"{path}.{name}" for name in stacks if name in ("gate_up_proj", "up_proj", "down_proj")]


def _split_(module: Any) -> None:
    for name in PROJECTIONS:
        weight = module._parameters.pop(name)
        module.add_module(name, StackedLinear(weight, module.is_transposed))
    module.implementation_before_split = module.config._experts_implementation_internal
    module.config = copy.copy(module.config)
    module.config._experts_implementation_internal = IMPLEMENTATION


def _join_(module: Any) -> None:
    for name in PROJECTIONS:
        weight = module._modules.pop(name).weight
        module.register_parameter(name, weight)
    module.config._experts_implementation_internal = vars(module).pop("implementation_before_split")


@torch.no_grad()
def _computes_what_ours_does(module: Any) -> bool:
    """Tried on a few rows; without numbers it is what transformers' own forwards for these classes take for granted."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return True
    stack = module.gate_up_proj
    size, count = stack.shape[1 if module.is_transposed else 2], min(2, len(stack))
    x = torch.linspace(-1, 1, 3 * size, device=stack.device).view(3, size).to(stack.dtype)
    experts = torch.arange(3 * count, device=stack.device).view(3, count) % len(stack)
    weights = torch.linspace(0.2, 0.8, 3 * count, device=stack.device).view(3, count).to(stack.dtype)
    config, module.config = module.config, copy.copy(module.config)
    module.config._experts_implementation_internal = "eager"  # the family's own
    try:
        expected = module(x, experts, weights)
    except (RuntimeError, TypeError, IndexError, AttributeError):  # called with something else
        return False
    finally:
        module.config = config
    _split_(module)
    try:
        return torch.allclose(module(x, experts, weights), expected, rtol=1e-3, atol=1e-5)
    finally:
        _join_(module)
        module.config = config


if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward_experts)
