"""Random tensor programs: the same steps on numbers, on axes, and as a module.

A program computes from an input and several parameters by views, permutations, pieces, joins, products and sums. Its
numbers are integers modulo a prime: two programs that differ in any entry agree by accident once in ten thousand times.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_geta.graph.axes import (
    AxisNode,
    Reason,
    align,
    concatenation,
    cut,
    freeze,
    is_frozen,
    leaves,
    positions,
    product,
    size_after,
    unify,
)

PRIME = 10007  # a sum of 500 products of two residues stays far below 2^63
LARGEST = 400  # entries of a tensor
SIZES = (1, 2, 2, 3, 4, 4, 6, 6, 8, 12)
WHY = Reason("because")

Removed = dict[AxisNode, list[int]]


class Step(NamedTuple):
    """Computes a value from earlier ones; `sizes` are the axes whose sizes it spells out. None: a new parameter."""

    compute: Callable[[Sequence[Tensor], Sequence[int], Callable[[Tensor], Tensor]], Tensor] | None
    sizes: tuple[AxisNode, ...] = ()


@dataclass
class Program:
    """Value 0 is the input; value i is computed by step i. `axes[i]` are its axes, all alive and all refined later.

    `weights` are the values that are parameters or entries of parameters moved around: zero where those are zero.
    """

    steps: list[Step] = field(default_factory=list)
    axes: list[tuple[AxisNode, ...]] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)
    used: set[int] = field(default_factory=set)

    def add(self, step: Step, axes: Iterable[AxisNode], is_weight: bool = False) -> int:
        self.steps.append(step)
        self.axes.append(tuple(axes))
        if is_weight:
            self.weights.add(len(self.steps) - 1)
        return len(self.steps) - 1

    def parameter(self, shape: Iterable[int]) -> int:
        return self.add(Step(None), map(AxisNode, shape), is_weight=True)

    def parameters(self) -> list[int]:
        return [number for number, step in enumerate(self.steps) if step.compute is None]

    def shape(self, number: int) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes[number])

    def run(
        self,
        given: dict[int, Tensor],
        sizes_of: Callable[[int, Step], Sequence[int]],
        squash: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        values: list[Tensor] = []
        for number, step in enumerate(self.steps):
            known = number in given
            values.append(given[number] if known else step.compute(values, sizes_of(number, step), squash))
        return values


def same(first: AxisNode, second: AxisNode) -> AxisNode:
    if first.size != 1 and second.size != 1:
        unify(first, second)
    return second if first.size == 1 else first


class Grower:
    """Adds random steps to a program: one method per operator, which does nothing where it does not apply."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.program = Program()
        axes = (AxisNode(2), AxisNode(3))
        for axis in axes:
            freeze(axis, WHY)
        self.program.add(Step(None), axes)
        self.linear()
        self.linear()
        for _ in range(draw.randint(3, 14)):
            getattr(self, draw.choice(OPERATORS))()

    def value(self, fits: Callable[[int], bool] = lambda _: True) -> int | None:
        """An earlier value, the latest ones more often; never the input."""
        numbers = [number for number in range(1, len(self.program.steps)) if fits(number)]
        return self.draw.choice(numbers + 2 * numbers[-3:]) if numbers else None

    def add(self, used: Iterable[int], *arguments: Any, **options: Any) -> int | None:
        self.program.used.update(used)
        return self.program.add(*arguments, **options)

    def known_or_new(self, shape: Sequence[int], only_weights: bool) -> int:
        known = self.value(
            lambda n: self.program.shape(n) == tuple(shape) and (n in self.program.weights or not only_weights)
        )
        return self.program.parameter(shape) if known is None or self.draw.random() < 0.4 else known

    def linear(self) -> None:
        x = 0 if len(self.program.steps) < 4 else self.value(lambda n: len(self.program.shape(n)) > 0)
        if x is None or math.prod(self.program.shape(x)[:-1]) * max(SIZES) > LARGEST:
            return
        weight = self.known_or_new((self.draw.choice(SIZES), self.program.shape(x)[-1]), only_weights=True)
        out, inner = self.program.axes[weight]
        same(self.program.axes[x][-1], inner)
        self.add(
            (x, weight),
            Step(lambda values, _, squash: squash(values[x] @ values[weight].mT)),
            (*self.program.axes[x][:-1], out),
        )

    def grouped(self) -> None:
        x = self.value(lambda n: len(self.program.shape(n)) >= 2 and math.prod(self.program.shape(n)) * 4 <= LARGEST)
        if x is None:
            return
        *batch, group, inner = self.program.axes[x]
        weight = self.known_or_new((group.size, inner.size, self.draw.choice(SIZES[:6])), only_weights=True)
        axes = self.program.axes[weight]
        group = same(group, axes[0])
        same(inner, axes[1])
        self.add(
            (x, weight),
            Step(lambda values, _, squash: squash((values[x].unsqueeze(-2) @ values[weight]).squeeze(-2))),
            (*batch, group, axes[2]),
        )

    def scores(self) -> None:
        """Products of two activations (..., n, k) and (..., m, k): what they sum over is frozen."""
        x = self.value(lambda n: len(self.program.shape(n)) >= 2)
        if x is None:
            return
        shape = self.program.shape(x)
        y = self.value(lambda n: self.program.shape(n)[:-2] == shape[:-2] and self.program.shape(n)[-1:] == shape[-1:])
        if y is None or len(self.program.shape(y)) != len(shape):
            return
        if math.prod(shape[:-1]) * self.program.shape(y)[-2] > LARGEST:
            return
        left, right = self.program.axes[x], self.program.axes[y]
        batch = [same(*pair) for pair in zip(left[:-2], right[:-2], strict=True)]
        freeze(same(left[-1], right[-1]), WHY)
        self.add(
            (x, y),
            Step(lambda values, _, squash: squash(values[x] @ values[y].mT)),
            (*batch, left[-2], right[-2]),
        )

    def pointwise(self) -> None:
        x = self.value()
        shape = self.program.shape(x)
        suffix = [size if self.draw.random() < 0.8 else 1 for size in shape[self.draw.choice((0, 0, 1)) :]]
        y = self.known_or_new(suffix, only_weights=False)
        axes = self.program.axes[x]
        others = (*itertools.repeat(AxisNode(1), len(axes) - len(suffix)), *self.program.axes[y])
        multiplies = self.draw.random() < 0.5
        self.add(
            (x, y),
            Step(lambda v, _, squash: squash(v[x] * v[y] if multiplies else v[x] + v[y])),
            itertools.starmap(same, zip(axes, others, strict=True)),
        )

    def nonlinear(self) -> None:
        x = self.value()
        self.add((x,), Step(lambda values, _, squash: squash(values[x] * values[x] + 1)), self.program.axes[x])

    def view(self) -> None:
        x = self.value()
        shape = list(self.program.shape(x))
        where = self.draw.randrange(len(shape) + 1)
        kind = self.draw.random()
        if kind < 0.45 and where < len(shape):  # split one dimension
            factor = self.draw.choice([n for n in range(1, shape[where] + 1) if shape[where] % n == 0])
            shape[where : where + 1] = [factor, shape[where] // factor]
        elif kind < 0.9:  # merge two
            shape[where : where + 2] = [math.prod(shape[where : where + 2])]
        else:  # anything
            shape = factorization(self.draw, math.prod(shape))
        axes = tuple(align(self.program.axes[x], shape))
        self.add(
            (x,),
            Step(lambda values, sizes, _: values[x].reshape(sizes), axes),
            axes,
            is_weight=x in self.program.weights,
        )

    def permute(self) -> None:
        x = self.value(lambda n: len(self.program.shape(n)) >= 2)
        if x is not None:
            order = self.draw.sample(range(len(self.program.shape(x))), len(self.program.shape(x)))
            axes = (self.program.axes[x][dim] for dim in order)
            is_weight = x in self.program.weights
            self.add((x,), Step(lambda values, *_: values[x].permute(order)), axes, is_weight=is_weight)

    def cat(self) -> None:
        x = self.value(lambda n: len(self.program.shape(n)) > 0 and math.prod(self.program.shape(n)) * 2 <= LARGEST)
        if x is None:
            return
        shape = list(self.program.shape(x))
        dim = self.draw.randrange(len(shape))
        shape[dim] = self.draw.choice((shape[dim], self.draw.choice(SIZES)))
        if math.prod(shape) * 2 > LARGEST:
            return
        y = self.known_or_new(shape, only_weights=x in self.program.weights)
        axes = [
            concatenation(pair) if number == dim else same(*pair)
            for number, pair in enumerate(zip(self.program.axes[x], self.program.axes[y], strict=True))
        ]
        self.add(
            (x, y),
            Step(lambda values, *_: torch.cat((values[x], values[y]), dim)),
            axes,
            is_weight={x, y} <= self.program.weights,
        )

    def split(self) -> None:
        x = self.value(lambda n: max(self.program.shape(n), default=1) > 1)
        if x is None:
            return
        axes = self.program.axes[x]
        dim = self.draw.choice([dim for dim, axis in enumerate(axes) if axis.size > 1])
        size = axes[dim].size
        if self.draw.random() < 0.6:  # equal chunks
            count = self.draw.choice([n for n in range(2, size + 1) if size % n == 0])
            sizes = [size // count] * count
        else:
            bounds = sorted(self.draw.randint(1, size - 1) for _ in range(self.draw.choice((1, 1, 2))))
            sizes = [stop - start for start, stop in itertools.pairwise((0, *bounds, size))]
            sizes = [size for size in sizes if size]
        pieces = tuple(cut(axes[dim], sizes))
        for number in self.draw.sample(range(len(pieces)), min(3, len(pieces))):

            def piece(values: Sequence[Tensor], sizes: Sequence[int], _: Any, number: int = number) -> Tensor:
                return values[x].split(list(sizes), dim)[number]

            kept = (*axes[:dim], pieces[number], *axes[dim + 1 :])
            self.add((x,), Step(piece, pieces), kept, is_weight=x in self.program.weights)

    def narrow(self) -> None:
        x = self.value(lambda n: max(self.program.shape(n), default=1) > 1)
        if x is None:
            return
        axes = self.program.axes[x]
        dim = self.draw.choice([dim for dim, axis in enumerate(axes) if axis.size > 1])
        start, stop = sorted(self.draw.sample(range(axes[dim].size + 1), 2))
        before, kept, _ = cut(axes[dim], (start, stop - start, axes[dim].size - stop))
        self.add(
            (x,),
            Step(lambda values, sizes, _: values[x].narrow(dim, *sizes), (before, kept)),
            (*axes[:dim], kept, *axes[dim + 1 :]),
            is_weight=x in self.program.weights,
        )

    def repeat(self) -> None:
        x = self.value(lambda n: len(self.program.shape(n)) > 0 and math.prod(self.program.shape(n)) * 2 <= LARGEST)
        if x is None:
            return
        axes = self.program.axes[x]
        dim = self.draw.randrange(len(axes))
        copies, inside = AxisNode(2), self.draw.random() < 0.5
        freeze(copies, WHY)
        repeated = product((axes[dim], copies) if inside else (copies, axes[dim]))

        def repeat(values: Sequence[Tensor], *_: Any) -> Tensor:
            if inside:
                return values[x].repeat_interleave(2, dim)
            return values[x].repeat([2 if number == dim else 1 for number in range(len(axes))])

        self.add((x,), Step(repeat), (*axes[:dim], repeated, *axes[dim + 1 :]))

    def total(self) -> None:
        x = self.value(lambda n: len(self.program.shape(n)) > 1)
        if x is not None:
            axes = self.program.axes[x]
            dim = self.draw.randrange(len(axes))
            freeze(axes[dim], WHY)
            self.add((x,), Step(lambda values, _, squash: squash(values[x].sum(dim))), (*axes[:dim], *axes[dim + 1 :]))


OPERATORS = (
    *("linear", "linear", "grouped", "scores", "pointwise", "pointwise", "nonlinear", "view", "view", "view", "view"),
    *("permute", "permute", "cat", "cat", "split", "split", "narrow", "repeat", "total"),
)


def factorization(draw: random.Random, size: int) -> list[int]:
    factors = []
    while size > 1:
        factors.append(draw.choice([n for n in range(2, size + 1) if size % n == 0]))
        size //= factors[-1]
    return draw.sample(factors, len(factors))


def all_leaves(program: Program) -> list[AxisNode]:
    """The leaves of all axes of all values that can be pruned."""
    found = dict.fromkeys(leaf for axes in program.axes for axis in axes for leaf in leaves(axis))
    return [leaf for leaf in found if leaf.size > 1 and not is_frozen(leaf)]


def kept(axis: AxisNode, removed: Removed) -> Tensor:
    """The entries of an axis that stay."""
    mask = torch.ones(axis.size, dtype=torch.bool)
    for leaf, indices in positions(axis).items():
        mask[indices[removed.get(leaf, [])].flatten()] = False
    return mask.nonzero().flatten()


def restricted(value: Tensor, axes: Sequence[AxisNode], removed: Removed) -> Tensor:
    for dim, axis in enumerate(axes):
        value = value.index_select(dim, kept(axis, removed))
    return value


def masked(value: Tensor, axes: Sequence[AxisNode], removed: Removed) -> Tensor:
    value = value.clone()
    for dim, axis in enumerate(axes):
        gone = torch.ones(axis.size, dtype=torch.bool)
        gone[kept(axis, removed)] = False
        value.index_fill_(dim, gone.nonzero().flatten(), 0)
    return value


def check_law(program: Program, removed: Removed) -> None:
    """Every value of the program without the removed slices is what is kept of the value with zeros in their place."""
    generator = torch.Generator().manual_seed(0)
    sources = [0, *program.parameters()[1:]]
    dense = {n: torch.randint(1, PRIME, program.shape(n), generator=generator) for n in sources}
    zeroed = {n: masked(value, program.axes[n], removed) if n else value for n, value in dense.items()}
    small = {n: restricted(value, program.axes[n], removed) for n, value in dense.items()}
    left = {leaf: leaf.size - len(indices) for leaf, indices in removed.items()}

    def squash(value: Tensor) -> Tensor:
        return value % PRIME

    before = program.run(zeroed, lambda _, step: [axis.size for axis in step.sizes], squash)
    after = program.run(small, lambda _, step: [size_after(axis, left) for axis in step.sizes], squash)
    for large, pruned, axes in zip(before, after, program.axes, strict=True):
        assert large.shape == tuple(axis.size for axis in axes)
        assert pruned.shape == tuple(size_after(axis, left) for axis in axes)
        assert torch.equal(restricted(large, axes, removed), pruned)


class ProgramModule(nn.Module):
    """A program as a module: sizes are attributes, values that nothing uses are read by weights of their own."""

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.steps = [(step.compute, len(step.sizes)) for step in program.steps]
        for number, step in enumerate(program.steps):
            for place, axis in enumerate(step.sizes):
                setattr(self, f"size_{number}_{place}", axis.size)
            shape = program.shape(number)
            if number and step.compute is None:
                self.register_parameter(f"weight_{number}", nn.Parameter(torch.randn(shape, generator=generator)))
            if number not in program.used:
                weight = torch.randn(2, math.prod(shape), generator=generator)
                self.register_parameter(f"reader_{number}", nn.Parameter(weight))

    def forward(self, x: Tensor) -> list[Tensor]:
        values, results = [x], []
        for number, (compute, count) in enumerate(self.steps):
            if number:
                sizes = [getattr(self, f"size_{number}_{place}") for place in range(count)]
                is_weight = compute is None
                values.append(getattr(self, f"weight_{number}") if is_weight else compute(values, sizes, torch.tanh))
            if (reader := getattr(self, f"reader_{number}", None)) is not None:
                results.append(nn.functional.linear(values[-1].flatten(), reader))
        return results
