"""Budget mode while a run goes on: what is observed between decisions, and the widths and groups that follow from it.

The loss that a move costs is estimated by the Gauss-Newton term that both kinds share: where a change delta of the
network's tensors has the first-order effect <g, delta> on a batch's loss, it raises the loss by about half of that
effect's mean square (the empirical Fisher information along delta, up to the batch size, which all moves share).

    a group        delta = -x            <g, x>; a group is met where it is made and where it is used, hence half of it
    a width        delta = Q(x) - x      d <g, r>, which is the gradient of ln d: it costs nothing to observe

What was observed at the present width holds for others by how much they err, with the clips that they would have.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_geta.config import GETAConfig
from hf_geta.optim import saliency
from hf_geta.optim.budget import Allocation, Budget, Choices, allocate
from hf_geta.optim.lockstep import open_blocks
from hf_geta.optim.rounding import squared_errors
from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable

# A group's entries are those that produce it and those that use it: <x, g> over all of them counts it twice.
GROUP_FACTOR = 0.25
# What a decision leaves of the sums for the next one: few steps lie between two, and their gradients are noisy.
MEMORY = 0.5
# Surcharges per group, from 2^-10 to 2^10 times the largest rise, that are tried where a cap on groups binds.
SURCHARGE_DOUBLINGS = 21

Rises = Mapping[int, float]  # width -> what it costs

logger = logging.getLogger(__name__)


class Pricing:
    """The price of a run with a budget, and the groups and widths that follow from it.

    Args:
        config: limits on groups, the number of pruning periods. Without the joint rule (an ablation) there is no common
            price: groups pay for half of the way (of its logarithm) at full widths, then widths for the rest.
        space: the pruning groups.
        weights: per quantizer the weight that it rounds; None for an input.
        widths: all quantizers.
        allowed_bits: per quantizer the widths that it may end with, ascending.
        width_sets: quantizers that have one width at every decision.
        budget: the cost model and C*.

    Attributes:
        scores: (num_groups,) <x, g>^2, summed over steps; a decision halves it.
        sensitivity: (quantizers,) squared gradients of ln d over d^2, likewise.
        ceilings: (quantizers,) the widths that the last decision left, in bits; upper bounds while the run goes on.
        price: of the last move of the last decision: loss per cost, both as `allocate` counts them; where a cap on
            groups binds, with their surcharge.
        cost: C that the last decision leads to.
        least: about the least C that groups and widths reach.

    Raises:
        ValueError: when no choice of groups and widths reaches the budget.
    """

    groups_to_remove: int | None = None  # nobody says how many

    def __init__(
        self,
        config: GETAConfig,
        space: PruningSpace,
        weights: Sequence[Tensor | None],
        widths: WidthTable,
        allowed_bits: Sequence[Sequence[int]],
        width_sets: Sequence[Sequence[int]],
        budget: Budget,
    ) -> None:
        self.config, self.space, self.widths, self.allowed_bits = config, space, widths, allowed_bits
        self.weights = weights
        self.budget = budget
        self.first_of = list(range(len(allowed_bits)))  # quantizer -> the one that decides for it
        for rows in width_sets:
            for row in rows:
                self.first_of[row] = rows[0]
        share = 1.0 if config.group_sparsity is None else config.group_sparsity
        self.families = space.lockstep(config.min_groups, config.group_divisible)
        self.most_removed = int(share * space.num_groups + 1e-9)  # a cap: never rounded up
        self.scores = torch.zeros(space.num_groups, device=widths.signed.device)
        self.sensitivity = torch.zeros_like(widths.signed)
        self.ceilings = torch.full_like(self.sensitivity, float(config.initial_bits))  # none before the first decision
        self.price, self.start = 0.0, self._cost_before()
        self.cost = self.start
        self.least = self._least_cost()
        if self.least > budget.target:
            raise ValueError(
                f"{self._asked()} cannot be met: with every width at its lower bound and as many groups removed as "
                f"group_sparsity, min_groups and group_divisible allow, about {self._in_words(self.least)} is left. "
                f"Raise the budget, {self._ways_to_save()}, or let more groups go."
            )
        if budget.target >= self.start:
            logger.warning(
                "%s asks for nothing: with every group and every width at its upper bound, %s is left. Is it a typo?",
                self._asked(),
                self._in_words(self.start),
            )

    def observe(self) -> None:
        """Add what the present gradients say of groups and widths; no host sync."""
        if self.most_removed:
            self.scores += saliency.observe(saliency.first_order(self.space), ["fisher"])[0]
        per_step = self.widths.step_size_gradients() * torch.exp(-self.widths.log_step_size())
        self.sensitivity += per_step.square().nan_to_num(0.0, 0.0, 0.0)

    def decide(self, period: int, removed: Tensor) -> Tensor:
        """Flags of the groups to remove in `period`, (num_groups,) bool on the CPU; sets ceilings, price and cost.

        Args:
            removed: (num_groups,) bool, the groups that are gone already.
        """
        removed, (rises, width_rises) = removed.cpu(), self._observed()
        rises = self._with_surcharge(rises, width_rises, removed, self.most_removed)
        plan = self._solve(self.budget, rises, width_rises, removed, self.most_removed)
        periods = self.config.pruning_periods - period  # that are left, this one included
        chosen = self._flags(plan.first_groups(math.ceil(len(plan.groups) / periods)))
        planned = removed | self._flags(plan.groups)
        left = (periods - 1) / self.config.pruning_periods  # of the way from the start, in equal factors
        target = self.budget.target * max(self.start / self.budget.target, 1.0) ** left
        on_the_way = dataclasses.replace(self.budget, target=target)
        self._set(self._solve(on_the_way, rises, width_rises, planned, int(planned.sum())).bits, removed | chosen)
        self.price = plan.price
        return chosen

    def final_bits(self, removed: Tensor) -> Tensor:
        """The widths, (quantizers,), that the whole budget leaves to the groups that are left."""
        removed, (rises, width_rises) = removed.cpu(), self._observed()
        found = self._solve(self.budget, rises, width_rises, removed, int(removed.sum()))
        self._set(found.bits, removed)
        self.price = found.price
        if self.cost > self.budget.target * (1 + 1e-9):  # rounding of sums
            left = self._in_words(self.cost)
            logger.warning("%s, but %s is left with every width at its bound.", self._asked(), left)
        return self.ceilings

    def gap(self, removed: Tensor) -> float:
        """Present cost over C*, less 1: with the widths as they are and the groups flagged in `removed` gone."""
        return self._cost(removed.cpu(), self.widths.bits().tolist()) / self.budget.target - 1

    def _asked(self) -> str:
        """The budget as the config writes it."""
        if self.config.target_size is None:
            return f"target_bops={self.config.target_bops}"
        return f"target_size={self.config.target_size!r} ({self._in_words(self.budget.target)})"

    def _ways_to_save(self) -> str:
        if self.config.target_size is None:
            return "lower weight_bits or activation_bits"
        is_float = self.config.quantize_embeddings is None
        return "lower weight_bits" + ", write quantize_embeddings=8 where there are token embeddings" * is_float

    def _in_words(self, cost: float) -> str:
        return f"{cost:.4g}" if self.config.target_size is None else f"{cost:,.0f} bytes"

    def _observed(self) -> tuple[list[float], list[Rises]]:
        """What groups cost, and per quantizer and width, what rounding does; half of it is forgotten."""
        rises, width_rises = (GROUP_FACTOR * self.scores.double()).tolist(), self._width_rises()
        self.scores *= MEMORY
        self.sensitivity *= MEMORY
        return rises, width_rises

    def _set(self, bits: Sequence[int], removed: Tensor) -> None:
        self.ceilings = torch.tensor(bits, dtype=torch.float32).to(self.ceilings.device)
        self.cost = self._cost(removed, bits)

    def _flags(self, groups: Sequence[int]) -> Tensor:
        flags = torch.zeros(self.space.num_groups, dtype=torch.bool)
        flags[list(groups)] = True
        return flags

    def _counts(self, removed: Tensor) -> list[int]:
        return [int(gone.sum()) for gone in removed.split(self.space.axis_sizes)]

    def _cost(self, removed: Tensor, bits: Sequence[float]) -> float:
        return self.budget.cost(self._counts(removed), bits)

    def _width_rises(self) -> list[Rises]:
        """Per quantizer and width, what rounding costs."""
        errors = map(squared_errors, self.widths.quantizers, self.weights, self.allowed_bits)
        values = self.sensitivity.double().tolist()
        return [{bits: value * e for bits, e in of_row.items()} for value, of_row in zip(values, errors, strict=True)]

    def _with_surcharge(
        self, rises: list[float], width_rises: Sequence[Rises], removed: Tensor, most_removed: int
    ) -> list[float]:
        """`rises`, plus as much per group as it takes to meet the whole budget with no more groups than may go.

        Where `group_sparsity` caps the groups, those that save much must not be passed over for cheap ones.
        """
        if most_removed == int(removed.sum()):
            return rises
        surcharge, step = 0.0, max(rises, default=0.0) or 1.0
        for doubling in range(SURCHARGE_DOUBLINGS):
            raised = [rise + surcharge for rise in rises]
            if self._solve(self.budget, raised, width_rises, removed, most_removed).cost <= self.budget.target:
                return raised
            surcharge = step * 2.0 ** (doubling - SURCHARGE_DOUBLINGS // 2)
        return raised

    def _solve(
        self, budget: Budget, rises: Sequence[float], width_rises: Sequence[Rises], removed: Tensor, most_removed: int
    ) -> Allocation:
        choices = Choices(
            blocks=open_blocks(torch.tensor(rises, dtype=torch.float64), removed, self.space.axis_sizes, self.families),
            families=[family.axes for family in self.families],
            removed=self._counts(removed),
            widths=self.allowed_bits,
            most_removed=most_removed,
        )
        if "joint_rule" not in self.config.without or most_removed == sum(choices.removed):
            return self._allocate_in_sets(budget, choices, rises, width_rises)
        half = dataclasses.replace(budget, target=(self.start * budget.target) ** 0.5)
        at_full_width = dataclasses.replace(choices, widths=[bits[-1:] for bits in self.allowed_bits])
        pruned = self._allocate_in_sets(half, at_full_width, rises, width_rises)
        counts = self._counts(removed | self._flags(pruned.groups))
        structure = dataclasses.replace(choices, removed=counts, blocks=[()] * len(self.families))
        found = self._allocate_in_sets(budget, structure, rises, width_rises)
        found = dataclasses.replace(found, blocks=pruned.blocks)
        if found.cost <= budget.target:
            return found
        # its half was not enough: a common price after all
        return self._allocate_in_sets(budget, choices, rises, width_rises)

    def _allocate_in_sets(
        self, budget: Budget, choices: Choices, rises: Sequence[float], width_rises: Sequence[Rises]
    ) -> Allocation:
        """`allocate`, in which a set is one quantizer: a move lowers all its widths, and what it costs adds up."""
        deciding = sorted(set(self.first_of))
        number = {row: position for position, row in enumerate(deciding)}
        column = [number[first] for first in self.first_of]
        terms = [dataclasses.replace(t, quantizers=tuple(column[row] for row in t.quantizers)) for t in budget.terms]
        together = [dict.fromkeys(choices.widths[row], 0.0) for row in deciding]
        for position, of_widths in zip(column, width_rises, strict=True):
            for bits in together[position]:
                together[position][bits] += of_widths[bits]
        found = allocate(
            dataclasses.replace(budget, terms=tuple(terms)),
            dataclasses.replace(choices, widths=[choices.widths[row] for row in deciding]),
            rises,
            together,
        )
        return dataclasses.replace(found, bits=tuple(found.bits[position] for position in column))

    def _cost_before(self) -> float:
        return self.budget.cost([0] * len(self.space.axis_sizes), [bits[-1] for bits in self.allowed_bits])

    def _least_cost(self) -> float:
        ones = [1.0] * self.space.num_groups
        none_removed = torch.zeros(self.space.num_groups, dtype=torch.bool)
        goal = dataclasses.replace(self.budget, target=0.0)
        falling = [{width: 2.0**-width for width in bits} for bits in self.allowed_bits]
        return self._solve(goal, ones, falling, none_removed, self.most_removed).cost

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {name: getattr(self, name) for name in ("scores", "sensitivity", "ceilings", "price", "cost")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value.to(self.scores.device, copy=True) if isinstance(value, Tensor) else value)
