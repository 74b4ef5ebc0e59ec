"""Which layers read the very same tensor? Queries, keys and values do, and gate and up: programs that run them as one
product have one width for their weights and one scale for their input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def readers_of_one_tensor(layers: Mapping[str, nn.Module], forward: Callable[[], Any]) -> list[list[str]]:
    """The layers, by name, in sets that are handed the same tensor object in every call of one forward.

    Args:
        layers: name -> a layer that takes its input as first argument, by place or by name.
        forward: runs the model once; all inputs of layers are kept until it returns.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def note(name: str, module: nn.Module, by_place: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        inputs[name].append([*by_place, *by_name.values()][0])

    hooks = [layer.register_forward_pre_hook(partial(note, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    readers: dict[Any, list[str]] = {}
    for name, tensors in inputs.items():
        readers.setdefault(tuple(map(id, tensors)) or name, []).append(name)
    return list(readers.values())
