"""Axes in lockstep: equally many groups from each, exactly as many as planned, at the least cost."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.optim.choice import choose_least_salient
from hf_geta.optim.lockstep import Lockstep, choose_in_lockstep, nearest_in_lockstep


@st.composite
def spaces(draw):
    """(scores, sizes, families) of one to three families of axes, in blocks of any sizes."""
    sizes, families = [], []
    for _ in range(draw(st.integers(1, 3))):
        size, divisible = draw(st.integers(2, 12)), draw(st.sampled_from([1, 2, 4]))
        left = draw(st.none() | st.sets(st.integers(1, size - 1)))
        axes = range(len(sizes), len(sizes) + draw(st.integers(1, 3)))
        families.append(Lockstep.of(axes, size, draw(st.integers(1, 2)), divisible, left))
        sizes += [size] * len(axes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.rand(sum(sizes), generator=generator) ** 3, sizes, families


def counts_per_axis(chosen, sizes):
    return [int(flags.sum()) for flags in chosen.split(sizes)]


def every_way(families):
    """(groups per axis) of all families, by number of blocks."""
    return itertools.product(*(list(itertools.accumulate(family.blocks, initial=0)) for family in families))


@given(spaces(), st.floats(0, 1))
def test_every_axis_of_a_family_loses_as_many_and_all_together_exactly_the_planned_number(space, share):
    scores, sizes, families = space
    count = nearest_in_lockstep(round(share * sum(sizes)), families)
    chosen = choose_in_lockstep(scores, torch.zeros(len(scores), dtype=torch.bool), count, sizes, families, count)
    counts = counts_per_axis(chosen, sizes)
    assert sum(counts) == count
    for family in families:
        assert len({counts[axis] for axis in family.axes}) == 1
        assert counts[family.axes[0]] in itertools.accumulate(family.blocks, initial=0)


@given(spaces(), st.floats(0, 1))
def test_no_other_way_to_that_number_costs_less(space, share):
    scores, sizes, families = space
    count = nearest_in_lockstep(round(share * sum(sizes)), families)
    chosen = choose_in_lockstep(scores, torch.zeros(len(scores), dtype=torch.bool), count, sizes, families, count)
    ordered = [part.double().sort().values for part in scores.split(sizes)]

    def cost(way):
        return sum(float(ordered[axis][:gone].sum()) for family, gone in zip(families, way) for axis in family.axes)

    least = min(
        cost(way) for way in every_way(families) if sum(gone * len(f.axes) for f, gone in zip(families, way)) == count
    )
    assert float(scores[chosen].double().sum()) == pytest.approx(least)


@given(spaces(), st.floats(0, 1))
def test_the_nearest_number_is_nearest_and_the_larger_of_two(space, share):
    _, sizes, families = space
    asked = round(share * sum(sizes))
    possible = {sum(gone * len(f.axes) for f, gone in zip(families, way)) for way in every_way(families)}
    assert nearest_in_lockstep(asked, families) == min(possible, key=lambda count: (abs(count - asked), -count))


@given(spaces(), st.integers(2, 5))
def test_what_is_chosen_in_periods_never_exceeds_its_part_and_ends_at_the_plan(space, periods):
    scores, sizes, families = space
    total = nearest_in_lockstep(sum(sizes) // 2, families)
    removed = torch.zeros(len(scores), dtype=torch.bool)
    for period in range(1, periods + 1):
        count = total * period // periods
        chosen = choose_in_lockstep(scores.roll(period), removed, count, sizes, families, total)
        assert not (chosen & removed).any()
        removed |= chosen
        assert int(removed.sum()) <= count
        counts = counts_per_axis(removed, sizes)
        assert all(len({counts[axis] for axis in family.axes}) == 1 for family in families)
    assert int(removed.sum()) == total


@given(st.lists(st.integers(2, 20), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 10**6))
def test_families_of_one_axis_each_are_the_choice_without_families(sizes, share, seed):
    scores = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(seed))
    removed = torch.zeros(len(scores), dtype=torch.bool)
    count = round(share * (sum(sizes) - len(sizes)))
    families = [Lockstep.of([axis], size, 1, 1) for axis, size in enumerate(sizes)]
    chosen = choose_in_lockstep(scores, removed, count, sizes, families, count)
    assert torch.equal(chosen, choose_least_salient(scores, removed, count, sizes))


def test_a_number_that_blocks_do_not_reach_is_refused_with_the_nearest():
    families, removed = [Lockstep((0, 1), (2, 2))], torch.zeros(12, dtype=torch.bool)
    with pytest.raises(ValueError, match="the nearest count is 8"):
        choose_in_lockstep(torch.ones(12), removed, 7, [6, 6], families, 7)
