"""Operators that move entries around without computing: views, permutations, pieces, repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_geta.graph.axes import AxisNode, align, concatenation, cut, product
from hf_geta.graph.integers import Arithmetic, Expression, expression_of
from hf_geta.graph.rules.context import Axes, TensorAxes
from hf_geta.graph.rules.registry import rule

aten = torch.ops.aten


@rule(aten.view, aten.reshape, aten._unsafe_view, aten.view_copy, keeps_zeros=True)
def view(axes: Axes, x: TensorAxes, sizes: Any, *_: Any) -> TensorAxes:
    if not isinstance(sizes, Sequence):  # view(dtype)
        return axes.frozen(axes.shape, "reinterpreted as another type")
    result = align(x, axes.shape)
    for axis, size in zip(result, sizes, strict=True):
        if size != -1:
            axes.require(size, axis, "a size in a view")
    return TensorAxes.of(result)


@rule(aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as, keeps_zeros=True)
def view_by_shape(axes: Axes, x: TensorAxes, other: Any = None, sizes: Any = (), *_: Any) -> TensorAxes:
    result = align(x, axes.shape)
    if isinstance(other, TensorAxes):
        result = [axes.unify(axis, target) for axis, target in zip(result, other, strict=True)]
    elif isinstance(sizes, Sequence):  # unflatten(x, dim, sizes)
        for axis, size in zip(result[other % len(x) :], sizes, strict=False):
            if size != -1:
                axes.require(size, axis, "a size in a view")
    return TensorAxes.of(result)


@rule(aten.squeeze, keeps_zeros=True)
def squeeze(axes: Axes, x: TensorAxes, dims: Any = None, *_: Any) -> TensorAxes:
    chosen = range(len(x)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(x) for dim in chosen if x and x[dim].size == 1}
    return TensorAxes.of(axis for dim, axis in enumerate(x) if dim not in gone)


@rule(aten.unsqueeze, keeps_zeros=True)
def unsqueeze(axes: Axes, x: TensorAxes, dim: int) -> TensorAxes:
    dim %= len(x) + 1
    return TensorAxes.of((*x[:dim], AxisNode(1), *x[dim:]))


@rule(aten.permute, keeps_zeros=True)
def permute(axes: Axes, x: TensorAxes, dims: Sequence[int]) -> TensorAxes:
    return TensorAxes.of(x[dim] for dim in dims)


@rule(aten.transpose, aten.swapaxes, aten.swapdims, keeps_zeros=True)
def transpose(axes: Axes, x: TensorAxes, first: int, second: int) -> TensorAxes:
    order = list(range(len(x)))
    order[first], order[second] = order[second], order[first]
    return TensorAxes.of(x[dim] for dim in order)


@rule(aten.t, aten.mT, aten.adjoint, aten.matrix_H, keeps_zeros=True)
def matrix_transpose(axes: Axes, x: TensorAxes) -> TensorAxes:
    return TensorAxes.of((*x[:-2], *reversed(x[-2:])))


@rule(aten.numpy_T, keeps_zeros=True)
def reverse(axes: Axes, x: TensorAxes) -> TensorAxes:
    return TensorAxes.of(reversed(x))


@rule(aten.movedim, aten.moveaxis, keeps_zeros=True)
def movedim(axes: Axes, x: TensorAxes, source: Any, target: Any) -> TensorAxes:
    pairs = [(source, target)] if isinstance(source, int) else zip(source, target, strict=True)
    placed = {to % len(x): origin % len(x) for origin, to in pairs}
    rest = iter(dim for dim in range(len(x)) if dim not in placed.values())
    return TensorAxes.of(x[placed[dim] if dim in placed else next(rest)] for dim in range(len(x)))


@rule(aten.expand, aten.broadcast_to)
def expand(axes: Axes, x: TensorAxes, sizes: Sequence[int], *_: Any) -> TensorAxes:
    result = axes.broadcast([x], axes.shape)
    for axis, size in zip(result, sizes, strict=True):
        if size != -1:
            axes.require(size, axis, "a size in an expand")
    result.parameter = x.parameter if result.sizes == x.sizes else None
    return result


@rule(aten.expand_as)
def expand_as(axes: Axes, x: TensorAxes, other: TensorAxes) -> TensorAxes:
    return axes.broadcast([x, other], axes.shape)


@rule(aten.broadcast_tensors)
def broadcast_tensors(axes: Axes, tensors: Sequence[TensorAxes]) -> list[TensorAxes]:
    return [axes.broadcast(tensors, shape) for shape in axes.shape]


@rule(aten.meshgrid)
def meshgrid(axes: Axes, tensors: Sequence[TensorAxes], indexing: str = "ij") -> list[TensorAxes]:
    """Each of n vectors along a dimension of its own; with "xy" the first two change places."""
    dims = [axis for tensor in tensors for axis in tensor or (AxisNode(1),)]
    if indexing == "xy" and len(dims) > 1:
        dims[:2] = dims[1::-1]
    return [TensorAxes.of(dims) for _ in tensors]


@rule(aten.outer)
def outer(axes: Axes, first: TensorAxes, second: TensorAxes) -> TensorAxes:
    return TensorAxes.of((*first, *second))


@rule(aten.repeat, aten.tile)
def repeat(axes: Axes, x: TensorAxes, times: Sequence[int]) -> TensorAxes:
    times = (*(1 for _ in range(len(x) - len(times))), *times)  # tile's may be fewer
    padded = (*(AxisNode(1) for _ in range(len(times) - len(x))), *x)
    return TensorAxes.of(product((_copies(axes, count), axis)) for count, axis in zip(times, padded, strict=True))


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(axes: Axes, x: TensorAxes, count: int, dim: int | None = None, *_: Any) -> TensorAxes:
    flat = TensorAxes.of((product(x),)) if dim is None else x
    dim = (dim or 0) % len(flat)
    return TensorAxes.of((*flat[:dim], product((flat[dim], _copies(axes, count))), *flat[dim + 1 :]))


def _copies(axes: Axes, count: int) -> AxisNode:
    axis = AxisNode(int(count))
    axes.require(count, axis, "a number of repetitions")
    return axis


@rule(aten.cat, aten.concat, aten.concatenate, keeps_zeros=True)
def cat(axes: Axes, tensors: Sequence[TensorAxes], dim: int = 0) -> TensorAxes:
    tensors = [axes_of for axes_of in tensors if axes_of.sizes != (0,)]  # what torch skips
    result = [axes.unify(*group) for group in zip(*_without(tensors, dim), strict=True)]
    dim %= len(tensors[0])
    joined = concatenation(tensor[dim] for tensor in tensors)
    if joined.size != axes.shape[dim]:  # of pieces whose sizes are known at run time only
        axes.freeze(joined, "cut at computed places")
        joined = axes.frozen(axes.shape[dim : dim + 1], "cut at computed places")[0]
    return TensorAxes.of((*result[:dim], joined, *result[dim:]))


@rule(aten.stack)
def stack(axes: Axes, tensors: Sequence[TensorAxes], dim: int = 0) -> TensorAxes:
    result = [axes.unify(*group) for group in zip(*tensors, strict=True)]
    result.insert(dim % (len(result) + 1), *axes.frozen((len(tensors),), "stacked one by one"))
    return TensorAxes.of(result)


def _without(tensors: Sequence[TensorAxes], dim: int) -> list[TensorAxes]:
    dim %= len(tensors[0])
    return [TensorAxes.of((*tensor[:dim], *tensor[dim + 1 :])) for tensor in tensors]


@rule(aten.select.int, keeps_zeros=True)
def select(axes: Axes, x: TensorAxes, dim: int, index: int) -> TensorAxes:
    dim %= len(x)
    axes.freeze(x[dim], "one entry is picked by its number")
    return TensorAxes.of((*x[:dim], *x[dim + 1 :]))


@rule(aten.unbind, keeps_zeros=True)
def unbind(axes: Axes, x: TensorAxes, dim: int = 0) -> list[TensorAxes]:
    return [select(axes, x, dim, index) for index in range(x[dim].size)]


@rule(aten.slice.Tensor, keeps_zeros=True)
def slice_(
    axes: Axes, x: TensorAxes, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> TensorAxes:
    dim %= len(x)
    size = x[dim].size
    first, last, _ = slice(start, stop, step).indices(size)
    if step != 1:
        kept = _every(axes, x[dim], first, last, step)
    else:
        before, kept, _ = cut(x[dim], (first, max(last - first, 0), size - max(first, last)))
        if first > 0:
            axes.require(_from_start(start, x[dim]), before, "the start of a slice")
        if last < size:
            axes.require(_from_start(stop, x[dim]), concatenation((before, kept)), "the end of a slice")
        elif stop is not None and int(stop) == size and not isinstance(expression_of(stop), int):
            axes.require(stop, x[dim], "the end of a slice")
        elif stop is not None and int(stop) < 2 * size:
            axes.freeze(x[dim], "sliced at a constant")
    return TensorAxes.of((*x[:dim], kept, *x[dim + 1 :]))


def _every(axes: Axes, axis: AxisNode, first: int, last: int, step: int) -> AxisNode:
    """x[first::step]: entry `first` of each of the blocks that `step` entries make; [gate0, up0, gate1, up1, ...]."""
    if axis.size % step or first >= step or last <= axis.size - step + first:
        axes.freeze(axis, "sliced with a step")
        return axes.frozen((len(range(first, last, step)),), "sliced with a step")[0]
    blocks, places = align([axis], (axis.size // step, step))
    axes.freeze(places, "sliced with a step")
    return blocks


def _from_start(bound: int | None, axis: AxisNode) -> Expression:
    """A bound of a slice, counted from the start as an expression."""
    expression = expression_of(bound)
    return expression if int(bound or 0) >= 0 else Arithmetic("+", axis, expression)


@rule(aten.narrow, keeps_zeros=True)
def narrow(axes: Axes, x: TensorAxes, dim: int, start: int, length: int) -> TensorAxes:
    if isinstance(start, TensorAxes):
        axes.freeze(x[dim], "sliced at a computed place")
        return TensorAxes.of((*x[:dim], *axes.frozen((length,), "sliced at a computed place"), *x[dim:][1:]))
    return slice_(axes, x, dim, start, start + length)


@rule(aten.split, aten.split_with_sizes, aten.unsafe_split, keeps_zeros=True)
def split(axes: Axes, x: TensorAxes, sizes: Any, dim: int = 0) -> list[TensorAxes]:
    dim %= len(x)
    lengths = [shape[dim] for shape in axes.shape]
    if sum(lengths) != x[dim].size:  # known at run time only
        axes.freeze(x[dim], "cut at computed places")
        pieces = list(axes.frozen(lengths, "cut at computed places"))
        return [TensorAxes.of((*x[:dim], piece, *x[dim + 1 :])) for piece in pieces]
    pieces = cut(x[dim], lengths)
    for number, piece in enumerate(pieces):
        axes.require(sizes if isinstance(sizes, int) else sizes[number], piece, "a size in a split")
    return [TensorAxes.of((*x[:dim], piece, *x[dim + 1 :])) for piece in pieces]


@rule(aten.chunk, aten.unsafe_chunk, keeps_zeros=True)
def chunk(axes: Axes, x: TensorAxes, count: int, dim: int = 0) -> list[TensorAxes]:
    dim %= len(x)
    pieces = cut(x[dim], [shape[dim] for shape in axes.shape])
    # torch cuts at multiples of ceil(size / count)
    length = Arithmetic("//", Arithmetic("+", x[dim], int(count) - 1), int(count))
    for piece in pieces[:-1]:
        axes.require(length, piece, "the size of a chunk")
    if len(pieces) != int(count):
        axes.freeze(x[dim], "cut into uneven chunks")
    return [TensorAxes.of((*x[:dim], piece, *x[dim + 1 :])) for piece in pieces]


@rule(aten.unfold)
def unfold(axes: Axes, x: TensorAxes, dim: int, *_: Any) -> TensorAxes:
    """Windows over one dimension, which come as a last one."""
    dim %= len(x)
    axes.freeze(x[dim], "cut into windows")
    windows, places = axes.frozen((axes.shape[dim], axes.shape[-1]), "cut into windows")
    return TensorAxes.of((*x[:dim], windows, *x[dim + 1 :], places))


@rule(aten.im2col)
def im2col(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes:
    """Images (batch, channels, height, width) -> (batch, channels * places of a window, windows)."""
    axes.freeze(x[-2:], "cut into windows")
    places, windows = axes.frozen((axes.shape[-2] // x[-3].size, axes.shape[-1]), "cut into windows")
    return TensorAxes.of((*x[:-3], product((x[-3], places)), windows))


@rule(aten.col2im)
def col2im(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes:
    """The way back: the values of overlapping windows are added."""
    channels, places = align([x[-2]], (axes.shape[-3], x[-2].size // axes.shape[-3]))
    axes.freeze((places, x[-1]), "cut into windows")
    return TensorAxes.of((*x[:-2], channels, *axes.frozen(axes.shape[-2:], "cut into windows")))


@rule(aten.pixel_shuffle)
def pixel_shuffle(axes: Axes, x: TensorAxes, factor: int) -> TensorAxes:
    """(..., channels * factor^2, height, width) -> (..., channels, height * factor, width * factor)."""
    channels, places = align([x[-3]], (x[-3].size // int(factor) ** 2, int(factor) ** 2))
    axes.freeze((places, *x[-2:]), "shuffled into pixels")
    return TensorAxes.of((*x[:-3], channels, *axes.frozen(axes.shape[-2:], "shuffled into pixels")))


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(axes: Axes, x: TensorAxes, factor: int) -> TensorAxes:
    axes.freeze(x[-2:], "shuffled into channels")
    places, *rest = axes.frozen((int(factor) ** 2, *axes.shape[-2:]), "shuffled into channels")
    return TensorAxes.of((*x[:-3], product((x[-3], places)), *rest))


@rule(aten.view_as_complex, keeps_zeros=True)
def view_as_complex(axes: Axes, x: TensorAxes) -> TensorAxes:
    axes.freeze(x[-1], "real and imaginary parts")
    return TensorAxes.of(x[:-1])


@rule(aten.view_as_real, keeps_zeros=True)
def view_as_real(axes: Axes, x: TensorAxes) -> TensorAxes:
    return TensorAxes.of((*x, *axes.frozen((2,), "real and imaginary parts")))


@rule(aten.glu)
def gated(axes: Axes, x: TensorAxes, dim: int = -1) -> TensorAxes:
    """The first half times the sigmoid of the second."""
    dim %= len(x)
    size = axes.shape[dim]
    first, second = cut(x[dim], (size, size))
    return TensorAxes.of((*x[:dim], axes.unify(first, second), *x[dim + 1 :]))
