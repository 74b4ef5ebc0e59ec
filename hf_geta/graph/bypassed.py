"""Which modules does training go around? It may read a weight without calling its layer, which then rounds nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hf_geta.graph.capture import TRACING_ERRORS, plain_copy
from hf_geta.graph.tracing import quiet_torch

logger = logging.getLogger(__name__)


def bypassed_modules(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules whose `weight` a forward in train mode reads outside of their own forward; `model` is left alone.

    It runs on fake tensors; where it decides by their numbers, in eval mode on the weights.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        twin = plain_copy(model, mode.from_tensor).train()
        with mode, quiet_torch():
            return _watch(twin, pytree.tree_map_only(Tensor, mode.from_tensor, dict(inputs)))
    except TRACING_ERRORS as error:
        logger.debug("%s in train mode does not run on fake tensors", type(model).__name__, exc_info=error)
    try:
        return _watch(plain_copy(model).eval(), inputs)
    except TRACING_ERRORS as error:  # such as on the meta device
        logger.debug("%s does not run", type(model).__name__, exc_info=error)
        return ()


@torch.no_grad()
def _watch(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    readers = _Readers(model)
    with torch.random.fork_rng(devices=[]), readers:
        model(**inputs)
    return tuple(readers.bypassed)


class _Readers(TorchFunctionMode):
    """While active, notes in which module's forward operators read the weights of which modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bypassed: dict[str, None] = {}  # in order
        self._owners: dict[int, list[str]] = {}  # of a tied weight, several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, attribute = name.rpartition(".")
            if attribute == "weight":
                self._owners.setdefault(id(parameter), []).append(owner)
        self._inside = [""]  # whose forwards run, from the outside in
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: self._inside.append(path))
            module.register_forward_hook(self._leave)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in pytree.tree_leaves(result)):  # else it asks for a shape, say
            for value in pytree.tree_leaves(_whose_numbers_count(func, args, kwargs)):
                owners = self._owners.get(id(value), []) if isinstance(value, nn.Parameter) else []
                if not any(f"{self._inside[-1]}.".startswith(f"{owner}.") for owner in owners):
                    self.bypassed.update(dict.fromkeys(owners))
        return result


def _whose_numbers_count(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments of a call but those that only give their dtype, device or shape, as in `x.type_as(weight)`."""
    name = func.__name__
    if name.startswith("new_") or name.endswith("_like"):
        return ()
    return args[:1] if name in ("to", "type_as") else (args, kwargs)
