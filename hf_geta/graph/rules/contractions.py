"""Operators that sum products: linear layers, matrix products, convolutions, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_geta.graph.axes import AxisNode, align, product
from hf_geta.graph.rules.context import CONVOLVED, STACKED, Axes, TensorAxes
from hf_geta.graph.rules.registry import rule

aten = torch.ops.aten


@rule(aten.linear)
def linear(axes: Axes, x: TensorAxes, weight: TensorAxes, bias: TensorAxes | None = None) -> TensorAxes:
    batch = [f"batch {dim}" for dim in range(len(x) - 1)]
    out = ["out"] * (len(weight) - 1)
    result = axes.contract((x, [*batch, "in"]), (weight, [*out, "in"]), [*batch, *out])
    return _add(axes, result, bias)


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot)
def matmul(axes: Axes, left: TensorAxes, right: TensorAxes, *_: Any) -> TensorAxes:
    depth = max(len(left), len(right), 2) - 2
    batch = [f"batch {dim}" for dim in range(depth)]
    left_labels = [*batch[depth - len(left) + 2 :], "row", "sum"] if len(left) > 1 else ["sum"]
    right_labels = [*batch[depth - len(right) + 2 :], "sum", "column"] if len(right) > 1 else ["sum"]
    labels = [label for label in (*batch, "row", "column") if label in (*left_labels, *right_labels)]
    return axes.contract((left, left_labels), (right, right_labels), labels)


@rule(aten.addmm, aten.addbmm, aten.baddbmm, aten.addmv)
def addmm(axes: Axes, bias: TensorAxes, left: TensorAxes, right: TensorAxes, *_: Any) -> TensorAxes:
    return _add(axes, matmul(axes, left, right), bias)


@rule(aten.einsum)
def einsum(axes: Axes, equation: str, tensors: Sequence[TensorAxes], *_path: Any) -> TensorAxes:
    """Products of several tensors are taken two by two, from the left; a repeated label (a diagonal) is frozen."""
    terms, output = _einsum_labels(equation, tensors)
    for tensor, labels in zip(tensors, terms, strict=True):
        axes.freeze([axis for axis, label in zip(tensor, labels) if labels.count(label) > 1], "a diagonal")
    result, labels = tensors[0], terms[0]
    for number in range(1, len(tensors)):
        needed = {label for term in (*terms[number + 1 :], output) for label in term}
        kept = [label for label in dict.fromkeys((*labels, *terms[number])) if label in needed]
        result = axes.contract((result, labels), (tensors[number], terms[number]), kept)
        labels = kept
    places = dict(zip(labels, result, strict=True))
    axes.freeze([axis for label, axis in places.items() if label not in output], "summed over by an einsum")
    return TensorAxes.of((places[label] for label in output), result.parameter if len(places) == len(output) else None)


def _einsum_labels(equation: str, tensors: Sequence[TensorAxes]) -> tuple[list[list[str]], list[str]]:
    """The labels of each tensor's dimensions and of the result's; those behind `...` are numbered from the right."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")

    def expand(term: str, rank: int) -> list[str]:
        before, dots, after = term.partition("...")
        hidden = range(rank - len(before) - len(after), 0, -1) if dots else ()
        return [*before, *(f"...{number}" for number in hidden), *after]

    terms = [expand(term, len(tensor)) for term, tensor in zip(inputs.split(","), tensors, strict=True)]
    hidden_rank = max(sum(label.startswith("...") for label in term) for term in terms)
    if arrow:
        return terms, expand(output, hidden_rank + len(output.replace("...", "")))
    used = [label for term in terms for label in term]
    once = sorted(label for label in set(used) if len(label) == 1 and used.count(label) == 1)
    return terms, [*expand("...", hidden_rank), *once]


@rule("transformers::grouped_mm_fallback", "aten::_grouped_mm")
def grouped_matmul(
    axes: Axes, x: TensorAxes, weight: TensorAxes, ends: TensorAxes | None = None, *_: Any
) -> TensorAxes:
    """Mixture of experts: rows (tokens, in), sorted by expert, times each its expert's weight (experts, in, out)."""
    if len(x) != 2 or len(weight) != 3:
        raise ValueError(f"rows of rank {len(x)} and weights of rank {len(weight)}")
    axes.freeze((weight[0], *(ends or ())), "chosen by number")
    for axis in weight[1:]:
        axes.note(axis, STACKED)
    one_expert = TensorAxes.of(weight[1:], weight.parameter)
    return axes.contract((x, ["token", "in"]), (one_expert, ["in", "out"]), ["token", "out"])


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(
    axes: Axes,
    x: TensorAxes,
    weight: TensorAxes,
    bias: TensorAxes | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> TensorAxes:
    group, inner, outer, batch = _grouped(axes, x, weight, groups, channels=weight[0])
    axes.contract(  # the sum over one group's input channels; positions follow below
        (TensorAxes.of((group, inner)), ["group", "in"]),
        (TensorAxes.of((group, outer, weight[1]), weight.parameter), ["group", "out", "in"]),
        ["group", "out"],
    )
    return _convolved(axes, x, weight, bias, weight[0], batch)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def transposed_convolution(
    axes: Axes,
    x: TensorAxes,
    weight: TensorAxes,
    bias: TensorAxes | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> TensorAxes:
    group, inner, rows, batch = _grouped(axes, x, weight, groups, channels=weight[0])
    axes.contract(
        (TensorAxes.of((group, inner)), ["group", "in"]),
        (TensorAxes.of((group, rows, weight[1]), weight.parameter), ["group", "in", "out"]),
        ["group", "out"],
    )
    channels = product((group, weight[1]))
    axes.note(channels, CONVOLVED)
    return _convolved(axes, x, weight, bias, channels, batch)


def _grouped(
    axes: Axes, x: TensorAxes, weight: TensorAxes, groups: int, channels: AxisNode
) -> tuple[AxisNode, AxisNode, AxisNode, TensorAxes]:
    """(group, the input's channels in one group, the weight's, batch axes): a grouped axis is group x the rest."""
    batch = TensorAxes.of(x[: len(x) - len(weight) + 1])
    axes.freeze((*x[len(batch) + 1 :], *weight[2:]), "convolved over")
    group, inner = align([x[len(batch)]], (int(groups), x[len(batch)].size // groups))
    weight_group, rest = align([channels], (int(groups), channels.size // groups))
    group = axes.unify(group, weight_group)
    axes.note(channels, CONVOLVED)
    if groups > 1:
        axes.require(groups, group, "a number of convolution groups")
    return group, inner, rest, batch


def _convolved(
    axes: Axes, x: TensorAxes, weight: TensorAxes, bias: Any, channels: AxisNode, batch: TensorAxes
) -> TensorAxes:
    places = axes.frozen(axes.shape[len(batch) + 1 :], "convolved over")
    # For a transposed convolution every input place, otherwise every output place, meets the whole kernel.
    transposed = "transpose" in axes.operator
    axes.contractions[-1].loops += [*batch, *(x[len(batch) + 1 :] if transposed else places), *weight[2:]]
    if isinstance(bias, TensorAxes):
        axes.unify(channels, bias[0])
    return TensorAxes.of((*batch, channels, *places))


@rule(aten.scaled_dot_product_attention)
def attention(
    axes: Axes,
    query: TensorAxes,
    key: TensorAxes,
    value: TensorAxes,
    mask: TensorAxes | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *_: Any,
) -> TensorAxes:
    """Queries (..., heads, tokens, size), keys and values (..., key-value heads, places, size)."""
    if scale is None:
        axes.freeze((query[-1], key[-1]), "scores are scaled by its size")
    batch = [f"batch {dim}" for dim in range(len(query) - 2)]
    if len(batch) and query[-3].size != key[-3].size:  # grouped queries: heads are (key-value head, its queries)
        key_head, _queries = align([query[-3]], (key[-3].size, query[-3].size // key[-3].size))
        axes.unify(key_head, key[-3], value[-3])
        key, value = (TensorAxes.of((*kv[:-3], query[-3], *kv[-2:])) for kv in (key, value))
    scores = axes.contract(
        (query, [*batch, "token", "size"]), (key, [*batch, "place", "size"]), [*batch, "token", "place"], "scores"
    )
    axes.freeze(scores[-1], "normalized over")
    if isinstance(mask, TensorAxes):
        axes.broadcast([mask, scores], scores.sizes)
    return axes.contract(
        (scores, [*batch, "token", "place"]), (value, [*batch, "place", "size"]), [*batch, "token", "size"], "values"
    )


def _add(axes: Axes, result: TensorAxes, bias: Any) -> TensorAxes:
    return axes.broadcast([result, bias], result.sizes) if isinstance(bias, TensorAxes) else result
