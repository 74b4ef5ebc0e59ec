"""What a rule sees: the axes of its arguments, and what it may say about them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_geta.graph.axes import AxisNode, Reason, freeze, tag, unify
from hf_geta.graph.integers import Equation, Expression, expression_of, flat_integers

# How an axis is used (tags of its leaves): a batch dimension of a product of two activations, summed over with a
# weight, a channel of a convolution, a column of a lookup table, a dimension of weights stacked by expert.
BATCHED, CONSUMED, CONVOLVED, LOOKED_UP, STACKED = "batched", "consumed", "convolved", "looked up", "stacked"


class TensorAxes(tuple[AxisNode, ...]):
    """The axes of a tensor, one per dimension.

    `parameter` names the parameter that the tensor is computed from where it is a pure weight: along every dimension,
    entries that are zero in the parameter are zero in the tensor. None for everything else. `constant` has the numbers
    of a short list of ints that the forward spells out.
    """

    parameter: str | None = None
    constant: Sequence[int] | None = None

    @classmethod
    def of(cls, axes: Iterable[AxisNode], parameter: str | None = None) -> TensorAxes:
        """Axes as a `TensorAxes`."""
        self = cls(axes)
        self.parameter = parameter
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(axis.size for axis in self)


@dataclass
class Contraction:
    """A sum of products: `loops` are the axes that its multiply-accumulates run over."""

    name: str
    weight: str | None
    loops: list[AxisNode]


@dataclass
class Axes:
    """The state of one analysis and, for the rule at work, the operator in question.

    Of products of two activations, `heads` are the batch dimensions, `outer` pairs them with the others of the result,
    and `summed` has those that are summed over: sizes of heads, which stay unless they are asked for.
    `node` is the operator's graph node, `shape` the shape of its result (a list of shapes for several results).
    """

    equations: list[Equation] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    heads: list[AxisNode] = field(default_factory=list)
    outer: list[tuple[AxisNode, AxisNode, Reason]] = field(default_factory=list)
    summed: list[tuple[AxisNode, Reason]] = field(default_factory=list)
    node: Any = None
    operator: str = ""
    module: str = ""
    shape: Any = ()

    def fresh(self, sizes: Iterable[int]) -> TensorAxes:
        """New axes, related to nothing."""
        return TensorAxes.of(AxisNode(size) for size in sizes)

    def frozen(self, sizes: Iterable[int], text: str) -> TensorAxes:
        """New axes that cannot be pruned, because of `text`."""
        axes = self.fresh(sizes)
        self.freeze(axes, text)
        return axes

    def freeze(self, axes: AxisNode | Iterable[AxisNode], text: str) -> None:
        """Say that these axes cannot be pruned, because of `text`."""
        for axis in (axes,) if isinstance(axes, AxisNode) else axes:
            freeze(axis, Reason(text, self.operator, self.module))

    def note(self, axis: AxisNode, use: str) -> None:
        """Say how an axis is used: what kinds are told by."""
        tag(axis, use)

    def unify(self, first: AxisNode, *others: AxisNode) -> AxisNode:
        """Say that axes are one; those of size 1 are broadcast and say nothing. Returns one that stands for all."""
        axes = [axis for axis in (first, *others) if axis.size != 1]
        for axis in axes[1:]:
            unify(axes[0], axis)
        return axes[0] if axes else first

    def broadcast(self, operands: Sequence[TensorAxes], sizes: Sequence[int]) -> TensorAxes:
        """The axes of a result of the given sizes, computed entry by entry from operands that broadcast to it."""
        result = []
        for dim, size in zip(range(-len(sizes), 0), sizes, strict=True):
            matching = [axes[dim] for axes in operands if -dim <= len(axes) and axes[dim].size == size]
            result.append(self.unify(*matching) if matching else AxisNode(size))
        return TensorAxes.of(result)

    def require(self, value: int | Expression | None, axis: AxisNode | Expression, reason: str = "") -> None:
        """Say that an int of the forward is the size of `axis`, and has to stay so; None: known at run time only."""
        if value is None:
            return
        left = expression_of(value) if isinstance(value, int) else value
        if left != axis:
            self.equations.append(Equation(left, axis, reason, self.operator, self.module))

    def fix(self, values: Any) -> None:
        """Say that the ints among an operator's arguments are no sizes but numbers, which have to stay as they are."""
        for value in flat_integers(values):
            self.require(value, int(value), "a number of the forward")

    def contract(
        self,
        left: tuple[TensorAxes, Sequence[Hashable]],
        right: tuple[TensorAxes, Sequence[Hashable]],
        result: Sequence[Hashable],
        name: str = "",
    ) -> TensorAxes:
        """The product of two tensors summed over what is not in `result`, with labels for dimensions as in einsum.

        Summing over an axis is no obstacle where one factor is a pure weight: its entries go to zero with the group.
        """
        axes: dict[Hashable, list[AxisNode]] = {label: [] for label in (*left[1], *right[1])}
        holders: dict[Hashable, list[TensorAxes]] = {label: [] for label in axes}
        for operand, labels in (left, right):
            for axis, label in zip(operand, labels, strict=True):
                axes[label].append(axis)
                if axis.size != 1:
                    holders[label].append(operand)
        merged = {label: self.unify(*group) for label, group in axes.items()}
        weight = right[0].parameter or left[0].parameter
        batched = [label for label in result if label in left[1] and label in right[1] and merged[label].size != 1]
        for label, axis in merged.items():
            if weight is not None and any(len(holders[one]) == 2 for one in batched):
                tag(axis, STACKED)
            if label not in result:
                if any(operand.parameter for operand in holders[label]):
                    tag(axis, CONSUMED)
                else:
                    self.summed.append((axis, Reason("the size of a head", self.operator, self.module)))
            elif weight is None and label in batched:  # also where one key's head is broadcast to all queries'
                tag(axis, BATCHED)
                self.heads.append(axis)
            elif weight is None:
                reason = Reason("the size of a head", self.operator, self.module)
                self.outer += [(merged[batch], axis, reason) for batch in batched]
        self.count(weight, list(merged.values()), name)
        return TensorAxes.of(merged[label] for label in result)

    def count(self, weight: str | None, loops: list[AxisNode], name: str = "") -> None:
        """Note the multiply-accumulates of one operation, which run over all `loops`."""
        owner = weight.rpartition(".")[0] if weight else ".".join(filter(None, (self.module, name or self.operator)))
        self.contractions.append(Contraction(owner, weight, loops))
