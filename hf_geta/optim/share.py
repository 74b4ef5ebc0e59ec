"""Targets by share: exactly K groups go, and every width ends at the allowed one nearest to what was learned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_geta.config import GETAConfig
from hf_geta.config_checks import MIXED_SALIENCIES
from hf_geta.optim import saliency
from hf_geta.optim.choice import choose_least_salient, nearest_reachable
from hf_geta.optim.lockstep import choose_in_lockstep, nearest_in_lockstep
from hf_geta.optim.schedule import Schedule
from hf_geta.optim.space import PruningSpace
from hf_geta.optim.widths import WidthTable, equalize_, nearest_allowed

logger = logging.getLogger(__name__)


class Share:
    """Chooses the least salient groups, K in all.

    Args:
        config: `group_sparsity`, the kind of saliency, and limits on groups.
        schedule: how many have to be gone by which period.
        space: the pruning groups.
        widths: all quantizers.
        allowed_bits: per quantizer the widths that it may end with, ascending.
        width_sets: quantizers that end with one width.

    Attributes:
        scores: (kinds, num_groups) saliency, summed over steps; a decision leaves `memory` of it to the next one.
        kind_sizes: (num_groups,) how large the groups of each group's kind are in the mean.
        ceilings: None: the schedule alone bounds the widths.

    Raises:
        ValueError: when more groups are asked for than may go.
    """

    ceilings: Tensor | None = None

    def __init__(
        self,
        config: GETAConfig,
        schedule: Schedule,
        space: PruningSpace,
        widths: WidthTable,
        allowed_bits: Sequence[Sequence[int]],
        width_sets: Sequence[Sequence[int]],
    ) -> None:
        self.config, self.schedule = config, schedule
        self.space, self.widths, self.allowed_bits, self.width_sets = space, widths, allowed_bits, width_sets
        self.groups_to_remove = _groups_to_remove(config, space)
        self.observed = saliency.observed_kinds(config.saliency)
        self.scores = torch.zeros(len(self.observed), space.num_groups, device=widths.signed.device)
        self.memory = saliency.memory(schedule)
        entries = space.entries_per_group().to(self.scores.device)
        self.kind_sizes = saliency.mean_size_by_kind(entries, space.axis_kinds, space.axis_sizes)

    def observe(self) -> None:
        """Add what the present gradients say; no host sync."""
        if self.observed and self.groups_to_remove:
            self.scores += saliency.observe(saliency.first_order(self.space), self.observed)

    def decide(self, period: int, removed: Tensor) -> Tensor:
        """Flags of the groups to remove in `period`, (num_groups,) bool on the CPU; `removed` are gone already."""
        count, total = self.schedule.redundant_count(period, self.groups_to_remove), self.groups_to_remove
        limits, sizes = (self.config.min_groups, self.config.group_divisible), self.space.axis_sizes
        if self.space.families is None:
            chosen = choose_least_salient(self._ranking(), removed, count, sizes, *limits, total)
        else:
            families = self.space.lockstep(*limits)
            chosen = choose_in_lockstep(self._ranking(), removed, count, sizes, families, total)
        self.scores *= self.memory
        return chosen

    def _ranking(self) -> Tensor:
        """What a decision ranks the groups by, (num_groups,)."""
        config, scores = self.config, dict(zip(self.observed, self.scores, strict=True))
        weights = {config.saliency: 1.0}
        if config.saliency == "mix":
            weights = dict(zip(MIXED_SALIENCIES, config.saliency_weights or (1, 1, 1), strict=True))
        if "magnitude" in weights:
            scores["magnitude"] = saliency.magnitude(self.space)
        return saliency.mix(scores, weights, self.kind_sizes)

    def final_bits(self, removed: Tensor) -> Tensor:
        """The allowed width nearest to each quantizer's own, (quantizers,); in a set the widest."""
        bits = self.widths.bits()
        for row, allowed in enumerate(self.allowed_bits):
            bits[row] = nearest_allowed(bits[row], allowed)
        return equalize_(bits, self.width_sets)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"scores": self.scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.scores = state["scores"].to(self.scores.device, copy=True)


def _groups_to_remove(config: GETAConfig, space: PruningSpace) -> int:
    """K: round(group_sparsity x groups), or the nearest number that whole blocks reach: half a block away at most."""
    asked = round((config.group_sparsity or 0.0) * space.num_groups)
    limits = config.min_groups, config.group_divisible
    if space.families is None:
        nearest = partial(nearest_reachable, sizes=space.axis_sizes, min_groups=limits[0], divisible=limits[1])
    else:
        nearest = partial(nearest_in_lockstep, families=space.lockstep(*limits))
    most = nearest(space.num_groups)
    if asked > most:
        raise ValueError(
            f"group_sparsity={config.group_sparsity} asks for {asked} of {space.num_groups} groups, but "
            f"min_groups={config.min_groups} and group_divisible={config.group_divisible} let at most {most} go: "
            f"lower group_sparsity to {most / max(space.num_groups, 1):.3f} or relax them."
        )
    if config.group_sparsity and space.num_groups and asked == 0:
        logger.warning(
            "group_sparsity=%s of %d groups rounds to none, and none is removed: write more than %.2g to remove one.",
            config.group_sparsity,
            space.num_groups,
            0.5 / space.num_groups,
        )
    count = nearest(asked)
    if count != asked:
        logger.warning(
            "group_sparsity=%s asks for %d of %d groups; in whole blocks (group_divisible=%d%s) %d go.",
            config.group_sparsity,
            asked,
            space.num_groups,
            config.group_divisible,
            ", uniform" if config.uniform else "",
            count,
        )
    return count
