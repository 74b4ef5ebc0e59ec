"""Which groups go? Whole blocks, exactly as many groups as asked, at the least sum of scores. Pure.

An axis of n > m groups (m = `group_divisible`) shrinks by a *head* of n mod m groups to a multiple of m, then by
blocks of m; axes of at most m groups lose one at a time, and stand side by side in one *pool*. Least salient first,
with the whole of K planned at every decision, so that what is left can always be finished exactly.

All blocks but the heads have m groups. Once it is settled which heads go (and how many of the pool's groups make up
its own head, 0 .. m - 1), the rest is a matter of taking the cheapest blocks. Heads are chosen by dynamic programming
over the sum of their sizes: at a price per group, an axis is worth what its head and those blocks below the price cost
beyond it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 16  # sets of heads that are filled up and compared, at each price
PRICE_FACTORS = (1.0, 2.0, 0.5, 4.0, 0.25, 16.0)  # prices, over that of the last block taken
GAP = 1e-3  # between cost and bound, at which the search ends


class Option(NamedTuple):
    """One way to open an axis: a head of `head` groups at `head_cost`, then blocks of m at `block_costs`, ascending."""

    head: int
    head_cost: float
    block_costs: np.ndarray


CLOSED = Option(0, 0.0, np.zeros(0))


class Lane(NamedTuple):
    """An axis, or the pool: the groups that may still go, least salient first, their scores, and how it may open."""

    groups: np.ndarray
    scores: np.ndarray
    options: list[Option]
    is_pool: bool


def choose_least_salient(
    scores: Tensor,
    removed: Tensor,
    count: int,
    sizes: Sequence[int],
    min_groups: int = 1,
    divisible: int = 1,
    total: int | None = None,
) -> Tensor:
    """Flags of the groups to remove next: the least salient, in whole blocks, on the way to `total`.

    Args:
        scores: (num_groups,) saliency.
        removed: (num_groups,) bool, the groups that are gone already.
        count: groups gone afterwards, those in `removed` included. With `divisible` > 1 the result may stay up to a
            block short of it, but where `count` is `total`.
        sizes: groups per axis.
        total: groups gone at the end of the run, `count` if None; see `nearest_reachable`.

    Returns:
        (num_groups,) bool on the CPU, disjoint from `removed`. One by one, ties go to the lower group number.

    Raises:
        ValueError: if whole blocks do not reach `total`.
    """
    total = count if total is None else total
    gone = removed.cpu().numpy()
    # a score that is no number is the highest, and sums of it stay finite
    finite = np.nan_to_num(scores.detach().double().cpu().numpy(), nan=1e100, posinf=1e100, neginf=-1e100)
    lanes = _lanes(finite, gone, sizes, min_groups, divisible)
    taken = _plan(lanes, total - int(gone.sum()), divisible)
    if taken is None:
        raise ValueError(
            f"{total} groups cannot go in whole blocks with min_groups={min_groups} and group_divisible={divisible}: "
            f"the nearest count is {nearest_reachable(total, sizes, min_groups, divisible)}."
        )
    chosen = np.zeros(len(gone), dtype=bool)
    chosen[_least_salient_blocks(lanes, taken, count - int(gone.sum()), divisible)] = True
    return torch.from_numpy(chosen)


def nearest_reachable(asked: int, sizes: Sequence[int], min_groups: int = 1, divisible: int = 1) -> int:
    """The number of groups nearest to `asked` that whole blocks add up to; of two as near, the larger."""
    groups = sum(sizes)
    lanes = _lanes(np.zeros(groups), np.zeros(groups, dtype=bool), sizes, min_groups, divisible)
    value, _ = _choose_heads(lanes, partial(_lack_of_room, divisible=divisible))
    heads = np.flatnonzero(np.isfinite(value))
    most = -value[heads].astype(np.int64)  # heads, heads + m, ..., most
    steps = np.floor((asked - heads) / divisible + 0.5).astype(np.int64)
    counts = np.clip(heads + divisible * steps, heads, most)
    return int(min(counts, key=lambda count: (abs(count - asked), -count)))


def removable_groups(size: int, min_groups: int, divisible: int) -> list[int]:
    """Sizes of the blocks in which an axis of `size` groups may shrink, in order.

    With `divisible` m > 1 the first block takes `size` to a multiple of m and each later one takes m more; axes of
    at most m groups (heads, mostly) lose one at a time. `min_groups` always stay.
    """
    block = divisible if size > divisible else 1
    blocks: list[int] = []
    left = size
    while True:
        step = left % block or block
        if left - step < max(min_groups, 1):
            return blocks
        blocks.append(step)
        left -= step


def _lack_of_room(option: Option, divisible: int) -> float:
    """Minus the most groups that go with an option."""
    return -float(option.head + divisible * len(option.block_costs))


def _lanes(
    scores: np.ndarray, removed: np.ndarray, sizes: Sequence[int], min_groups: int, divisible: int
) -> list[Lane]:
    """What may still go: the axes of more than `divisible` groups one by one, then the others as the pool."""
    lanes, pool = [], [np.zeros(0, dtype=np.int64)]
    offset = 0
    for size in sizes:
        alive = offset + np.flatnonzero(~removed[offset : offset + size])
        limit = sum(removable_groups(size, min_groups, divisible)) - (size - len(alive))
        groups = alive[np.argsort(scores[alive], kind="stable")][: max(limit, 0)]
        offset += size
        if size <= divisible or divisible == 1:
            pool.append(groups)
        elif len(groups):
            head = len(groups) % divisible
            opened = _option(scores[groups], head, divisible)
            lanes.append(Lane(groups, scores[groups], [CLOSED, opened] if head else [opened], is_pool=False))
    groups = np.concatenate(pool)
    groups = groups[np.argsort(scores[groups], kind="stable")]
    heads = range(min(len(groups), divisible - 1) + 1)
    options = [_option(scores[groups], head, divisible) for head in heads]
    return [*lanes, Lane(groups, scores[groups], options, is_pool=True)]


def _option(scores: np.ndarray, head: int, divisible: int) -> Option:
    """The option with this head: whole blocks of what follows it, which never get cheaper, whatever rounding says."""
    blocks = scores[head : len(scores) - (len(scores) - head) % divisible].reshape(-1, divisible)
    return Option(head, float(scores[:head].sum()), np.maximum.accumulate(blocks.sum(1)))


def _plan(lanes: list[Lane], count: int, divisible: int) -> list[int] | None:
    """How many groups of every lane go, `count` in all, at about the least sum of scores; None if no way adds up.

    At any price the least value plus price x count is a lower bound (the Lagrangian's): near it, the search ends.
    """
    best_cost, best, bound = np.inf, None, -np.inf
    for price in np.multiply(PRICE_FACTORS, _price(lanes, count, divisible)):
        value, picks = _choose_heads(lanes, partial(_reduced_cost, price=price, divisible=divisible))
        bounds = value + price * count
        cost, taken = _cheapest_filling(lanes, bounds, picks, count, divisible)
        if cost < best_cost:
            best_cost, best = cost, taken
        bound = max(bound, bounds[count % divisible : count + 1 : divisible].min(initial=np.inf))
        if best_cost <= bound * (1 + GAP):
            return best
    if best is None:  # so near to all that there is that the axes with most room must be open
        value, picks = _choose_heads(lanes, partial(_lack_of_room, divisible=divisible))
        _, best = _cheapest_filling(lanes, value, picks, count, divisible)
    return best


def _cheapest_filling(
    lanes: list[Lane], bounds: np.ndarray, picks: list[np.ndarray], count: int, divisible: int
) -> tuple[float, list[int] | None]:
    """(cost, groups per lane) of the best of the first sets of heads, in the order of `bounds`, that can be filled."""
    best_cost, best, filled = np.inf, None, 0
    heads = np.arange(count % divisible, min(count + 1, len(bounds)), divisible)
    for head in heads[np.argsort(bounds[heads], kind="stable")]:
        if not bounds[head] < best_cost or filled == CANDIDATES:
            break
        options, blocks = _trace(lanes, picks, int(head)), (count - int(head)) // divisible
        if blocks <= sum(len(option.block_costs) for option in options):
            cost, taken = _fill(options, blocks, divisible)
            filled += 1
            if cost < best_cost:
                best_cost, best = cost, taken
    return best_cost, best


def _price(lanes: list[Lane], count: int, divisible: int) -> float:
    """The score per group of the block where the cheapest blocks, heads as well, add up to `count`."""
    opened = [lane.options[-1] for lane in lanes]
    sizes = np.concatenate([np.r_[option.head, np.full(len(option.block_costs), divisible)] for option in opened])
    costs = np.concatenate([np.r_[option.head_cost, option.block_costs] for option in opened])
    means = costs / np.maximum(sizes, 1)
    order = np.argsort(means, kind="stable")
    position = int(np.searchsorted(np.cumsum(sizes[order]), count))
    return float(means[order[min(position, len(order) - 1)]])


def _reduced_cost(option: Option, price: float, divisible: int) -> float:
    """What an option costs beyond `price` per group, with those of its blocks that cost less."""
    return option.head_cost - price * option.head + np.minimum(option.block_costs - price * divisible, 0).sum()


def _choose_heads(lanes: list[Lane], value_of: Callable[[Option], float]) -> tuple[np.ndarray, list[np.ndarray]]:
    """(least value, by sum of heads; per lane the option behind it): one option of every lane, values added up."""
    value, picks = np.zeros(1), []
    for lane in lanes:
        reach = len(value) + max(option.head for option in lane.options)
        sums = np.full((len(lane.options), reach), np.inf)
        for row, option in zip(sums, lane.options, strict=True):
            row[option.head : option.head + len(value)] = value + value_of(option)
        value = sums.min(0)
        picks.append(sums.argmin(0).astype(np.int16))
    return value, picks


def _trace(lanes: list[Lane], picks: list[np.ndarray], heads: int) -> list[Option]:
    """The options behind a sum of heads."""
    options = []
    for lane, pick in zip(reversed(lanes), reversed(picks), strict=True):
        options.append(lane.options[pick[heads]])
        heads -= options[-1].head
    return options[::-1]


def _fill(options: list[Option], blocks: int, divisible: int) -> tuple[float, list[int]]:
    """(cost, groups per lane) of the heads and the `blocks` cheapest blocks, which are the first ones of each lane."""
    costs = np.concatenate([option.block_costs for option in options])
    lane_of_block = np.repeat(np.arange(len(options)), [len(option.block_costs) for option in options])
    order = np.argsort(costs, kind="stable")[:blocks]
    per_lane = np.bincount(lane_of_block[order], minlength=len(options))
    cost = costs[order].sum() + sum(option.head_cost for option in options)
    return cost, [option.head + divisible * int(n) for option, n in zip(options, per_lane, strict=True)]


def _least_salient_blocks(lanes: list[Lane], taken: list[int], count: int, divisible: int) -> np.ndarray:
    """Groups of the plan, in blocks of least mean score first until `count`; the blocks of a lane in its order."""
    means, sizes = [], []
    for lane, number in zip(lanes, taken, strict=True):
        block = 1 if lane.is_pool else divisible
        head = number % block
        lane_sizes = np.array([head] * (head > 0) + [block] * (number // block), dtype=np.int64)
        sums = np.add.reduceat(lane.scores[:number], np.cumsum(lane_sizes) - lane_sizes)
        means.append(np.maximum.accumulate(sums / lane_sizes))
        sizes.append(lane_sizes)
    size, order = np.concatenate(sizes), np.argsort(np.concatenate(means), kind="stable")
    chosen = np.zeros(len(size), dtype=bool)
    chosen[order[np.cumsum(size[order]) <= count]] = True
    groups = np.concatenate([lane.groups[:number] for lane, number in zip(lanes, taken, strict=True)])
    return groups[np.repeat(chosen, size)]
