"""Operators that choose entries by number, and tensors that are made in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hf_geta.graph.axes import AxisNode, concatenation
from hf_geta.graph.integers import flat_integers
from hf_geta.graph.rules.context import BATCHED, LOOKED_UP, Axes, TensorAxes
from hf_geta.graph.rules.registry import rule
from hf_geta.graph.rules.views import slice_

aten = torch.ops.aten

BY_NUMBER, DRAWN = "chosen by number", "as many numbers are drawn at random"


@rule(aten.embedding)
def embedding(axes: Axes, weight: TensorAxes, indices: TensorAxes, *_: Any) -> TensorAxes:
    axes.freeze(weight[0], "looked up by number")
    axes.note(weight[1], LOOKED_UP)
    return TensorAxes.of((*indices, weight[1]))


@rule(aten.index_select)
def index_select(axes: Axes, x: TensorAxes, dim: int, index: TensorAxes) -> TensorAxes:
    axes.freeze((x[dim], *index), BY_NUMBER)
    result = list(x)
    result[dim] = index[0] if index else axes.frozen((1,), BY_NUMBER)[0]
    return TensorAxes.of(result)


@rule(aten.index.Tensor)
def index(axes: Axes, x: TensorAxes, indices: Sequence[TensorAxes | None]) -> TensorAxes:
    """x[indices]: indexed dimensions are frozen, the others go through; indices side by side keep their place."""
    used = _indexed(axes, indices)
    constants = [tensor.constant for tensor in indices if tensor is not None]
    if len(used) == 1 and constants[0] is not None:
        return _picked(axes, x, used[0], constants[0])
    axes.freeze((*(x[dim] for dim in used), *_flat(indices)), BY_NUMBER)
    others = [axis for dim, axis in enumerate(x) if dim not in used]
    place = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    chosen = axes.shape[place : place + len(axes.shape) - len(others)]
    return TensorAxes.of((*others[:place], *axes.frozen(chosen, BY_NUMBER), *others[place:]), x.parameter)


def _indexed(axes: Axes, indices: Sequence[TensorAxes | None]) -> list[int]:
    """The dimensions that indices stand for: a mask stands for as many as it has."""
    used: list[int] = []
    place = 0
    for tensor, node in zip(indices, axes.node.args[1], strict=True):
        count = len(tensor) if tensor is not None and node.meta["val"].dtype == torch.bool else 1
        if tensor is not None:
            used += range(place, place + count)
        place += count
    return used


def _picked(axes: Axes, x: TensorAxes, dim: int, numbers: Sequence[int]) -> TensorAxes:
    """x[..., [-2], ...] with constant numbers: these entries stay where they are, those around them may go."""
    pieces = [slice_(axes, x, dim, number, number + 1 or None)[dim] for number in numbers]
    return TensorAxes.of((*x[:dim], concatenation(pieces), *x[dim + 1 :]), x.parameter)


@rule(aten.index_put, aten._index_put_impl)
def index_put(
    axes: Axes, x: TensorAxes, indices: Sequence[TensorAxes | None], values: TensorAxes, *_: Any
) -> TensorAxes:
    """x[indices] = values: indexed dimensions are frozen, those behind them are those of the values."""
    used = _indexed(axes, indices)
    axes.freeze((*(x[dim] for dim in used), *_flat(indices)), BY_NUMBER)
    others = [axis for dim, axis in enumerate(x) if dim not in used]
    if used != list(range(len(used))):
        axes.freeze((*others, *values), BY_NUMBER)
        return TensorAxes.of(x)
    shared = min(len(others), len(values))
    axes.freeze(values[: len(values) - shared], BY_NUMBER)
    axes.broadcast(
        [TensorAxes.of(others[len(others) - shared :]), TensorAxes.of(values[len(values) - shared :])],
        [axis.size for axis in others[len(others) - shared :]],
    )
    return TensorAxes.of(x)


@rule(aten.index_add, aten.index_copy, aten.index_fill)
def index_add(axes: Axes, x: TensorAxes, dim: int, index: TensorAxes, source: Any, *_: Any) -> TensorAxes:
    """x[:, index] += source along one dimension; along the others entries stay where they are."""
    dim %= len(x)
    axes.freeze((x[dim], *index), BY_NUMBER)
    for number, axis in enumerate(source if isinstance(source, TensorAxes) and len(source) == len(x) else ()):
        if number == dim:
            axes.freeze(axis, BY_NUMBER)
        else:
            axes.unify(axis, x[number])
    return TensorAxes.of(x)


@rule(aten.masked_scatter, aten.masked_select, aten.nonzero, aten.unique_consecutive, aten._unique2, aten.pad_sequence)
def by_mask(axes: Axes, *arguments: Any) -> TensorAxes | list[TensorAxes]:
    """Entries one after the other, as many as there are: no dimension can lose any."""
    axes.freeze(_flat(arguments), "chosen by a mask")
    return _frozen_results(axes, "chosen by a mask")


@rule(aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru_cell, aten.lstm_cell, aten.rnn_tanh.input)
def recurrent(axes: Axes, *arguments: Any) -> TensorAxes | list[TensorAxes]:
    """Hidden units go through all steps and all gates, which torch keeps in fused kernels."""
    axes.freeze(_flat(arguments), "in a recurrent layer")
    return _frozen_results(axes, "in a recurrent layer")


@rule(aten.gather, aten.scatter, aten.scatter_add, aten.scatter_reduce, aten.take_along_dim)
def gather(axes: Axes, x: TensorAxes, dim: int, index: TensorAxes, *source: Any) -> TensorAxes:
    """Along `dim` entries are chosen; along the others they stay where they are, if all sizes agree."""
    tensors = [x, index, *(tensor for tensor in source if isinstance(tensor, TensorAxes) and tensor)]
    result = []
    for number, size in enumerate(axes.shape):
        group = [tensor[number] for tensor in tensors]
        if number == dim % len(x) or len({axis.size for axis in group}) > 1:
            axes.freeze(group, BY_NUMBER)
            result.append(axes.frozen((size,), BY_NUMBER)[0])
        else:
            result.append(axes.unify(*group))
    return TensorAxes.of(result)


@rule(aten.grid_sampler)
def grid_sampler(axes: Axes, x: TensorAxes, grid: TensorAxes, *_: Any) -> TensorAxes:
    """x (batch, channels, ...) at the places of grid (batch, ..., coordinates), as in deformable attention."""
    axes.freeze((*x[2:], *grid[1:]), "sampled at computed places")
    batch = axes.unify(x[0], grid[0])
    axes.note(batch, BATCHED)
    axes.heads.append(batch)
    return TensorAxes.of((batch, x[1], *grid[1:-1]))


@rule(aten.zeros, aten.ones, aten.empty, aten.scalar_tensor, aten.empty_strided)
def created(axes: Axes, sizes: Any, *_: Any) -> TensorAxes:
    """A tensor whose entries are all alike fits whatever it meets, at the size the forward asks for."""
    return _created(axes, sizes)


@rule(aten.full)
def filled(axes: Axes, sizes: Any, number: Any, *_: Any) -> TensorAxes:
    axes.fix([number])
    return _created(axes, sizes)


@rule(aten.rand, aten.randn, aten.randint, aten.randperm)
def drawn(axes: Axes, *arguments: Any) -> TensorAxes:
    """Fewer numbers would be other numbers."""
    result = axes.frozen(axes.shape, DRAWN)
    sizes = next((one for one in arguments if isinstance(one, list)), [])
    for axis, size in zip(result, sizes, strict=False):
        axes.require(size, axis, DRAWN)
    return result


@rule(aten.rand_like, aten.randn_like, aten.randint_like, aten.bernoulli, aten.normal, aten.multinomial)
def drawn_like(axes: Axes, *arguments: Any) -> TensorAxes:
    axes.freeze(_flat(arguments), DRAWN)
    return axes.frozen(axes.shape, DRAWN)


@rule(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def created_from(axes: Axes, _x: TensorAxes, sizes: Any, *numbers: Any) -> TensorAxes:
    axes.fix(numbers)
    return _created(axes, sizes)


@rule(aten.arange, aten.linspace, aten.eye, aten.tril_indices, aten.triu_indices)
def counted(axes: Axes, *numbers: Any) -> TensorAxes:
    axes.fix(numbers)
    return axes.frozen(axes.shape, "made of numbers in the forward")


@rule(aten.tril, aten.triu)
def triangle(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes:
    axes.freeze(x[-2:], "cut to a triangle")
    return TensorAxes.of(x)


@rule(aten.sym_size, aten.sym_numel, aten.sym_stride)
def size_at_run_time(axes: Axes, *_: Any) -> None:
    return None


@rule(aten.one_hot)
def one_hot(axes: Axes, x: TensorAxes, *_: Any) -> TensorAxes:
    return TensorAxes.of((*x, *axes.frozen(axes.shape[-1:], BY_NUMBER)))


def _flat(arguments: Any) -> list[AxisNode]:
    """The axes of all tensors in (lists of) arguments."""
    if isinstance(arguments, AxisNode):
        return [arguments]
    return [axis for part in arguments for axis in _flat(part)] if isinstance(arguments, list | tuple) else []


def _frozen_results(axes: Axes, text: str) -> TensorAxes | list[TensorAxes]:
    if isinstance(axes.shape, list):
        return [axes.frozen(shape, text) for shape in axes.shape]
    return axes.frozen(axes.shape, text)


def _created(axes: Axes, sizes: Any) -> TensorAxes:
    result = axes.fresh(axes.shape)
    for axis, size in zip(result, flat_integers(sizes), strict=False):
        axes.require(size, axis, "a size of a tensor made in the forward")
    return result
