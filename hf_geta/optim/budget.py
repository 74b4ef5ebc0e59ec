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
from collections.abc import Mapping, Sequence
from typing import Literal


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
        blocks: per family the groups that may still go, block by block, in the order in which they would.
        removed: per axis the groups that are gone already.
        widths: per quantizer the allowed widths, ascending; it starts at the last.
        most_removed: groups of all axes that may be gone in the end.
        families: axes of which a block takes equally many groups; None: each axis by itself.
    """

    blocks: Sequence[Sequence[Sequence[int]]]
    removed: Sequence[int]
    widths: Sequence[Sequence[int]]
    most_removed: int
    families: Sequence[Sequence[int]] | None = None


@dataclasses.dataclass(frozen=True)
class Allocation:
    """What `allocate` chose: blocks of groups to remove, the cheapest first; a width per quantizer, cost and price."""

    blocks: tuple[tuple[int, ...], ...]
    bits: tuple[int, ...]
    cost: float
    price: float

    @property
    def groups(self) -> tuple[int, ...]:
        """All groups that go."""
        return tuple(group for block in self.blocks for group in block)

    def first_groups(self, count: int) -> tuple[int, ...]:
        """Of the groups that go the first `count`, and what is left of the last one's block."""
        ends = itertools.accumulate(map(len, self.blocks), initial=0)
        return tuple(group for end, block in zip(ends, self.blocks) if end < count for group in block)


def allocate(
    budget: Budget,
    choices: Choices,
    group_rises: Sequence[float],
    width_rises: Sequence[Mapping[int, float]],
) -> Allocation:
    """The moves with the least rise of the loss per saved cost, until C <= C* or no move is left.

    Args:
        budget: the cost model and C*.
        choices: what may move. All widths start at their widest, so that a decision does not depend on earlier ones.
        group_rises: expected rise of the loss per group, by its number; added up over a block.
        width_rises: per quantizer and allowed width, the loss that its rounding costs; the narrower, the more.

    Returns:
        `Allocation`. What the last move saved beyond the budget goes back into wider widths, as far as it reaches: no
        width can be raised without leaving the budget.
    """
    state = _State(budget, choices, group_rises, width_rises)
    # Every move makes the others save less, so a ratio only grows: the one on top, if still right, is the least.
    heap = [(state.ratio(move), move) for move in state.all_moves()]
    heapq.heapify(heap)
    price = 0.0
    while heap and not state.fits():
        _, move = heapq.heappop(heap)
        ratio = state.ratio(move)
        if ratio == math.inf:
            continue
        if not heap or ratio <= heap[0][0]:
            state.take(move)
            price, ratio = max(price, ratio), state.ratio(move)  # of the next one of its kind
        heapq.heappush(heap, (ratio, move))
    state.spend_slack()
    return Allocation(tuple(state.blocks), tuple(state.bits), state.exact_cost(), price)


# What shrinks by one step: a family of axes or a quantizer, and its number.
Move = tuple[Literal["family", "width"], int]


class _State:
    """The cost as moves are taken, term by term, and what each next move would change."""

    def __init__(
        self,
        budget: Budget,
        choices: Choices,
        group_rises: Sequence[float],
        width_rises: Sequence[Mapping[int, float]],
    ) -> None:
        self.budget, self.choices, self.width_rises = budget, choices, width_rises
        self.removed, self.bits = list(choices.removed), [widths[-1] for widths in choices.widths]
        self.blocks: list[tuple[int, ...]] = []
        self.room = choices.most_removed - sum(choices.removed)
        self.families = choices.families or [(axis,) for axis in range(len(choices.removed))]
        self.taken = [0] * len(choices.blocks)  # blocks, per family
        self.block_rises = [[sum(group_rises[group] for group in block) for block in one] for one in choices.blocks]
        self.terms_of: dict[Move, list[int]] = {move: [] for move in self.all_moves()}
        family_of = {axis: number for number, axes in enumerate(self.families) for axis in axes}
        for number, term in enumerate(budget.terms):
            for family in {family_of[axis] for dim in term.dims for axis, _ in dim}:
                self.terms_of["family", family].append(number)
            for row in set(term.quantizers):
                self.terms_of["width", row].append(number)
        self.costs = [_term_cost(term, self.removed, self.bits) for term in budget.terms]
        self.cost = self.exact_cost()

    def all_moves(self) -> list[Move]:
        families, widths = range(len(self.families)), range(len(self.choices.widths))
        return [*(("family", family) for family in families), *(("width", row) for row in widths)]

    def exact_cost(self) -> float:
        return self.budget.constant + math.fsum(self.costs)

    def fits(self) -> bool:
        """C <= C*; the running sum, which carries rounding from move to move, is renewed before it is believed."""
        if self.cost <= self.budget.target * (1 + 1e-9):
            self.cost = self.exact_cost()
        return self.cost <= self.budget.target

    def ratio(self, move: Move) -> float:
        """Rise of the loss per saved cost; infinite where there is no such move, or it saves nothing."""
        kind, number = move
        if kind == "width":
            narrower = self._neighbour(number, -1)
            return math.inf if narrower is None else self._width_ratio(number, narrower)
        block = self._next_block(number)
        if not block or len(block) > self.room:
            return math.inf
        self._remove(number, len(block))
        saving = self._saving(move)
        self._remove(number, -len(block))
        return self.block_rises[number][self.taken[number]] / saving if saving > 0 else math.inf

    def take(self, move: Move) -> None:
        kind, number = move
        if kind == "width":
            narrower = self._neighbour(number, -1)
            assert narrower is not None  # `ratio` was finite
            self.bits[number] = narrower
        else:
            block = self._next_block(number)
            self.blocks.append(tuple(block))
            self._remove(number, len(block))
            self.room -= len(block)
            self.taken[number] += 1
        self._update(move)

    def spend_slack(self) -> None:
        """Widen widths, those first that lower the loss most per cost, while the budget holds."""
        self.cost = self.exact_cost()
        open_rows = set(range(len(self.bits)))
        while open_rows:
            ratios = []
            for row in sorted(open_rows):
                wider = self._neighbour(row, 1)
                if wider is None or self.cost - self._saving_of_width(row, wider) > self.budget.target:
                    open_rows.discard(row)  # costs only grow from here
                else:
                    ratios.append((self._width_ratio(row, wider), row, wider))
            if ratios:
                _, row, wider = max(ratios)
                self.bits[row] = wider
                self._update(("width", row))

    def _next_block(self, family: int) -> Sequence[int]:
        blocks = self.choices.blocks[family]
        return blocks[self.taken[family]] if self.taken[family] < len(blocks) else ()

    def _remove(self, family: int, groups: int) -> None:
        for axis in self.families[family]:
            self.removed[axis] += groups // len(self.families[family])

    def _neighbour(self, row: int, step: int) -> int | None:
        """The next allowed width below (-1) or above (1), None at the end."""
        widths = self.choices.widths[row]
        place = widths.index(self.bits[row]) + step
        return widths[place] if 0 <= place < len(widths) else None

    def _width_ratio(self, row: int, bits: int) -> float:
        """Change of the loss over change of the cost, if a width becomes `bits`; infinite where the cost stays."""
        saving = self._saving_of_width(row, bits)
        rises = self.width_rises[row]
        return (rises[bits] - rises[self.bits[row]]) / saving if saving else math.inf

    def _saving_of_width(self, row: int, bits: int) -> float:
        before, self.bits[row] = self.bits[row], bits
        saving = self._saving(("width", row))
        self.bits[row] = before
        return saving

    def _saving(self, move: Move) -> float:
        """Of the counts and widths as they are, against `costs`."""
        terms = self.budget.terms
        return sum(self.costs[i] - _term_cost(terms[i], self.removed, self.bits) for i in self.terms_of[move])

    def _update(self, move: Move) -> None:
        self.cost -= self._saving(move)
        for i in self.terms_of[move]:
            self.costs[i] = _term_cost(self.budget.terms[i], self.removed, self.bits)


def _term_cost(term: CostTerm, removed: Sequence[int], bits: Sequence[float]) -> float:
    cost = term.coefficient
    for dim in term.dims:
        cost *= 1 - sum(share * removed[axis] for axis, share in dim)
    for row in term.quantizers:
        cost *= bits[row]
    return cost
