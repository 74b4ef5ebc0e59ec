"""What is left at the end of a run: groups, parameters, bytes and bit operations, as far as they are known before it.

How many groups go is certain (or bounded, with a budget), which ones is learned: so a plan says what is left if every
axis loses the same share, and between which bounds it lies if only the lightest or only the heaviest groups went.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_geta.compress import file_budget
from hf_geta.graph.table import Tensors, group_parameters
from hf_geta.measure import cost_at
from hf_geta.optim.choice import choose_least_salient, nearest_reachable
from hf_geta.optim.pricing import Pricing
from hf_geta.optim.qasso import QASSO
from hf_geta.optim.quantizers import NumberedQuantizers
from hf_geta.preparation import preparation_of
from hf_geta.quantization.layers import quantized_layers
from hf_geta.report.cost import FLOAT_BITS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A model that a run may end in.

    Attributes:
        title: what it is, in words.
        groups: that are left.
        file_bytes: of the weight file, at most.
        relative_bops: of the operations with a weight, over the dense model's.
    """

    title: str
    groups: int
    parameters: int
    file_bytes: int
    relative_bops: float


class Outcomes:
    """What a prepared model with its optimizer may end in; both may be without numbers.

    Args:
        tensors: shapes of the model's tensors before it was prepared.
    """

    def __init__(self, model: nn.Module, qasso: QASSO, tensors: Tensors) -> None:
        self.model, self.sizes, self.allowed_bits = model, qasso.space.axis_sizes, qasso.allowed_bits
        self.config, self.axes = preparation_of(model).config, preparation_of(model).qadg.axes
        self.quantizers = NumberedQuantizers.of(quantized_layers(model))
        self.file = file_budget(model, self.axes, self.quantizers)
        self.has_budget = isinstance(qasso.targets, Pricing)
        most = qasso.targets.most_removed if isinstance(qasso.targets, Pricing) else qasso.groups_to_remove
        self.most_removed = nearest_reachable(most, self.sizes, *self._limits)
        weights = torch.tensor([float(group_parameters(axis, tensors)) for axis in self.axes])
        self._weight_of_group = weights.repeat_interleave(torch.tensor(self.sizes, dtype=torch.int64))
        self._rank_in_axis = torch.cat([torch.zeros(0), *((torch.arange(size) + 1.0) / size for size in self.sizes)])

    @property
    def dense(self) -> Outcome:
        """The model as it comes."""
        nothing = [0] * len(self.axes)
        in_file = [FLOAT_BITS if weight is None else 8 * weight.element_size() for weight in self.quantizers.weights]
        dense = self._outcome("dense", nothing, [FLOAT_BITS] * len(in_file))
        return dataclasses.replace(dense, file_bytes=round(self.file.cost(nothing, in_file)))

    @property
    def ends(self) -> list[Outcome]:
        """At the lower and at the upper widths, each axis without the same share; with a budget, its least and most."""
        removed = self._removed(self._rank_in_axis)
        if self.has_budget:
            nothing = [0] * len(self.axes)
            return [
                self._outcome("least in reach", removed, self._widths(0)),
                self._outcome("most", nothing, self._widths(-1)),
            ]
        if self._widths(0) == self._widths(-1):
            return [self._outcome("at the end", removed, self._widths(0))]
        return [
            self._outcome("lower widths", removed, self._widths(0)),
            self._outcome("upper widths", removed, self._widths(-1)),
        ]

    @property
    def extremes(self) -> list[Outcome]:
        """If the heaviest groups go (at the lower widths), and if the lightest do (at the upper ones)."""
        heaviest, lightest = (self._removed(sign * self._weight_of_group) for sign in (-1, 1))
        return [
            self._outcome("the heaviest groups gone, lower widths", heaviest, self._widths(0)),
            self._outcome("the lightest groups gone, upper widths", lightest, self._widths(-1)),
        ]

    @property
    def _limits(self) -> tuple[int, int]:
        return self.config.min_groups, self.config.group_divisible

    def _widths(self, end: int) -> list[int]:
        """Per quantizer the narrowest (0) or the widest (-1) width that is allowed."""
        return [bits[end] for bits in self.allowed_bits]

    def _removed(self, scores: Tensor) -> list[int]:
        """Groups that each axis loses, if those of the lowest scores go."""
        none = torch.zeros(len(scores), dtype=torch.bool)
        chosen = choose_least_salient(scores, none, self.most_removed, self.sizes, *self._limits)
        return [int(part.sum()) for part in chosen.split(self.sizes)]

    def _outcome(self, title: str, removed: Sequence[int], widths: Sequence[int]) -> Outcome:
        rows = {id(quantizer): row for row, quantizer in enumerate(self.quantizers.quantizers)}
        cost = cost_at(
            self.model,
            {axis.name: range(count) for axis, count in zip(self.axes, removed, strict=True)},
            lambda quantizer: widths[rows[id(quantizer)]],
        )
        size = round(self.file.cost(removed, widths))
        return Outcome(title, sum(self.sizes) - sum(removed), cost.parameters, size, cost.relative_bops)
