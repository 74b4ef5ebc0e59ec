"""Operators that compute every entry of the result from the entries at the same place of their (broadcast) operands."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from hf_geta.graph.rules.context import Axes, TensorAxes
from hf_geta.graph.rules.registry import rule

aten = torch.ops.aten

# f(0) = 0, and f(0, y) = 0 for the products and quotients: with what else a weight is zero after them.
ODD = {aten.abs, aten.neg, aten.sign, aten.round, aten.floor, aten.ceil, aten.trunc, aten.tanh, aten.sqrt, aten.square}
COPIES = (
    *(aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.detach, aten.alias, aten.lift_fresh_copy),
    *(aten.type_as, aten.view_as_real_copy, aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.conj),
)
LOGIC = (aten.__and__, aten.__or__, aten.__xor__, aten.masked_fill, aten.fill, aten.zero, aten.copy, aten.hardswish)
LIKE = (aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)


# Other names of pointwise operators: torch tags the first name only.
ALIASES = (
    *(aten.multiply, aten.subtract, aten.divide, aten.true_divide, aten.negative, aten.absolute, aten.clip, aten.rsub),
    *(aten.greater, aten.greater_equal, aten.less, aten.less_equal, aten.not_equal, aten.arctan2, aten.float_power),
    *(aten.special_logit, aten.special_expit, aten.special_expm1, aten.special_log1p, aten.special_erf),
    *(aten.polar, aten.complex, aten.real, aten.imag),
)


@rule(torch.Tag.pointwise, *LOGIC, *ALIASES, aten.where, aten.log_sigmoid, aten.floor_divide, aten.isin)
def pointwise(axes: Axes, *arguments: Any) -> TensorAxes:
    operands = [argument for argument in arguments if isinstance(argument, TensorAxes)]
    axes.fix(arguments)
    result = axes.broadcast(operands, axes.shape)
    result.parameter = _weight(axes.node, arguments, result.sizes)
    return result


@rule(aten.prelu)
def prelu(axes: Axes, x: TensorAxes, weight: TensorAxes) -> TensorAxes:
    """One slope for all, or one for each entry of dimension 1."""
    axes.unify(*x[1:2], *weight)
    return TensorAxes.of(x)


@rule(*COPIES, keeps_zeros=True)
def copies(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes:
    return x


@rule(*LIKE)
def created_like(axes: Axes, x: TensorAxes, *numbers: Any) -> TensorAxes:
    axes.fix(numbers)
    return TensorAxes.of(x)


def _weight(node: fx.Node, arguments: tuple[Any, ...], sizes: tuple[int, ...]) -> str | None:
    """The parameter with whose entries all entries of the result are zero."""
    packet = getattr(node.target, "overloadpacket", None)
    operands = [argument for argument in arguments if isinstance(argument, TensorAxes)]
    full = [argument for argument in operands if argument.sizes == sizes and argument.parameter]
    if not full or sizes == ():
        return None
    keeps = packet in ODD
    if packet is aten.mul:
        keeps = True
    elif packet in (aten.div, aten.pow):
        base, power = arguments[:2]  # 2**w has a number as its base
        is_weight = any(base is argument for argument in full)
        keeps = is_weight and (packet is aten.div or not isinstance(power, int | float) or power > 0)
    elif packet in (aten.add, aten.sub):
        keeps = len(full) == len(operands) == 2
    elif packet is aten.clamp:
        low, high, *_ = (*arguments[1:], None)
        keeps = _straddles_zero(low, high, node)
    return full[0].parameter if keeps else None


def _straddles_zero(low: Any, high: Any, node: fx.Node) -> bool:
    """Whether clamping leaves 0 where it is: number bounds around it, or tensor bounds -c and c."""
    if isinstance(low, TensorAxes) and isinstance(high, TensorAxes):
        _, negated, bound = node.args
        return isinstance(negated, fx.Node) and negated.target is aten.neg.default and negated.args[0] is bound
    numbers = isinstance(low, int | float | None) and isinstance(high, int | float | None)
    return numbers and (-math.inf if low is None else low) <= 0 <= (math.inf if high is None else high)
