"""The state of an optimizer over parameters in pieces: its tensors by name, for `pieces`, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from hf_geta.checkpoint.pieces import Pieces


def split_state(state_dict: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """(the tensors that the optimizer keeps of its parameters, by "parameter:key"; the state dict without them).

    Args:
        state_dict: what `optimizer.state_dict()` returned.
        parameters: those of its groups in their order, by name.

    Raises:
        ValueError: if it keeps pieces inside of other objects.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(parameters):
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{key}"] = value
            else:
                rest.setdefault(index, {})[key] = value
    if any(isinstance(leaf, DTensor) for leaf in tree_leaves(rest)):
        raise ValueError("the optimizer keeps tensors in pieces inside of other objects: use another, as AdamW.")
    return tensors, {**state_dict, "state": rest}


def joined_state(rest: Mapping[str, Any], pieces: Pieces, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state dict that `split_state` took apart, with the parts of its tensors that this process holds.

    Raises:
        ValueError: if it is of other parameters.
    """
    indices = {name: index for index, name in enumerate(parameters)}
    state = {index: dict(values) for index, values in rest["state"].items()}
    for entry in pieces:
        name, _, key = entry.rpartition(":")
        if name not in indices:
            raise ValueError(f"{pieces.folder} holds the optimizer's {key} of {name}, which this run does not train.")
        state.setdefault(indices[name], {})[key] = pieces.read(entry, parameters[name])
    return {**rest, "state": state}
