"""One price for structure and bits: which groups go and how many bits stay until a cost fits its budget. Pure.

With n_a groups removed from axis a and a width b_q for quantizer q, the cost of a model is

    C(n, b) = constant + sum over terms  coefficient * prod_dims (1 - sum_a share_a n_a) * prod_q b_q

Two kinds of moves lower it: remove the least salient group of an axis, lower a width by one step. Each move has an
expected rise of the loss and a saving at the present structure and widths; they are taken in order of rise per saving
until the budget holds. The ratio of the last move is the price lambda of min loss s.t. C <= C* (after GETA, Sec. 3,
with the constraint on the cost instead of on the number of groups). So the trade-off comes by itself: a layer that has
lost channels saves less by fewer bits and keeps them, a layer of few bits saves less by fewer channels and keeps those.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class CostTerm:
    """One product of the cost model, such as the bit operations of a layer or the bits of a tensor.

    Attributes:
        coefficient: its cost with nothing removed, over the widths below.
        dims: for every prunable dimension, (axis, share of the dimension that one group of it owns), ...
        quantizers: rows of the quantizers whose widths in bits multiply it.
    """

    coefficient: float
    dims: tuple[tuple[tuple[int, float], ...], ...]
    quantizers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A cost model and the cost that a run must end at or below; any unit.

    Attributes:
        terms: the cost that moves can lower.
        constant: the cost that none can.
        target: C*.
    """

    terms: tuple[CostTerm, ...]
    constant: float
    target: float

    def cost(self, removed: Sequence[int], bits: Sequence[float]) -> float:
        """C with `removed[a]` groups gone from axis a and `bits[q]` bits for quantizer q."""
        return self.constant + math.fsum(_term_cost(term, removed, bits) for term in self.terms)


@dataclasses.dataclass(frozen=True)
class Choices:
    """The moves that are open.

    Attributes:
        blocks: per axis the groups that may still go, block by block, in the order in which they would.
        removed: per axis the groups that are gone already.
        widths: per quantizer the allowed widths, ascending; it starts at the last.
        most_removed: groups of all axes that may be gone in the end.
    """

    blocks: Sequence[Sequence[Sequence[int]]]
    removed: Sequence[int]
    widths: Sequence[Sequence[int]]
    most_removed: int


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What `allocate` chose: groups to remove now, a width per quantizer, the cost that leaves, and the price paid."""

    groups: tuple[int, ...]
    bits: tuple[int, ...]
    cost: float
    price: float


def levels(bits: float, signed: bool) -> float:
    """Steps from zero to the clip: 2^(b-1) - 1, or 2^b - 1 on an unsigned grid."""
    return 2.0 ** (bits - signed) - 1


def allocate(
    budget: Budget,
    choices: Choices,
    group_rises: Sequence[float],
    noise: Sequence[float],
    signed: Sequence[bool],
) -> Allocation:
    """The moves with the least rise of the loss per saved cost, until C <= C* or no move is left.

    Args:
        budget: the cost model and C*.
        choices: what may move. All widths start at their widest, so that a decision does not depend on earlier ones.
        group_rises: expected rise of the loss per group, by its number; added up over a block.
        noise: per quantizer, the loss that its rounding costs times `levels`^2: rounding errors scale with the step
            size, and the loss with their square, so that width b costs noise / levels(b)^2.
        signed: per quantizer.

    Returns:
        `Allocation`. What the last move saved beyond the budget goes back into wider widths, as far as it reaches: no
        width can be raised without leaving the budget.
    """
    state = _State(budget, choices.removed, [widths[-1] for widths in choices.widths])
    rises = [[sum(group_rises[group] for group in block) for block in axis] for axis in choices.blocks]
    taken = [0] * len(choices.blocks)  # blocks, per axis
    room = choices.most_removed - sum(choices.removed)
    price = 0.0

    def rise_and_saving(kind: int, index: int) -> tuple[float, float] | None:
        """Of the next move of an axis (kind 0) or a quantizer (kind 1); None if there is none left."""
        if kind == 0:
            if taken[index] >= len(rises[index]) or len(choices.blocks[index][taken[index]]) > room:
                return None
            return rises[index][taken[index]], state.saving_of_groups(index, len(choices.blocks[index][taken[index]]))
        narrower = _neighbour(choices.widths[index], state.bits[index], -1)
        if narrower is None:
            return None
        rise = noise[index] * _noise_step(narrower, state.bits[index], signed[index])
        return rise, state.saving_of_width(index, narrower)

    # Every move makes the others save less, so a ratio only grows: the one on top, if still right, is the least.
    heap: list[tuple[float, int, int]] = []
    moves = itertools.chain(((0, a) for a in range(len(taken))), ((1, q) for q in range(len(choices.widths))))
    for kind, index in moves:
        _push(heap, kind, index, rise_and_saving(kind, index))
    while heap and not state.fits():
        _, kind, index = heapq.heappop(heap)
        move = rise_and_saving(kind, index)
        if move is None:
            continue
        ratio = _ratio(*move)
        if heap and ratio > heap[0][0]:
            heapq.heappush(heap, (ratio, kind, index))
            continue
        price = max(price, ratio)
        if kind == 0:
            size = len(choices.blocks[index][taken[index]])
            state.remove_groups(index, size)
            room -= size
            taken[index] += 1
        else:
            state.set_width(index, _neighbour(choices.widths[index], state.bits[index], -1) or 0)
        _push(heap, kind, index, rise_and_saving(kind, index))
    _spend_slack(state, choices, noise, signed)
    groups = [g for axis, count in zip(choices.blocks, taken) for block in axis[:count] for g in block]
    return Allocation(tuple(groups), tuple(state.bits), state.exact_cost(), price)


class _State:
    """The cost as moves are taken, term by term."""

    def __init__(self, budget: Budget, removed: Sequence[int], bits: Sequence[int]) -> None:
        self.budget, self.removed, self.bits = budget, list(removed), list(bits)
        self.of_axis: list[list[int]] = [[] for _ in removed]
        self.of_quantizer: list[list[int]] = [[] for _ in bits]
        for number, term in enumerate(budget.terms):
            for axis in {axis for dim in term.dims for axis, _ in dim}:
                self.of_axis[axis].append(number)
            for row in set(term.quantizers):
                self.of_quantizer[row].append(number)
        self.costs = [_term_cost(term, self.removed, self.bits) for term in budget.terms]
        self.cost = self.exact_cost()

    def exact_cost(self) -> float:
        return self.budget.constant + math.fsum(self.costs)

    def fits(self) -> bool:
        """C <= C*; the running sum, which carries rounding from move to move, is renewed before it is believed."""
        if self.cost <= self.budget.target * (1 + 1e-9):
            self.cost = self.exact_cost()
        return self.cost <= self.budget.target

    def saving_of_groups(self, axis: int, count: int) -> float:
        self.removed[axis] += count
        saving = self._saving(self.of_axis[axis])
        self.removed[axis] -= count
        return saving

    def saving_of_width(self, row: int, bits: int) -> float:
        before, self.bits[row] = self.bits[row], bits
        saving = self._saving(self.of_quantizer[row])
        self.bits[row] = before
        return saving

    def remove_groups(self, axis: int, count: int) -> None:
        self.removed[axis] += count
        self._update(self.of_axis[axis])

    def set_width(self, row: int, bits: int) -> None:
        self.bits[row] = bits
        self._update(self.of_quantizer[row])

    def _saving(self, numbers: Sequence[int]) -> float:
        return sum(self.costs[i] - _term_cost(self.budget.terms[i], self.removed, self.bits) for i in numbers)

    def _update(self, numbers: Sequence[int]) -> None:
        for i in numbers:
            cost = _term_cost(self.budget.terms[i], self.removed, self.bits)
            self.cost += cost - self.costs[i]
            self.costs[i] = cost


def _term_cost(term: CostTerm, removed: Sequence[int], bits: Sequence[float]) -> float:
    cost = term.coefficient
    for dim in term.dims:
        cost *= 1 - sum(share * removed[axis] for axis, share in dim)
    for row in term.quantizers:
        cost *= bits[row]
    return cost


def _spend_slack(state: _State, choices: Choices, noise: Sequence[float], signed: Sequence[bool]) -> None:
    """Widen widths, those first that lower the loss most per cost, while the budget holds."""
    state.cost = state.exact_cost()
    while True:
        best: tuple[float, int, int] | None = None
        for row, widths in enumerate(choices.widths):
            wider = _neighbour(widths, state.bits[row], 1)
            if wider is None or state.cost - state.saving_of_width(row, wider) > state.budget.target:
                continue
            gain = noise[row] * _noise_step(state.bits[row], wider, signed[row])
            ratio = _ratio(gain, -state.saving_of_width(row, wider))
            if best is None or ratio > best[0]:
                best = ratio, row, wider
        if best is None:
            return
        state.set_width(*best[1:])


def _push(heap: list[tuple[float, int, int]], kind: int, index: int, move: tuple[float, float] | None) -> None:
    if move is not None:
        heapq.heappush(heap, (_ratio(*move), kind, index))


def _ratio(rise: float, saving: float) -> float:
    """Rise per saving; what saves nothing comes last."""
    return rise / saving if saving > 0 else math.inf


def _neighbour(widths: Sequence[int], bits: int, step: int) -> int | None:
    """The next allowed width below (-1) or above (1), None at the end."""
    place = widths.index(bits) + step
    return widths[place] if 0 <= place < len(widths) else None


def _noise_step(narrower: float, wider: float, signed: bool) -> float:
    """1 / levels^2 of the narrower width over that of the wider one."""
    return levels(narrower, signed) ** -2 - levels(wider, signed) ** -2
