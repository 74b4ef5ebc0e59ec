"""Which groups go where axes shrink in lockstep? The same number from each axis of a family, and exactly K. Pure.

A block takes the next least salient groups of every axis of its family at once, so that families, few and large, take
the place of axes. What goes until the end of the run is planned at every decision: of all ways to make up K from whole
blocks the one with the least sum of scores, by dynamic programming over the number of groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_geta.optim.choice import removable_groups


class Lockstep(NamedTuple):
    """Axes that lose the same number of groups, and how many each loses at a time, block after block."""

    axes: tuple[int, ...]
    blocks: tuple[int, ...]

    @classmethod
    def of(
        cls, axes: Sequence[int], size: int, min_groups: int, divisible: int, sizes: Sequence[int] | None = None
    ) -> Lockstep:
        """Axes of `size` groups each, in the blocks of `removable_groups`; `sizes`: what may be left, if not any."""
        ends = itertools.accumulate(removable_groups(size, min_groups, divisible))
        allowed = set(range(size) if sizes is None else sizes)
        possible = [end for end in ends if size - end in allowed]
        return cls(tuple(axes), tuple(end - start for start, end in itertools.pairwise([0, *possible])))


def open_blocks(
    scores: Tensor, removed: Tensor, sizes: Sequence[int], families: Sequence[Lockstep]
) -> list[list[list[int]]]:
    """Per family the groups that may still go, the least salient of each axis first, in the blocks in which they may.

    Args:
        scores, removed: (num_groups,) saliency; bool, the groups that are gone already.
        sizes: groups per axis.
    """
    starts = [0, *itertools.accumulate(sizes)]
    opened = []
    for family in families:
        orders = []
        for axis in family.axes:
            alive = (~removed[starts[axis] : starts[axis + 1]]).nonzero().squeeze(1) + starts[axis]
            orders.append(alive[torch.argsort(scores[alive], stable=True)].tolist())
        gone = sizes[family.axes[0]] - len(orders[0])
        left = [end - gone for end in itertools.accumulate(family.blocks)]
        spans = itertools.pairwise([0, *(end for end in left if end > 0)])
        opened.append([[group for order in orders for group in order[start:end]] for start, end in spans])
    return opened


def choose_in_lockstep(
    scores: Tensor, removed: Tensor, count: int, sizes: Sequence[int], families: Sequence[Lockstep], total: int
) -> Tensor:
    """Flags of the groups to remove next, as `choose_least_salient`: at most `count` gone, on the way to `total`.

    Raises:
        ValueError: if whole blocks do not reach `total`.
    """
    # a score that is no number is the highest, and sums of it stay finite
    finite = np.nan_to_num(scores.detach().double().cpu().numpy(), nan=1e100, posinf=1e100, neginf=-1e100)
    gone = removed.cpu()
    opened = open_blocks(torch.from_numpy(finite), gone, sizes, families)
    costs = [[float(finite[block].sum()) for block in blocks] for blocks in opened]
    taken = _plan([[len(block) for block in blocks] for blocks in opened], costs, total - int(gone.sum()))
    if taken is None:
        nearest = nearest_in_lockstep(total, families)
        raise ValueError(f"{total} groups cannot go in whole blocks of every layer: the nearest count is {nearest}.")
    ranked = []
    for blocks, block_costs, number in zip(opened, costs, taken, strict=True):
        means = (cost / len(block) for cost, block in zip(block_costs, blocks, strict=True))
        ranked += list(zip(itertools.accumulate(means, max), blocks[:number], strict=False))
    ranked.sort(key=lambda item: item[0])  # stable: the blocks of a family stay in order
    chosen, left = torch.zeros_like(gone), count - int(gone.sum())
    for _, block in ranked:
        if (left := left - len(block)) < 0:
            break
        chosen[block] = True
    return chosen


def nearest_in_lockstep(asked: int, families: Sequence[Lockstep]) -> int:
    """The number of groups nearest to `asked` that whole blocks add up to; of two as near, the larger."""
    reachable = np.ones(1, dtype=bool)
    for family in families:
        ends = [end * len(family.axes) for end in itertools.accumulate(family.blocks, initial=0)]
        before, reachable = reachable, np.zeros(len(reachable) + ends[-1], dtype=bool)
        for end in ends:
            reachable[end : end + len(before)] |= before
    return min(np.flatnonzero(reachable).tolist(), key=lambda count: (abs(count - asked), -count))


def _plan(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], count: int) -> list[int] | None:
    """How many blocks of every family go, `count` groups in all, at the least sum of costs; None if none add up."""
    unit = int(np.gcd.reduce([count, *itertools.chain(*sizes)])) or 1
    best = np.full(count // unit + 1, np.inf)
    best[0] = 0.0
    picks = []
    for blocks, block_costs in zip(sizes, costs, strict=True):
        before, best = best, np.full_like(best, np.inf)
        pick = np.zeros(len(best), dtype=np.int64)
        ends = itertools.accumulate(blocks, initial=0)
        for number, (end, cost) in enumerate(zip(ends, itertools.accumulate(block_costs, initial=0.0), strict=True)):
            if end > count:
                break
            candidates = before[: len(before) - end // unit] + cost
            better = candidates < best[end // unit :]
            best[end // unit :][better] = candidates[better]
            pick[end // unit :][better] = number
        picks.append(pick)
    if not np.isfinite(best[-1]):
        return None
    taken, left = [], count // unit
    for blocks, pick in zip(reversed(sizes), reversed(picks), strict=True):
        taken.append(int(pick[left]))
        left -= sum(blocks[: taken[-1]]) // unit
    return taken[::-1]
