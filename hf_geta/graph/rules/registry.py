"""One rule per operator: how the axes of its tensors relate. The extension point of the search space.

    @rule(aten.layer_norm)
    def layer_norm(axes, x, normalized_shape, weight, bias, *_):
        axes.freeze(x[-len(normalized_shape):], "normalized over")
        ...
        return x

A rule gets `axes` (see `Axes`) and then the operator's arguments in the order of its schema, defaults filled in:
tensors as `TensorAxes`, numbers as they are. It returns the axes of the result, one per dimension (a list of them for
several results). An operator without a rule freezes the axes of all its tensors: that costs compression, never
correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

RULES: dict[Any, Callable[..., Any]] = {}
KEEPS_ZEROS: set[Any] = set()


def rule(*operators: Any, keeps_zeros: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the rule of operators, given as packets (`aten.add`) or overloads (`aten.add.Tensor`),
    or by name ("library::operator") where the library may not be there.

    Rules of in-place variants are those of the functional operators.

    Args:
        keeps_zeros: the operator only moves entries around, so that what is zero in its tensors is zero in its result.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(operators, function))
        if keeps_zeros:
            KEEPS_ZEROS.update(operators)
        return function

    return register


def find_rule(operator: Any) -> tuple[Any, Callable[..., Any]] | None:
    """The rule of an operator and the key that it is registered under; None where there is none."""
    for key in _keys(operator):
        if key in RULES:
            return key, RULES[key]
    return None


def _keys(operator: Any) -> list[Any]:
    if not isinstance(operator, torch._ops.OpOverload):
        return [operator]
    packet = operator.overloadpacket
    keys = [operator, packet, operator._schema.name]
    name = operator._schema.name.rpartition("::")[2]
    if name.endswith("_") and not name.endswith("__"):
        keys.append(getattr(getattr(torch.ops, operator.namespace), name[:-1], packet))
    if torch.Tag.pointwise in operator.tags:
        keys.append(torch.Tag.pointwise)
    return keys
