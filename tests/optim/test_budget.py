"""One price for structure and bits: the budget holds within one move, and what one layer gives up another may keep."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_geta.graph.qadg import Axis, Member, Operation
from hf_geta.optim.budget import Budget, Choices, CostTerm, allocate
from hf_geta.optim.cost_terms import bops_budget, size_budget
from hf_geta.optim.rounding import levels


def layer(coefficient, weight, own=None, before=None, size=8, before_size=8):
    """A layer whose rows are axis `own` and whose columns are axis `before`, with the width of quantizer `weight`."""
    owners = [(own, size), (before, before_size)]
    dims = tuple(((axis, 1 / groups),) for axis, groups in owners if axis is not None)
    return CostTerm(coefficient, dims, (weight,))


def width_rises(noise):
    """Per quantizer and width, where errors go with the square of the step size."""
    return [{bits: value / levels(bits, True) ** 2 for bits in range(2, 17)} for value in noise]


WIDTHS = ((2, 3, 4, 5, 6, 7, 8), (2, 4, 8), (4,))


@st.composite
def problems(draw, allowed=WIDTHS):
    """A chain of layers with an axis between every two, random costs and rises, and a target that can be reached."""
    layers = draw(st.integers(1, 4))
    size = draw(st.integers(2, 6))
    terms = [
        layer(
            draw(st.floats(0.1, 10)),
            i,
            i if i < layers - 1 else None,
            i - 1 if i > 0 else None,
            size,
            size,
        )
        for i in range(layers)
    ]
    axes = layers - 1
    rises = [draw(st.floats(0, 1)) for _ in range(axes * size)]
    noise = [draw(st.floats(0, 100)) for _ in range(layers)]
    blocks = []
    for axis in range(axes):
        order = sorted(range(axis * size, (axis + 1) * size), key=rises.__getitem__)
        blocks.append([[group] for group in order[:-1]])  # one group stays
    widths = [draw(st.sampled_from(allowed)) for _ in range(layers)]
    choices = Choices(blocks, [0] * axes, widths, most_removed=axes * (size - 1))
    budget = Budget(tuple(terms), 0.0, 0.0)
    most = budget.cost([0] * axes, [w[-1] for w in widths])
    least = budget.cost([size - 1] * axes, [w[0] for w in widths])
    target = least + draw(st.floats(0.001, 1)) * (most - least)
    return Budget(budget.terms, 0.0, target), choices, rises, noise, size


def removed_per_axis(found, choices, size):
    return [sum(group // size == axis for group in found.groups) for axis in range(len(choices.blocks))]


@settings(max_examples=200, deadline=None)
@given(problems())
def test_the_budget_holds_within_one_move(problem):
    budget, choices, rises, noise, size = problem
    found = allocate(budget, choices, rises, width_rises(noise))
    removed = removed_per_axis(found, choices, size)
    assert found.cost == pytest.approx(budget.cost(removed, found.bits), rel=1e-12)
    assert found.cost <= budget.target * (1 + 1e-12)
    for row, widths in enumerate(choices.widths):
        assert found.bits[row] in widths
        if found.bits[row] < widths[-1]:
            wider = list(found.bits)
            wider[row] = widths[widths.index(found.bits[row]) + 1]
            assert budget.cost(removed, wider) > budget.target
    for axis, blocks in enumerate(choices.blocks):  # the least salient of an axis go first
        chosen = [group for group in found.groups if group // size == axis]
        assert chosen == [group for block in blocks[: len(chosen)] for group in block]


@settings(max_examples=100, deadline=None)
@given(problems(allowed=[(4,)]))
def test_where_no_width_can_be_raised_the_group_that_went_last_could_not_have_stayed(problem):
    budget, choices, rises, noise, size = problem
    found = allocate(budget, choices, rises, width_rises(noise))
    if found.groups:
        removed = removed_per_axis(found, choices, size)
        removed[found.groups[-1] // size] -= 1
        assert budget.cost(removed, found.bits) > budget.target


@settings(max_examples=100, deadline=None)
@given(problems())
def test_a_larger_budget_never_costs_a_higher_price(problem):
    budget, choices, rises, noise, _ = problem
    prices = []
    for factor in (1.0, 1.2, 2.0):
        larger = Budget(budget.terms, 0.0, budget.target * factor)
        prices.append(allocate(larger, choices, rises, width_rises(noise)).price)
    assert prices == sorted(prices, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.5, 5), st.floats(0.1, 100)), min_size=1, max_size=4), st.floats(0.1, 0.9))
def test_no_other_widths_of_that_cost_lose_less(layers, share):
    """Where costs do not interact (one width per term) the moves are a convex problem, which greedy moves solve."""
    terms = tuple(CostTerm(coefficient, (), (row,)) for row, (coefficient, _) in enumerate(layers))
    noise = [value for _, value in layers]
    widths = [(2, 3, 4, 5)] * len(layers)
    full = Budget(terms, 0.0, 0.0)
    low, high = (full.cost([], [bits] * len(layers)) for bits in (2, 5))
    found = allocate(
        Budget(terms, 0.0, low + share * (high - low)),
        Choices([], [], widths, 0),
        [],
        width_rises(noise),
    )

    def loss(bits):
        return sum(value / levels(b, True) ** 2 for value, b in zip(noise, bits, strict=True))

    # nothing of at least its price's worth is left: loss + price * cost is the least of all choices, but for the slack
    # that went back into widths, which only lowers the loss
    def priced(bits):
        return loss(bits) + found.price * full.cost([], bits)

    best = min(map(priced, itertools.product(*widths)))
    steps = [found.price * coefficient for coefficient, _ in layers]  # one step of a width is one unit of its term
    assert priced(found.bits) <= best + sum(steps) + 1e-9


def two_layers(target, widths=(2, 3, 4, 5, 6, 7, 8), removable=7, removed=0):
    """Two layers alike but for what the test does to the first: 8 channels, one width each."""
    terms = (layer(1.0, 0, own=0), layer(1.0, 1, own=1))
    blocks = [[[g] for g in range(8)][:removable], [[g] for g in range(8, 16)][:7]]
    choices = Choices(blocks, [removed, 0], [widths, (2, 3, 4, 5, 6, 7, 8)], most_removed=14 + removed)
    rises = [0.02 * (1 + g % 8) for g in range(16)]
    return allocate(Budget(terms, 0.0, target), choices, rises, width_rises([50.0, 50.0]))


def test_a_layer_that_was_forced_to_lose_channels_keeps_more_bits():
    free = two_layers(6.0, removable=0)
    forced = two_layers(6.0, removable=0, removed=4)
    assert forced.bits[0] > free.bits[0]


@pytest.mark.parametrize("target", [5.5, 7.0, 8.5])
def test_of_two_layers_alike_the_one_that_was_forced_to_lose_channels_has_more_bits(target):
    """A cheaper model has room for bits in every layer; the trade-off is between this layer and another."""
    terms = (layer(1.0, 0, own=0), layer(1.0, 1, own=1))
    choices = Choices([[], []], removed=[4, 0], widths=[WIDTHS[0]] * 2, most_removed=4)
    found = allocate(Budget(terms, 0.0, target), choices, [0.0] * 16, width_rises([50.0, 50.0]))
    assert found.bits[0] > found.bits[1]


def test_a_layer_that_was_forced_to_few_bits_keeps_more_channels():
    free = two_layers(5.0)
    forced = two_layers(5.0, widths=(2,))
    count = [sum(group < 8 for group in found.groups) for found in (free, forced)]
    assert count[1] < count[0]
    assert count[1] < len(forced.groups) - count[1]  # of its own fewer go than of the other layer's


def test_nothing_moves_inside_the_budget():
    found = two_layers(100.0)
    assert found.groups == ()
    assert found.bits == (8, 8)
    assert found.price == 0


def test_no_more_groups_go_than_may():
    terms = (layer(1.0, 0, own=0),)
    choices = Choices([[[g] for g in range(7)]], [0], [(8,)], most_removed=3)
    found = allocate(Budget(terms, 0.0, 0.1), choices, [0.0] * 8, width_rises([1.0]))
    assert len(found.groups) == 3
    assert found.cost > 0.1


class ReadMembers(tuple):
    """Counts how often it is gone through."""

    times = 0

    def __iter__(self):
        ReadMembers.times += 1
        return super().__iter__()


@pytest.mark.parametrize("experts", [2, 20])
def test_a_budget_reads_the_members_of_an_axis_once_however_many_tensors_there_are(experts):
    """A mixture of experts has thousands of both."""
    units = torch.arange(8).view(4, 2)  # two entries of each dimension per group
    axes = [
        Axis(f"{i}", "mlp", 4, ReadMembers([Member(f"{i}.up", 0, units), Member(f"{i}.down", 1, units)]))
        for i in range(experts)
    ]
    tensors = {f"{i}.{name}": torch.ones(8, 8) for i in range(experts) for name in ("up", "down")}
    operations = [Operation("mm", name, 64, ()) for name in tensors]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for budget in (
        lambda: size_budget(1.0, tensors, axes, {}, {}, {}),
        lambda: bops_budget(0.5, operations, axes, shapes, {}, {}),
    ):
        ReadMembers.times = 0
        terms = budget().terms
        assert ReadMembers.times == experts
        assert [term.dims for term in terms] == [(((i, 2 / 8),),) for i in range(experts) for _ in range(2)]
