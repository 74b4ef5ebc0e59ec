"""From a model that lies in pieces on several processes to one that is whole and small, one tensor at a time.

The copy has all but the pieces; each parameter is made whole when it is asked for, cut to the groups that are kept,
packed and put into the host's memory, before the next one is. So no device ever holds more than one whole tensor beside
its pieces; and a process that takes part without wanting the small model drops each at once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_geta.sharding import class_without_engine, whole

ENGINE = "torch.distributed.fsdp"
STATE = "__composable_api"  # names of the attributes that torch's engines keep about a module
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")


class InPieces:
    """A copy of a model without its pieces, and what its parameters are once they are asked for.

    Args:
        model: a model that `fully_shard` has cut; it is left alone.
        here: whether this process wants the values; if not, it takes part in the messages all the same.

    Attributes:
        copy: the model without the engine that cut it; parameters in pieces are empty there, on the meta device.
    """

    def __init__(self, model: nn.Module, here: bool = True) -> None:
        self._here = here
        memo: dict[int, Any] = {}
        self._pieces: dict[nn.Parameter, DTensor] = {}
        self._kept: dict[nn.Parameter, Mapping[int, Tensor]] = {}
        for parameter in model.parameters():
            if isinstance(parameter, DTensor):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                stand_in = memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                self._pieces[stand_in] = parameter
        for module in model.modules():
            memo |= {id(value): type(value)() for name, value in vars(module).items() if name.startswith(STATE)}
        with _without_engine(model):
            self.copy = copy.deepcopy(model, memo)

    def cut(self, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Remember what of each tensor of the copy is kept: name -> dimension -> indices, int64."""
        named = dict(self.copy.named_parameters(remove_duplicate=False))
        self._kept = {named[name]: dims for name, dims in kept.items() if name in named}

    def read(self, parameter: Tensor) -> Tensor:
        """The value of a parameter of the copy, with what was cut gone; where it is not wanted, on the meta device.

        All processes must call it, in one order.
        """
        if not isinstance(parameter, nn.Parameter) or parameter not in self._pieces:
            return parameter
        value = whole(self._pieces[parameter])
        if not self._here:
            value = value.to("meta")
        for dim, indices in self._kept.get(parameter, {}).items():
            value = value.index_select(dim, indices.to(value.device))
        return value

    @staticmethod
    def keep(value: Tensor) -> Tensor:
        """A part of the small model where it stays: on the CPU; nothing of what is not wanted."""
        return value if value.is_meta else value.cpu()

    def fill_(self) -> None:
        """Give the copy what `read` gives of the parameters that are still empty, and all of it a place on the CPU.

        Tied parameters stay tied.
        """
        filled: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.copy.modules():
            for name, parameter in module._parameters.items():
                if parameter in self._pieces:
                    if parameter not in filled:
                        filled[parameter] = nn.Parameter(self.keep(self.read(parameter)), parameter.requires_grad)
                    module._parameters[name] = filled[parameter]
        if self._here:
            self.copy.to("cpu")


@contextlib.contextmanager
def _without_engine(model: nn.Module) -> Iterator[None]:
    """Meanwhile its modules are of their own classes and without the engine's hooks: torch refuses to copy others."""
    classes: list[tuple[Any, type]] = [(module, type(module)) for module in model.modules()]
    classes = [(module, cls) for module, cls in classes if issubclass(cls, FSDPModule)]
    # of `register_fsdp_forward_method`, as accelerate's users have `generate`
    methods = [(module, name, value) for module, _ in classes for name, value in vars(module).items()]
    methods = [(module, name, value) for module, name, value in methods if _is_defined_by_engine(value)]
    hooks = [(module, name, getattr(module, name)) for module in model.modules() for name in HOOKS]
    try:
        for module, _ in classes:
            module.__class__ = class_without_engine(module)
        for module, name, _ in methods:
            delattr(module, name)
        for module, name, registered in hooks:
            own = {key: hook for key, hook in registered.items() if not _is_of_engine(hook)}
            setattr(module, name, type(registered)(own))
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls
        for module, name, registered in hooks:
            setattr(module, name, registered)
        for module, name, method in methods:
            setattr(module, name, method)


def _is_defined_by_engine(method: Any) -> bool:
    function = getattr(method, "__func__", None)
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith(ENGINE)


def _is_of_engine(hook: Any) -> bool:
    hook = getattr(hook, "hook", hook)  # of a state dict, wrapped by torch
    return str(getattr(hook, "__module__", "")).startswith(ENGINE)
