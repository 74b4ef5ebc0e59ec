"""The choice of groups: exact in number, in whole blocks, never an axis's last ones, the same every time."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_geta.optim.choice import choose_least_salient, nearest_reachable, removable_groups


def none_removed(sizes):
    return torch.zeros(sum(sizes), dtype=torch.bool)


def random_scores(count, seed):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3


@st.composite
def spaces(draw):
    """Axes with scores, where groups go one by one."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    return sizes, random_scores(sum(sizes), draw(st.integers(0, 10**6)))


@st.composite
def blocked_spaces(draw):
    """(sizes, min_groups, divisible) of axes shorter and longer than a block."""
    divisible = draw(st.sampled_from([1, 8, 16, 32]))
    sizes = draw(st.lists(st.integers(1, 6 * divisible), min_size=1, max_size=6))
    return sizes, draw(st.integers(1, 2 * divisible)), divisible


def reachable_counts(sizes, min_groups, divisible):
    """By trying everything: each axis loses a first part of its blocks."""
    counts = {0}
    for size in sizes:
        cuts = list(itertools.accumulate(removable_groups(size, min_groups, divisible), initial=0))
        counts = {count + cut for count in counts for cut in cuts}
    return counts


def least_cost(scores, sizes, count, min_groups, divisible):
    """The exact minimum over all ways to remove `count` groups, by dynamic programming over the count."""
    best = {0: 0.0}
    for part, size in zip(scores.double().split(sizes), sizes, strict=True):
        costs = part.sort().values.cumsum(0).tolist()
        cuts = list(itertools.accumulate(removable_groups(size, min_groups, divisible), initial=0))
        options = [(cut, costs[cut - 1] if cut else 0.0) for cut in cuts]
        added: dict[int, float] = {}
        for (before, cost), (cut, more) in itertools.product(best.items(), options):
            if before + cut <= count:
                added[before + cut] = min(added.get(before + cut, float("inf")), cost + more)
        best = added
    return best[count]


@given(spaces(), st.floats(0, 1))
def test_exactly_the_asked_number_is_chosen_and_no_axis_is_emptied(space, share):
    sizes, scores = space
    count = int(share * (sum(sizes) - len(sizes)))
    chosen = choose_least_salient(scores, none_removed(sizes), count, sizes)
    assert chosen.sum() == count
    assert all((~part).sum() >= 1 for part in chosen.split(sizes))


@given(spaces(), st.floats(0, 1), st.booleans())
def test_one_by_one_the_least_salient_of_all_go_and_ties_go_to_the_lower_number(space, share, tied):
    sizes, scores = space
    scores = scores.mul(4).round() if tied else scores
    count = int(share * (sum(sizes) - len(sizes)))
    may_go = torch.zeros(sum(sizes), dtype=torch.bool)
    for groups in torch.arange(sum(sizes)).split(sizes):
        may_go[groups[scores[groups].argsort(stable=True)][:-1]] = True  # an axis keeps its last, most salient one
    expected = sorted(may_go.nonzero().flatten().tolist(), key=lambda group: (float(scores[group]), group))[:count]
    chosen = choose_least_salient(scores, none_removed(sizes), count, sizes)
    assert chosen.nonzero().flatten().tolist() == sorted(expected)


@given(spaces(), st.integers(1, 4))
def test_choosing_in_periods_chooses_what_one_choice_does(space, periods):
    """With unchanged scores, P periods remove the same groups as one."""
    sizes, scores = space
    total = (sum(sizes) - len(sizes)) // 2
    removed = none_removed(sizes)
    for period in range(periods):
        removed |= choose_least_salient(scores, removed, total * (period + 1) // periods, sizes, total=total)
    at_once = choose_least_salient(scores, none_removed(sizes), total, sizes)
    assert torch.equal(removed, at_once)


@given(blocked_spaces(), st.floats(0, 1), st.integers(1, 5), st.integers(0, 10**6))
def test_exactly_what_can_be_reached_goes_in_whole_blocks_whatever_the_scores_do(space, share, periods, seed):
    """Scores change between the periods; nothing comes back, and no axis falls below its least size."""
    sizes, min_groups, divisible = space
    total = nearest_reachable(round(share * sum(sizes)), sizes, min_groups, divisible)
    removed = none_removed(sizes)
    for period in range(periods):
        count = total * (period + 1) // periods
        scores = random_scores(len(removed), seed + period)
        chosen = choose_least_salient(scores, removed, count, sizes, min_groups, divisible, total)
        assert not (chosen & removed).any()
        removed |= chosen
        assert count - divisible < removed.sum() <= count
        for size, part in zip(sizes, removed.split(sizes), strict=True):
            kept = size - int(part.sum())
            assert kept == size or kept >= min_groups
            assert kept == size or size <= divisible or kept % divisible == 0
    assert removed.sum() == total


@given(blocked_spaces(), st.floats(0, 1.2))
def test_the_nearest_reachable_number_is_nearest_and_the_larger_of_two(space, share):
    sizes, min_groups, divisible = space
    asked = round(share * sum(sizes))
    counts = reachable_counts(sizes, min_groups, divisible)
    expected = min(counts, key=lambda count: (abs(count - asked), -count))
    assert nearest_reachable(asked, sizes, min_groups, divisible) == expected
    assert asked > max(counts) or abs(expected - asked) <= divisible / 2


@pytest.mark.parametrize("divisible", [2, 4, 8, 16])
def test_a_choice_in_blocks_costs_the_least_that_is_possible(divisible):
    """In 98 of 100 spaces exactly, in the others near it: the search compares sets of heads, not all of them."""
    gaps = []
    for seed in range(100):
        draw = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 6 * divisible, (6,), generator=draw).tolist()
        scores = random_scores(sum(sizes), seed)
        min_groups = int(torch.randint(1, divisible + 1, (), generator=draw))
        asked = int(torch.randint(0, sum(sizes), (), generator=draw))
        count = nearest_reachable(asked, sizes, min_groups, divisible)
        chosen = choose_least_salient(scores, none_removed(sizes), count, sizes, min_groups, divisible)
        least = least_cost(scores, sizes, count, min_groups, divisible)
        cost = float(scores[chosen].double().sum())
        assert cost >= least * (1 - 1e-9)
        gaps.append(cost / least - 1 if least else cost)
    assert sorted(gaps)[97] < 1e-9
    assert max(gaps) < 0.15


def test_the_blocks_of_the_plan_go_in_the_order_of_their_mean_score():
    """Two axes of 10 in blocks of 4, the second with the lower scores: first its 2, then its 4, then the first's 2."""
    scores = torch.cat([torch.full((10,), 2.0), torch.full((10,), 1.0)])
    removed = none_removed([10, 10])
    for count, expected in ((3, [0, 2]), (6, [0, 6]), (8, [2, 6])):
        removed |= choose_least_salient(scores, removed, count, [10, 10], divisible=4, total=8)
        assert [int(part.sum()) for part in removed.split(10)] == expected


def test_a_number_that_blocks_do_not_reach_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="3 groups cannot go .* nearest count is 2"):
        choose_least_salient(torch.rand(10), none_removed([10]), 3, [10], divisible=4)


def test_min_groups_stay():
    scores = torch.tensor([0.0, 0.1, 0.2, 9.0, 9.1, 9.2])
    chosen = choose_least_salient(scores, none_removed([6]), 2, [3, 3], min_groups=2)
    assert [int(part.sum()) for part in chosen.split(3)] == [1, 1]


def test_scores_that_are_no_numbers_are_the_highest():
    scores = torch.tensor([torch.nan, 1.0, torch.inf, 2.0])
    chosen = choose_least_salient(scores, none_removed([4]), 2, [4])
    assert chosen.tolist() == [False, True, False, True]
